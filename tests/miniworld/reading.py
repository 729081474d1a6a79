"""A reader of miniworld's English that shares nothing with its writer: finds noun phrases and carries out
instructions, so that what was written can be held against what was meant."""

import dataclasses
import re
from typing import NamedTuple

from wemmu_jax.miniworld.scene import BACKGROUNDS, COLOURS, PLACES, SHAPES, Object, Scene

_COLOUR = "|".join(COLOURS)
PLACE = "|".join(sorted(PLACES, key=len, reverse=True))
_SHAPE = "|".join(SHAPES)
_SOME = re.compile(
    rf"\b(a|an|two|three|four) (?:({_COLOUR}) )?({_SHAPE})(?:e?s)?\b(?: (?:in|at) the ({PLACE}))?"
)
_THE = re.compile(
    rf"\bthe (?:({_COLOUR}) )?({_SHAPE}|shape)\b(?! of both)(?: (?:in|at) the ({PLACE}))?"
)
_NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}


class Some(NamedTuple):
    """ "two red circles at the top"."""

    count: int
    colour: str | None
    shape: str
    place: str | None


def some(text: str) -> list[Some]:
    """The indefinite noun phrases of a text. Fails on a wrong article."""
    found = []
    for article, colour, shape, place in _SOME.findall(text):
        first = (colour or shape)[0]
        if article in ("a", "an"):
            assert article == ("an" if first in "aeiou" else "a"), text
        found.append(Some(_NUMBERS[article], colour or None, shape, place or None))
    return found


def column_and_row(place: str) -> tuple[int, int]:
    """Where a place's words say it is."""
    column = 0 if "left" in place else 2 if "right" in place else 1
    row = 0 if "top" in place else 2 if "bottom" in place else 1
    return column, row


def is_so(a: Object, relation: str, b: Object) -> bool:
    """Whether `a` is `relation` `b`, clearly: farther on that axis than on the other."""
    (xa, ya), (xb, yb) = column_and_row(a.place), column_and_row(b.place)
    right, down = xb - xa, yb - ya
    ahead, aside = {
        "left of": (right, down),
        "right of": (-right, down),
        "above": (down, right),
        "below": (-down, right),
    }[relation]
    return ahead > abs(aside)


def those(text: str, scene: Scene) -> list[Object]:
    """The objects that a text's definite noun phrases mean. Fails if one means none or several."""
    meant = []
    for colour, shape, place in _THE.findall(text):
        fits = [
            o
            for o in scene.objects
            if (not colour or o.colour == colour)
            and (shape in ("shape", o.shape))
            and (not place or o.place == place)
        ]
        assert len(fits) == 1, (text, scene.canonical)
        meant += fits
    return meant


def carry_out(kind: str, text: str, scene: Scene) -> Scene:
    """What an edit's instruction makes of a scene."""
    last = text.split()[-1]
    if kind == "background":
        (background,) = [name for name in BACKGROUNDS if re.search(rf"\b{name}\b", text)]
        return dataclasses.replace(scene, background=background)
    if kind == "add":
        ((count, colour, shape, _),) = some(text)
        (place,) = re.findall(rf"\b(?:in|at) the ({PLACE})", text)
        assert count == 1
        return scene.add(Object(shape, colour, place))
    if kind == "move":
        text, place = re.fullmatch(rf"(.*) (?:to|in|at) the ({PLACE})", text).groups()
        (item,) = those(text, scene)
        return scene.exchange(item, dataclasses.replace(item, place=place))
    (item,) = those(text, scene)
    if kind == "remove":
        return scene.without(item)
    if kind == "recolour":
        return scene.exchange(item, dataclasses.replace(item, colour=last))
    ((_, colour, shape, _),) = some(text)
    assert colour in (None, item.colour)
    return scene.exchange(item, dataclasses.replace(item, shape=shape))


def _phrases(text: str) -> list[str]:
    return [match.group(0) for match in _THE.finditer(text)]


def carry_out_on_two(kind: str, text: str, first: Scene, second: Scene) -> Scene:
    """What a composition's instruction makes of two scenes."""
    if kind == "background":
        assert re.search(r"background (?:of|in) the second", text)
        return dataclasses.replace(first, background=second.background)
    if kind == "merge":
        return first.add(*second.objects)
    if kind == "add":
        text, place = re.fullmatch(
            rf"(.*?),? (?:in|at) the ({PLACE})(?: of the first(?: image)?)?", text
        ).groups()
        (lent,) = those(text, second)
        return first.add(dataclasses.replace(lent, place=place))
    base, lent = _phrases(text)
    if "in place of" in text:
        base, lent = lent, base
    (item,), (lent,) = those(base, first), those(lent, second)
    new = dataclasses.replace(item, colour=lent.colour)
    if kind == "replace":
        new = dataclasses.replace(new, shape=lent.shape)
    return first.exchange(item, new)
