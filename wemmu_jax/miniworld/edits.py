"""Edits of one scene: an instruction and what it leads to.

An instruction refers to exactly one object, and its target follows from it and the source alone: what is
replaced or moved keeps its small offset, what is added stands in the middle of its place.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from wemmu_jax.miniworld.language import Named, Phrases, at_place, placed, refer, with_article
from wemmu_jax.miniworld.scene import (
    BACKGROUNDS,
    COLOURS,
    MAX_OBJECTS,
    SHAPES,
    Object,
    Scene,
    Split,
    choose,
    draw_scene,
)


@dataclasses.dataclass(frozen=True)
class Edit:
    """`instruction` leads from `source` to `target`; `answer` says what it means in this scene, and `named` what it
    speaks of."""

    kind: str
    instruction: str
    answer: str
    source: Scene
    target: Scene
    named: tuple[Named | None]


class Change(NamedTuple):
    """A target, the words that fill the instruction's blanks, what the instruction means in this scene, and the object
    of each source that it names, if it names one.

    The answer repeats the words for what is to change, finds its place and ends with what it becomes. Without the
    repetition the tiny VLM took any object (docs/miniworld.md).
    """

    target: Scene
    words: dict[str, str]
    answer: str
    named: tuple[Named | None, ...]


Changer = Callable[[Scene, np.random.Generator], Change | None]


def other(rng: np.random.Generator, options, than: str) -> str:
    """One of `options` that is not `than`."""
    return choose(rng, [option for option in options if option != than])


def _recolour(scene: Scene, rng: np.random.Generator) -> Change:
    item = choose(rng, scene.objects)
    new = replace(item, colour=other(rng, COLOURS, item.colour))
    it = refer(scene, item, rng)
    answer = f"{placed(it, item)}: {with_article(new.name)}"
    words = {"it": it, "colour": new.colour}
    return Change(scene.exchange(item, new), words, answer, (Named(it, item.place),))


def _remove(scene: Scene, rng: np.random.Generator) -> Change | None:
    if len(scene.objects) == 1:
        return None
    item = choose(rng, scene.objects)
    it = refer(scene, item, rng)
    named = (Named(it, item.place),)
    return Change(scene.without(item), {"it": it}, f"{placed(it, item)}: nothing", named)


def _add(scene: Scene, rng: np.random.Generator) -> Change | None:
    if len(scene.objects) == MAX_OBJECTS:
        return None
    item = Object(choose(rng, SHAPES), choose(rng, COLOURS), choose(rng, scene.free_places))
    words = {"new": with_article(item.name), "at_place": at_place(item.place)}
    return Change(scene.add(item), words, "{at_place}: {new}".format(**words), (None,))


def _replace(scene: Scene, rng: np.random.Generator) -> Change:
    item = choose(rng, scene.objects)
    new = replace(item, shape=other(rng, SHAPES, item.shape))
    it = refer(scene, item, rng)
    words = {"it": it, "shape": with_article(new.shape), "new": with_article(new.name)}
    answer = f"{placed(it, item)}: {words['new']}"
    return Change(scene.exchange(item, new), words, answer, (Named(it, item.place),))


def _move(scene: Scene, rng: np.random.Generator) -> Change:
    item = choose(rng, scene.objects)
    place = choose(rng, scene.free_places)
    it = refer(scene, item, rng)
    words = {"it": it, "place": f"the {place}", "at_place": at_place(place)}
    answer = f"{placed(it, item)}: {words['at_place']}"
    target = scene.exchange(item, replace(item, place=place))
    return Change(target, words, answer, (Named(it, item.place),))


def _background(scene: Scene, rng: np.random.Generator) -> Change:
    background = other(rng, BACKGROUNDS, scene.background)
    words = {"colour": background, "background": with_article(background)}
    answer = f"the background: {background}"
    return Change(replace(scene, background=background), words, answer, (None,))


KINDS: dict[str, tuple[Changer, Phrases]] = {
    "recolour": (
        _recolour,
        Phrases(
            (
                "make {it} {colour}",
                "turn {it} {colour}",
                "change {it} to {colour}",
                "draw {it} in {colour}",
                "paint {it} in {colour}",
                "give {it} the colour {colour}",
                "make the colour of {it} {colour}",
                "change the colour of {it} to {colour}",
                "turn the colour of {it} to {colour}",
            ),
            ("paint {it} {colour}", "draw {it} {colour}", "turn {it} to {colour}"),
        ),
    ),
    "remove": (
        _remove,
        Phrases(
            (
                "remove {it}",
                "remove {it} from the image",
                "delete {it}",
                "delete {it} from the picture",
                "take {it} away",
                "take {it} out",
                "take {it} from the picture",
                "put {it} away",
                "draw the picture without {it}",
            ),
            ("take away {it}", "delete {it} from the image", "draw the image without {it}"),
        ),
    ),
    "add": (
        _add,
        Phrases(
            ("add {new} {at_place}", "put {new} {at_place}", "{at_place}, add {new}"),
            ("draw {new} {at_place}",),
        ),
    ),
    "replace": (
        _replace,
        Phrases(
            (
                "replace {it} with {new}",
                "replace {it} with {shape}",
                "turn {it} into {shape}",
                "change {it} to {shape}",
                "make {it} into {shape}",
                "make {shape} of {it}",
                "put {new} in place of {it}",
                "draw {new} in place of {it}",
                "remove {it} and draw {new} there",
            ),
            ("change {it} into {shape}", "turn {it} into {new}", "put {shape} in place of {it}"),
        ),
    ),
    "move": (
        _move,
        Phrases(
            (
                "move {it} to {place}",
                "move {it} away, to {place}",
                "put {it} to {place}",
                "put {it} {at_place}",
                "draw {it} {at_place}",
                "take {it} to {place}",
                "take {it} and put it {at_place}",
                "take {it} away and draw it {at_place}",
                "give {it} the place {at_place}",
            ),
            (
                "change the place of {it} to {place}",
                "take {it} away and put it {at_place}",
                "take {it} and move it to {place}",
            ),
        ),
    ),
    "background": (
        _background,
        Phrases(
            (
                "make the background {colour}",
                "change the background to {colour}",
                "replace the background with {background} background",
                "draw it on {background} background",
                "paint the background {colour}",
                "put it on {background} background",
            ),
            ("turn the background {colour}", "change the colour of the background to {colour}"),
        ),
    ),
}


def draw_edit(rng: np.random.Generator, split: Split, kind: str | None = None) -> Edit:
    """An edit of `kind` (any, if None) whose source and target are of `split`, in a wording of `split`."""
    kind = kind or choose(rng, KINDS)
    while True:
        if edit := edit_of(draw_scene(rng, split), kind, rng, split):
            return edit


def edit_of(source: Scene, kind: str, rng: np.random.Generator, split: Split) -> Edit | None:
    """An edit of `kind` of this scene; None where there is none, or where what was drawn leads out of `split`."""
    changer, phrases = KINDS[kind]
    change = changer(source, rng)
    if not change or change.target.split != split:
        return None
    instruction = phrases.draw(rng, split).format(**change.words)
    return Edit(kind, instruction, change.answer, source, change.target, change.named)


def change_of(scene: Scene, rng: np.random.Generator) -> Scene:
    """`scene` after an edit of any kind."""
    while True:
        changer, _ = KINDS[choose(rng, KINDS)]
        if change := changer(scene, rng):
            return change.target
