"""Words for scenes: names, references, captions. Everything said is true of its scene.

A caption mentions every object, and nothing that is not there; it may keep quiet about colours, places and
background. Each wording belongs to training or is held out, and held-out ones use no word that training lacks.
"""

import collections
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from wemmu_jax.miniworld.scene import Object, Scene, Split, choose, relation

NUMBERS = ("zero", "one", "two", "three", "four")


class Phrases(NamedTuple):
    """The wordings of one thing to say."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]

    @classmethod
    def crossed(cls, frames: Sequence[str], ends: Sequence[str]) -> "Phrases":
        """Every frame with every end in place of its `{end}`. A quarter is held out, so that training knows all frames,
        of which there is a multiple of four, and all ends, but of each frame not with all of them."""
        split: tuple[list[str], list[str]] = [], []
        for row, frame in enumerate(frames):
            for column, end in enumerate(ends):
                held_out = (row + column) % 4 == 0
                split[held_out].append(frame.replace("{end}", end))
        return cls(*map(tuple, split))

    def draw(self, rng: np.random.Generator, split: Split) -> str:
        """One wording of `split`."""
        return choose(rng, getattr(self, split))


def with_article(noun: str) -> str:
    """ "a red circle", "an orange star"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """ "red circles", "crosses"."""
    return noun + ("es" if noun.endswith("s") else "s")


def counted(noun: str, count: int) -> str:
    """ "a star", "three stars"."""
    return with_article(noun) if count == 1 else f"{NUMBERS[count]} {plural(noun)}"


