"""Scenes of miniworld: what a picture shows, without a pixel.

A scene is a background and one to four objects, each with a shape, a colour and a place of a 3x3 grid that no
other object holds. Objects stand a little off the middle of their place (`offset`), which nothing may depend on.
"""

import dataclasses
import hashlib
from typing import Literal, NamedTuple

import numpy as np

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")

# Chosen for their distances in RGB: an object's colour is at least 100 from every background and from every
# other object's, backgrounds are at least 75 apart.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (212, 22, 48),
    "green": (20, 185, 80),
    "blue": (45, 80, 230),
    "yellow": (255, 235, 50),
    "orange": (250, 122, 20),
    "purple": (155, 45, 185),
    "cyan": (40, 205, 225),
    "pink": (255, 105, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "grey": (140, 140, 140),
    "black": (20, 20, 20),
    "beige": (225, 205, 165),
    "navy": (30, 40, 95),
    "olive": (95, 100, 55),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart")
PLACES = (
    "top left",
    "top centre",
    "top right",
    "middle left",
    "centre",
    "middle right",
    "bottom left",
    "bottom centre",
    "bottom right",
)
GRID = 3
MAX_OBJECTS = 4
MAX_OFFSET = 0.012
HELD_OUT_SHARE = 10  # one canonical form in ten
_COUNTS = (1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 4, 4, 4)
_SAME_SHAPE, _SAME_COLOUR = 0.3, 0.5


class Cell(NamedTuple):
    """Row and column of a place, from the top left."""

    row: int
    column: int


def cell(place: str) -> Cell:
    """The cell of a place's name."""
    return Cell(*divmod(PLACES.index(place), GRID))


@dataclasses.dataclass(frozen=True)
class Object:
    """One object. `offset` (x, y) from the middle of its place, in units of the picture's shorter side."""

    shape: str
    colour: str
    place: str
    offset: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self):
        for field, known in (("shape", SHAPES), ("colour", COLOURS), ("place", PLACES)):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"object {field}: expected one of {', '.join(known)}, found {getattr(self, field)!r}"
                )

    @property
    def name(self) -> str:
        """Colour and shape: "red circle"."""
        return f"{self.colour} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """A background and its objects, kept in the order of their places. Raises ValueError for unknown names,
    for no object or more than four, and for two objects at one place."""

    background: str
    objects: tuple[Object, ...]

    def __post_init__(self):
        ordered = tuple(sorted(self.objects, key=lambda item: PLACES.index(item.place)))
        object.__setattr__(self, "objects", ordered)
        if self.background not in BACKGROUNDS:
            raise ValueError(
                f"scene background: expected one of {', '.join(BACKGROUNDS)}, found {self.background!r}"
            )
        if not 1 <= len(ordered) <= MAX_OBJECTS:
            raise ValueError(f"scene: expected 1 to {MAX_OBJECTS} objects, found {len(ordered)}")
        if len({item.place for item in ordered}) < len(ordered):
            raise ValueError(f"scene: two objects at one place among {[o.place for o in ordered]}")

    @property
    def canonical(self) -> str:
        """What the scene is, as one line; the same for any offsets and any order of the objects."""
        return "; ".join([self.background, *(f"{o.place}: {o.name}" for o in self.objects)])

    @property
    def split(self) -> Split:
        """The split that this scene belongs to, whatever the seed that drew it."""
        digest = hashlib.blake2b(self.canonical.encode(), digest_size=8).digest()
        held_out = int.from_bytes(digest, "little") % HELD_OUT_SHARE == 0
        return "held_out" if held_out else "train"

    @property
    def free_places(self) -> tuple[str, ...]:
        """Places without an object."""
        taken = {item.place for item in self.objects}
        return tuple(place for place in PLACES if place not in taken)

    def attributes(self) -> dict[tuple[str, str], str]:
        """The scene as facts, (place, "shape" or "colour") -> name and ("background", "colour") -> name."""
        facts = {("background", "colour"): self.background}
        for item in self.objects:
            facts[item.place, "shape"] = item.shape
            facts[item.place, "colour"] = item.colour
        return facts

    def add(self, *items: Object) -> "Scene":
        """The scene with these objects too."""
        return Scene(self.background, (*self.objects, *items))

    def exchange(self, old: Object, new: Object) -> "Scene":
        """The scene with `new` instead of its object `old`."""
        return Scene(self.background, tuple(new if o is old else o for o in self.objects))

    def without(self, item: Object) -> "Scene":
        """The scene without its object `item`."""
        return Scene(self.background, tuple(o for o in self.objects if o is not item))


def relation(a: Object, b: Object) -> str | None:
    """How a stands to b: "left of", "right of", "above" or "below", along the axis on which they are farther
    apart; None on a diagonal, where two words would be equally true."""
    (row_a, column_a), (row_b, column_b) = cell(a.place), cell(b.place)
    down, across = row_b - row_a, column_b - column_a
    if abs(across) > abs(down):
        return "left of" if across > 0 else "right of"
    if abs(down) > abs(across):
        return "above" if down > 0 else "below"
    return None


def choose(rng: np.random.Generator, options):
    """One of `options`, all equally likely (several times faster than `Generator.choice`)."""
    options = tuple(options)
    return options[rng.integers(len(options))]


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene of either split. Three in ten repeat one shape, half of those in one colour, so that there is
    something to count."""
    count = choose(rng, _COUNTS)
    shapes = [choose(rng, SHAPES) for _ in range(count)]
    colours = [choose(rng, COLOURS) for _ in range(count)]
    if rng.random() < _SAME_SHAPE:
        shapes = shapes[:1] * count
        if rng.random() < _SAME_COLOUR:
            colours = colours[:1] * count
    places = rng.permutation(len(PLACES))[:count]
    offsets = rng.uniform(-MAX_OFFSET, MAX_OFFSET, (count, 2)).tolist()
    objects = (
        Object(shape, colour, PLACES[place], tuple(offset))
        for shape, colour, place, offset in zip(shapes, colours, places, offsets, strict=True)
    )
    return Scene(choose(rng, BACKGROUNDS), tuple(objects))


def draw_scene(rng: np.random.Generator, split: Split) -> Scene:
    """A scene of `split`."""
    while (scene := random_scene(rng)).split != split:
        pass
    return scene
