"""Questions about a scene with short answers: a colour, a shape, a number word, a place, yes or no."""

import dataclasses
from collections.abc import Callable

import numpy as np

from wemmu_jax.miniworld.language import NUMBERS, Phrases, at_place, plural, refer, with_article
from wemmu_jax.miniworld.scene import (
    COLOURS,
    SHAPES,
    Object,
    Scene,
    Split,
    choose,
    draw_scene,
    relation,
)

_OPPOSITES = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}


@dataclasses.dataclass(frozen=True)
class Question:
    """`text` asked about `scene`, and its one right `answer`."""

    kind: str
    text: str
    answer: str
    scene: Scene


Asked = tuple[dict[str, str], str]  # the words that fill the question's blanks, and the answer
Asker = Callable[[Scene, np.random.Generator], Asked | None]


def _without_saying(scene: Scene, item: Object, field: str) -> list[str]:
    """Ways of naming exactly this object that do not give its `field` away."""
    told = "colour" if field == "shape" else "shape"
    value = getattr(item, told)
    ways = [f"the shape {at_place(item.place)}"]
    if sum(getattr(o, told) == value for o in scene.objects) == 1:
        ways += [f"the {value}" if told == "shape" else f"the {value} shape"] * 2
    return ways


def _colour(scene: Scene, rng: np.random.Generator) -> Asked:
    if rng.integers(6) == 0:
        return {"it": "the background"}, scene.background
    item = choose(rng, scene.objects)
    return {"it": choose(rng, _without_saying(scene, item, "colour"))}, item.colour


def _shape(scene: Scene, rng: np.random.Generator) -> Asked:
    item = choose(rng, scene.objects)
    return {"it": choose(rng, _without_saying(scene, item, "shape"))}, item.shape


def _count(scene: Scene, rng: np.random.Generator) -> Asked:
    """Three in four ask for something that is there, so that zero is not the usual answer."""
    there = rng.integers(4) > 0
    item = choose(rng, scene.objects)
    shape = item.shape if there else choose(rng, SHAPES)
    colour = item.colour if there else choose(rng, COLOURS)
    noun, matches = choose(
        rng,
        [
            ("shape", lambda o: True),
            (shape, lambda o: o.shape == shape),
            (f"{colour} shape", lambda o: o.colour == colour),
            (f"{colour} {shape}", lambda o: o.shape == shape and o.colour == colour),
        ],
    )
    return {"nouns": plural(noun)}, NUMBERS[sum(map(matches, scene.objects))]


def _relation(scene: Scene, rng: np.random.Generator) -> Asked | None:
    """Half the answers are no, and then the opposite is true, so that no answer hangs on a diagonal."""
    if len(scene.objects) == 1:
        return None
    a, b = (scene.objects[i] for i in rng.permutation(len(scene.objects))[:2])
    word = relation(a, b)
    if word is None:
        return None
    yes = bool(rng.integers(2))
    words = {
        "it": refer(scene, a, rng),
        "relation": word if yes else _OPPOSITES[word],
        "that": refer(scene, b, rng),
    }
    return words, "yes" if yes else "no"


def _place(scene: Scene, rng: np.random.Generator) -> Asked | None:
    item = choose(rng, scene.objects)
    words, place = refer(scene, item, rng), at_place(item.place)
    return None if place in words else ({"it": words}, place)


def _existence(scene: Scene, rng: np.random.Generator) -> Asked | None:
    """Half the answers are no; two thirds of those name a shape and a colour of which one is there."""
    item = choose(rng, scene.objects)
    if rng.integers(2):
        return {"thing": with_article(item.name)}, "yes"
    shape, colour = choose(rng, SHAPES), choose(rng, COLOURS)
    name = choose(rng, (f"{item.colour} {shape}", f"{colour} {item.shape}", f"{colour} {shape}"))
    while name in {o.name for o in scene.objects}:
        name = f"{choose(rng, COLOURS)} {choose(rng, SHAPES)}"
    return {"thing": with_article(name)}, "no"


KINDS: dict[str, tuple[Asker, Phrases]] = {
    "colour": (
        _colour,
        Phrases(
            ("what colour is {it}?", "what is the colour of {it}?", "{it} is which colour?"),
            ("which colour is {it}?",),
        ),
    ),
    "shape": (
        _shape,
        Phrases(
            ("what is {it}?", "what kind of shape is {it}?", "{it} is which kind of shape?"),
            ("which kind of shape is {it}?",),
        ),
    ),
    "count": (
        _count,
        Phrases(
            ("how many {nouns} are there?", "count the {nouns}", "the image has how many {nouns}?"),
            ("how many {nouns} are in the image?",),
        ),
    ),
    "relation": (
        _relation,
        Phrases(
            (
                "is {it} {relation} {that}?",
                "in the image, is {it} {relation} {that}?",
                "{it} is {relation} {that}, yes or no?",
            ),
            ("is {it} {relation} {that}, yes or no?",),
        ),
    ),
    "place": (
        _place,
        Phrases(
            ("where is {it}?", "at which place is {it}?", "{it} is at which place?"),
            ("where in the image is {it}?",),
        ),
    ),
    "existence": (
        _existence,
        Phrases(
            (
                "is there {thing}?",
                "is {thing} in the image?",
                "there is {thing}, yes or no?",
            ),
            ("in the image, is there {thing}?",),
        ),
    ),
}


def ask(rng: np.random.Generator, split: Split, scene: Scene, kind: str) -> Question | None:
    """A question of `kind` about `scene`, in a wording of `split`; None where the scene has nothing to ask."""
    asker, phrases = KINDS[kind]
    asked = asker(scene, rng)
    if asked is None:
        return None
    words, answer = asked
    return Question(kind, phrases.draw(rng, split).format(**words), answer, scene)


def draw_question(rng: np.random.Generator, split: Split, kind: str | None = None) -> Question:
    """A question of `kind` (any, if None) about a scene of `split`, in a wording of `split`."""
    kind = kind or choose(rng, KINDS)
    while True:
        question = ask(rng, split, draw_scene(rng, split), kind)
        if question:
            return question