def listed(parts: Iterable[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def at_place(place: str) -> str:
    """ "in the centre", "at the top left"."""
    return f"{'in' if place == 'centre' else 'at'} the {place}"


def refer(scene: Scene, item: Object, rng: np.random.Generator) -> str:
    """One of the ways of naming exactly this object of its scene: by its shape, colour, both, or with its place."""
    same_shape = sum(o.shape == item.shape for o in scene.objects)
    same_colour = sum(o.colour == item.colour for o in scene.objects)
    same_name = sum(o.name == item.name for o in scene.objects)
    ways = [f"the {item.name}"] * (same_name == 1)
    ways += [f"the {item.shape}"] * (same_shape == 1)
    ways += [f"the {item.colour} shape"] * (same_colour == 1)
    ways += [f"the shape {at_place(item.place)}"]
    if same_name > 1:
        ways += [f"the {item.name} {at_place(item.place)}"]
    return choose(rng, ways)


class Named(NamedTuple):
    """The words of an instruction that name one object of a picture, and where it is."""

    words: str
    place: str


def placed(words: str, item: Object) -> str:
    """`words` for the object, with its place unless they tell it: "the blue star at the top left"."""
    return words if item.place in words else f"{words} {at_place(item.place)}"


def count_objects(scene: Scene, noun: Callable[[Object], str]) -> str:
    """All objects, equal nouns counted together: "two red circles and a blue star"."""
    tally = collections.Counter(noun(item) for item in scene.objects)
    return listed(counted(name, count) for name, count in tally.items())


def place_objects(scene: Scene) -> str:
    """All objects with their places: "a red circle in the centre and a blue star at the top left"."""
    return listed(f"{with_article(o.name)} {at_place(o.place)}" for o in scene.objects)


class Related(NamedTuple):
    """ "`a` is `relation` `b`"; `relation` is one of `scene.relation`'s words."""

    a: Object
    relation: str
    b: Object

    def say(self, noun: Callable[[Object], str]) -> str:
        """ "a red circle left of a blue square"."""
        return f"{with_article(noun(self.a))} {self.relation} {with_article(noun(self.b))}"


def relate(scene: Scene, rng: np.random.Generator) -> Related | None:
    """How the two objects of a scene stand to each other, seen from either; None where that has no one word
    or the scene has not two objects."""
    if len(scene.objects) != 2:
        return None
    a, b = scene.objects if rng.integers(2) else scene.objects[::-1]
    word = relation(a, b)
    return Related(a, word, b) if word else None


def shape_of(item: Object) -> str:
    """The noun that keeps quiet about the colour."""
    return item.shape


def name_of(item: Object) -> str:
    """The noun with the colour."""
    return item.name


def _relation_by(
    noun: Callable[[Object], str],
) -> Callable[[Scene, np.random.Generator], str | None]:
    def say(scene: Scene, rng: np.random.Generator) -> str | None:
        related = relate(scene, rng)
        distinct = len({noun(item) for item in scene.objects}) == len(scene.objects)
        return related.say(noun) if related and distinct else None

    return say


class Family(NamedTuple):
    """Captions of one amount of detail. `say(scene, rng)` fills `{objects}`; None where it does not fit."""

    say: Callable[[Scene, np.random.Generator], str | None]
    phrases: Phrases


def _names(scene: Scene, rng: np.random.Generator) -> str:
    return count_objects(scene, name_of)


FAMILIES: dict[str, Family] = {
    "shapes": Family(
        lambda scene, rng: count_objects(scene, shape_of),
        Phrases(
            ("{objects}", "a picture of {objects}", "a drawing with {objects}"),
            ("a drawing of {objects}",),
        ),
    ),
    "colours": Family(
        _names,
        Phrases(
            ("{objects}", "an image of {objects}", "we see {objects}"),
            ("a picture with {objects}",),
        ),
    ),
    "colours and background": Family(
        _names,
        Phrases(
            (
                "{objects} on {background} background",
                "a picture of {objects} on {background} background",
                "{background} background with {objects}",
                "an image of {objects}, the background is {colour}",
                "on {background} background: {objects}",
                "an image with {objects} and {background} background",
            ),
            (
                "an image of {objects} on {background} background",
                "{objects}, and the background is {colour}",
            ),
        ),
    ),
    "places": Family(
        lambda scene, rng: place_objects(scene),
        Phrases(
            ("{objects}", "an image with {objects}", "an image of {objects}"),
            ("a picture with {objects}",),
        ),
    ),
    "places and background": Family(
        lambda scene, rng: place_objects(scene),
        Phrases(
            (
                "on {background} background, {objects}",
                "{background} background with {objects}",
                "a drawing on {background} background: {objects}",
            ),
            ("a picture on {background} background with {objects}",),
        ),
    ),
    "relation of shapes": Family(
        _relation_by(shape_of),
        Phrases(
            ("{objects}", "a picture of {objects}", "a drawing with {objects}"),
            ("a drawing of {objects}",),
        ),
    ),
    "relation": Family(
        _relation_by(name_of),
        Phrases(
            ("{objects}", "an image of {objects}", "there is {objects}"),
            ("a drawing of {objects}",),
        ),
    ),
    "relation and background": Family(
        _relation_by(name_of),
        Phrases(
            (
                "{objects} on {background} background",
                "a picture of {objects}, the background is {colour}",
                "on {background} background: {objects}",
            ),
            ("an image on {background} background: {objects}",),
        ),
    ),
}


def say(family: str, scene: Scene, objects: str, rng: np.random.Generator, split: Split) -> str:
    """A wording of `family` around what `objects` says."""
    text = FAMILIES[family].phrases.draw(rng, split)
    background = with_article(scene.background)
    return text.format(objects=objects, background=background, colour=scene.background)


def caption(scene: Scene, rng: np.random.Generator, split: Split) -> str:
    """A caption of a family that fits the scene, in a wording of `split`."""
    said = {name: family.say(scene, rng) for name, family in FAMILIES.items()}
    family, objects = choose(rng, [(name, text) for name, text in said.items() if text])
    return say(family, scene, objects, rng, split)


def complete_caption(scene: Scene, rng: np.random.Generator, split: Split) -> str:
    """A caption that tells all of a scene, in a wording of `split`."""
    return say("places and background", scene, place_objects(scene), rng, split)
