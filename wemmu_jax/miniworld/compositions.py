"""Compositions of two scenes: the first is the base, the second lends something to it."""

import dataclasses
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from wemmu_jax.miniworld.edits import Change
from wemmu_jax.miniworld.language import (
    Named,
    Phrases,
    at_place,
    place_objects,
    placed,
    refer,
    with_article,
)
from wemmu_jax.miniworld.scene import MAX_OBJECTS, Object, Scene, Split, choose, draw_scene

Combiner = Callable[[Scene, Scene, np.random.Generator], Change | None]


@dataclasses.dataclass(frozen=True)
class Composition:
    """`instruction` leads from the two `sources` to `target`; `answer` says what it means in these scenes, and `named`
    what of each it speaks of."""

    kind: str
    instruction: str
    answer: str
    sources: tuple[Scene, Scene]
    target: Scene
    named: tuple[Named | None, Named | None]


def _replace(first: Scene, second: Scene, rng: np.random.Generator) -> Change | None:
    item, lent = choose(rng, first.objects), choose(rng, second.objects)
    if item.name == lent.name:
        return None
    new = replace(item, shape=lent.shape, colour=lent.colour)
    return _exchange(first, second, item, lent, new, rng)


def _add(first: Scene, second: Scene, rng: np.random.Generator) -> Change | None:
    if len(first.objects) == MAX_OBJECTS:
        return None
    lent, place = choose(rng, second.objects), choose(rng, first.free_places)
    new = replace(lent, place=place, offset=(0.0, 0.0))
    words = {"lent": refer(second, lent, rng), "at_place": at_place(place)}
    answer = f"{placed(words['lent'], lent)}: {placed(with_article(new.name), new)}"
    return Change(first.add(new), words, answer, (None, Named(words["lent"], lent.place)))


def _recolour(first: Scene, second: Scene, rng: np.random.Generator) -> Change | None:
    item, lent = choose(rng, first.objects), choose(rng, second.objects)
    if item.colour == lent.colour:
        return None
    return _exchange(first, second, item, lent, replace(item, colour=lent.colour), rng)


def _background(first: Scene, second: Scene, rng: np.random.Generator) -> Change | None:
    if first.background == second.background:
        return None
    answer = f"the background: {second.background}"
    return Change(replace(first, background=second.background), {}, answer, (None, None))


def _merge(first: Scene, second: Scene, rng: np.random.Generator) -> Change | None:
    objects = (*first.objects, *second.objects)
    if len(objects) > MAX_OBJECTS or len({item.place for item in objects}) < len(objects):
        return None
    answer = f"the second image: {place_objects(second)}"
    return Change(first.add(*second.objects), {}, answer, (None, None))


def _exchange(
    first: Scene, second: Scene, item: Object, lent: Object, new: Object, rng: np.random.Generator
) -> Change:
    """`new` in place of `item`, after what `lent` of the second scene is."""
    words = {"it": refer(first, item, rng), "lent": refer(second, lent, rng)}
    found = f"{placed(words['it'], item)}, {placed(words['lent'], lent)}"
    named = (Named(words["it"], item.place), Named(words["lent"], lent.place))
    return Change(first.exchange(item, new), words, f"{found}: {with_article(new.name)}", named)


_LENT = ("{lent} of the second image", "{lent} of the second", "{lent} in the second image")
_BACKGROUND = (
    "the background of the second",
    "the background of the second image",
    "the background in the second image",
)
_SHAPES = (
    "all shapes of the second image",
    "all shapes of the second",
    "the shapes of the second",
    "the shapes of the second image",
)

KINDS: dict[str, tuple[Combiner, Phrases]] = {
    "replace": (
        _replace,
        Phrases.crossed(
            (
                "in the first image, replace {it} with {end}",
                "in the first image, change {it} into {end}",
                "in the first image, put {end} in place of {it}",
                "in the first image, draw {end} in place of {it}",
                "change {it} of the first image into {end}",
                "put {end} in place of {it} of the first image",
                "draw {end} in place of {it} in the first image",
                "replace {it} of the first image with {end}",
                "put {end} in place of {it} in the first image",
                "draw {end} in place of {it} of the first image",
                "replace {it} in the first image with {end}",
                "change {it} in the first image into {end}",
            ),
            _LENT,
        ),
    ),
    "add": (
        _add,
        Phrases.crossed(
            (
                "add {end} {at_place} of the first image",
                "put {end} {at_place} of the first image",
                "in the first image, draw {end} {at_place}",
                "add {end} to the first image, {at_place}",
                "draw {end} into the first image, {at_place}",
                "in the first image, add {end} {at_place}",
                "draw {end} {at_place} of the first image",
                "put {end} into the first image, {at_place}",
            ),
            _LENT,
        ),
    ),
    "recolour": (
        _recolour,
        Phrases.crossed(
            (
                "change {it} of the first image to the colour of {end}",
                "in the first image, give {it} the colour of {end}",
                "in the first image, paint {it} in the colour of {end}",
                "in the first image, make {it} the colour of {end}",
                "paint {it} of the first image in the colour of {end}",
                "in the first image, change {it} to the colour of {end}",
                "make {it} of the first image the colour of {end}",
                "turn {it} of the first image to the colour of {end}",
                "give {it} of the first image the colour of {end}",
                "in the first image, draw {it} in the colour of {end}",
                "draw {it} of the first image in the colour of {end}",
                "in the first image, turn {it} to the colour of {end}",
            ),
            _LENT,
        ),
    ),
    "background": (
        _background,
        Phrases.crossed(
            (
                "draw all shapes of the first image on {end}",
                "change the background of the first image to {end}",
                "in the first image, replace the background with {end}",
                "replace the background of the first image with {end}",
                "give the first image {end}",
                "put the shapes of the first image on {end}",
                "draw the first image with {end}",
                "in the first image, change the background to {end}",
                "put all shapes of the first image on {end}",
                "draw the shapes of the first image on {end}",
                "put {end} into the first image",
                "make the background of the first image {end}",
            ),
            _BACKGROUND,
        ),
    ),
    "merge": (
        _merge,
        Phrases.crossed(
            (
                "draw {end} into the first image",
                "put {end} into the first image",
                "in the first image, draw {end}",
                "give the first image {end}",
                "in the first image, add {end}",
                "add {end} to the first image",
                "draw the first image with {end}",
                "draw the first image and add {end}",
            ),
            _SHAPES,
        ),
    ),
}


def draw_composition(
    rng: np.random.Generator, split: Split, kind: str | None = None
) -> Composition:
    """A composition of `kind` (any, if None) whose three scenes are of `split`, in a wording of `split`."""
    kind = kind or choose(rng, KINDS)
    while True:
        sources = draw_scene(rng, split), draw_scene(rng, split)
        if made := composition_of(sources, kind, rng, split):
            return made


def composition_of(
    sources: tuple[Scene, Scene], kind: str, rng: np.random.Generator, split: Split
) -> Composition | None:
    """A composition of `kind` of these scenes; None where there is none, or where it leads out of `split`."""
    combiner, phrases = KINDS[kind]
    change = combiner(*sources, rng)
    if not change or change.target.split != split:
        return None
    instruction = phrases.draw(rng, split).format(**change.words)
    return Composition(kind, instruction, change.answer, sources, change.target, change.named)
