"""Questions about a scene: a colour, a shape, a number, a place, yes or no.

Answers are statements that repeat what was asked about and end with what was asked for: "the star is red", "red shapes
at the top left: one". What a number or a yes hangs on comes before it.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from wemmu_jax.miniworld.language import (
    NUMBERS,
    Phrases,
    at_place,
    listed,
    placed,
    plural,
    refer,
    with_article,
)
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
    """`text` asked about `scene`, its one right `answer`, and the words that were asked for, with which that ends."""

    kind: str
    text: str
    answer: str
    gist: str
    scene: Scene


# Words for the question's blanks, the gist, and the answer with {} where the gist goes.
Asked = tuple[dict[str, str], str, str]
Asker = Callable[[Scene, np.random.Generator], Asked | None]


def _without_saying(scene: Scene, item: Object, field: str) -> list[str]:
    """Ways of naming exactly this object that do not give its `field` away."""
    told = "colour" if field == "shape" else "shape"
    value = getattr(item, told)
    ways = [f"the shape {at_place(item.place)}"]
    if sum(getattr(o, told) == value for o in scene.objects) == 1:
        ways += [f"the {value}" if told == "shape" else f"the {value} shape"] * 2
    return ways


def _places(items: Sequence[Object]) -> str:
    """ "at the top left and in the centre"."""
    return listed(at_place(item.place) for item in items) if items else "nowhere"


def _colour(scene: Scene, rng: np.random.Generator) -> Asked:
    if rng.integers(6) == 0:
        return {"it": "the background"}, scene.background, "the background is {}"
    item = choose(rng, scene.objects)
    it = choose(rng, _without_saying(scene, item, "colour"))
    return {"it": it}, item.colour, f"{it} is {{}}"


def _shape(scene: Scene, rng: np.random.Generator) -> Asked:
    item = choose(rng, scene.objects)
    it = choose(rng, _without_saying(scene, item, "shape"))
    return {"it": it}, with_article(item.shape), f"{it} is {{}}"


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
    found, nouns = [item for item in scene.objects if matches(item)], plural(noun)
    return {"nouns": nouns}, NUMBERS[len(found)], f"{nouns} {_places(found)}: {{}}"


def _relation(scene: Scene, rng: np.random.Generator) -> Asked | None:
    """Half the answers are no, and then the opposite is true, so that no answer hangs on a diagonal."""
    if len(scene.objects) == 1:
        return None
    a, b = (scene.objects[i] for i in rng.permutation(len(scene.objects))[:2])
    word = relation(a, b)
    if word is None:
        return None
    yes = bool(rng.integers(2))
    it, that = refer(scene, a, rng), refer(scene, b, rng)
    asked = word if yes else _OPPOSITES[word]
    words = {"it": it, "relation": asked, "that": that}
    statement = f"{placed(it, a)}, {asked} {placed(that, b)}: {{}}"
    return words, "yes" if yes else "no", statement


def _place(scene: Scene, rng: np.random.Generator) -> Asked | None:
    item = choose(rng, scene.objects)
    words, place = refer(scene, item, rng), at_place(item.place)
    return None if place in words else ({"it": words}, place, f"{words} is {{}}")


def _existence(scene: Scene, rng: np.random.Generator) -> Asked | None:
    """Half the answers are no; two thirds of those name a shape and a colour of which one is there."""
    item, there = choose(rng, scene.objects), bool(rng.integers(2))
    shape, colour = choose(rng, SHAPES), choose(rng, COLOURS)
    name = choose(rng, (f"{item.colour} {shape}", f"{colour} {item.shape}", f"{colour} {shape}"))
    while name in {o.name for o in scene.objects}:
        name = f"{choose(rng, COLOURS)} {choose(rng, SHAPES)}"
    thing = with_article(item.name if there else name)
    found = [o for o in scene.objects if there and o.name == item.name]
    return {"thing": thing}, "yes" if there else "no", f"{thing} {_places(found)}: {{}}"


KINDS: dict[str, tuple[Asker, Phrases]] = {
    "colour": (
        _colour,
        Phrases(
            (
                "what colour is {it}?",
                "what is the colour of {it}?",
                "{it} is which colour?",
                "in the image, what colour is {it}?",
                "in the image, which colour is {it}?",
                "what is the colour of {it} in the image?",
            ),
            ("which colour is {it}?", "what colour is {it} in the image?"),
        ),
    ),
    "shape": (
        _shape,
        Phrases(
            (
                "what is {it}?",
                "what kind of shape is {it}?",
                "{it} is which kind of shape?",
                "in the image, what is {it}?",
                "which kind of shape is {it} in the image?",
                "in the image, what kind of shape is {it}?",
            ),
            ("which kind of shape is {it}?", "what kind of shape is {it} in the image?"),
        ),
    ),
    "count": (
        _count,
        Phrases(
            (
                "how many {nouns} are there?",
                "count the {nouns}",
                "the image has how many {nouns}?",
                "in the image, how many {nouns} are there?",
                "count the {nouns} in the image",
                "there are how many {nouns}?",
            ),
            ("how many {nouns} are in the image?", "in the image there are how many {nouns}?"),
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
            (
                "where is {it}?",
                "at which place is {it}?",
                "{it} is at which place?",
                "in the image, where is {it}?",
                "at which place is {it} in the image?",
                "{it} is where?",
            ),
            ("in the image, at which place is {it}?", "where is {it} in the image?"),
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
    words, gist, answer = asked
    text = phrases.draw(rng, split).format(**words)
    return Question(kind, text, answer.format(gist), gist, scene)


def draw_question(rng: np.random.Generator, split: Split, kind: str | None = None) -> Question:
    """A question of `kind` (any, if None) about a scene of `split`, in a wording of `split`."""
    kind = kind or choose(rng, KINDS)
    while True:
        question = ask(rng, split, draw_scene(rng, split), kind)
        if question:
            return question
