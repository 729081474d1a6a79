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


KINDS: dict[str, tuple[Combiner, Phrases]] = {
    "replace": (
        _replace,
        Phrases(
            (
                "replace {it} in the first image with {lent} of the second",
                "replace {it} of the first image with {lent} of the second image",
                "put {lent} of the second image in place of {it} of the first",
                "draw the first image with {lent} of the second in place of {it}",
                "in the first image, change {it} into {lent} of the second image",
                "change {it} of the first image into {lent} in the second",
            ),
            (
                "in the first image, replace {it} with {lent} of the second image",
                "draw {lent} of the second image in place of {it} in the first",
            ),
        ),
    ),
    "add": (
        _add,
        Phrases(
            (
                "add {lent} of the second image to the first, {at_place}",
                "add {lent} of the second image {at_place}",
                "put {lent} of the second image into the first image {at_place}",
                "put {lent} of the second {at_place} of the first image",
                "draw the first image and add {lent} of the second {at_place}",
                "in the first image, draw {lent} of the second image {at_place}",
            ),
            (
                "add {lent} of the second image {at_place} of the first",
                "draw {lent} of the second image into the first, {at_place}",
            ),
        ),
    ),
    "recolour": (
        _recolour,
        Phrases(
            (
                "paint {it} of the first image in the colour of {lent} in the second",
                "give {it} in the first image the colour of {lent} of the second image",
                "in the first image, {it} takes the colour of {lent} in the second",
                "make {it} of the first image the colour of {lent} of the second",
                "draw {it} of the first image in the colour of {lent} in the second image",
                "turn {it} in the first image to the colour of {lent} of the second image",
            ),
            (
                "change {it} of the first image to the colour of {lent} in the second",
                "in the first image, paint {it} in the colour of {lent} of the second",
            ),
        ),
    ),
    "background": (
        _background,
        Phrases(
            (
                "give the first image the background of the second",
                "the first image takes the background of the second image",
                "put all shapes of the first image on the background of the second image",
                "put the background of the second image into the first image",
                "draw the first image with the background of the second",
                "change the background of the first image to the background of the second",
            ),
            (
                "draw all shapes of the first image on the background of the second",
                "replace the background of the first image with the background of the second image",
            ),
        ),
    ),
    "merge": (
        _merge,
        Phrases(
            (
                "put all shapes of both images on the background of the first",
                "put the shapes of both images into the first image",
                "add all shapes of the second image to the first",
                "give the first image all shapes of the second image",
                "draw the shapes of both images on the background of the first image",
                "draw all shapes of the second image into the first image",
            ),
            (
                "put the shapes of the second image into the first image",
                "add the shapes of the second image to the first image",
            ),
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
