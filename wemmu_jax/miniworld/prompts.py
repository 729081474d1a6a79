"""GenEval's six kinds of prompt on miniworld and one of our own, each with its requirement in machine-readable form."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from wemmu_jax.miniworld.language import Related, count_objects, name_of, relate, say, shape_of
from wemmu_jax.miniworld.scene import Object, Scene, Split, choose, draw_scene


class Need(NamedTuple):
    """`count` objects of a shape, and of a colour where one is named."""

    count: int
    shape: str
    colour: str | None = None

    def met_by(self, item) -> bool:
        """Whether anything with a `shape` and a `colour` is one of the objects needed."""
        return item.shape == self.shape and self.colour in (None, item.colour)


@dataclasses.dataclass(frozen=True)
class Requirement:
    """What a picture must show: at least the needs (exactly, if `exact`), and an object of the first need
    standing `relation` to one of the second."""

    needs: tuple[Need, ...]
    exact: bool = False
    relation: str | None = None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text to draw from and what the drawing is graded by."""

    text: str
    category: str
    requirement: Requirement


class _Category(NamedTuple):
    fits: Callable[[Scene], bool]
    noun: Callable[[Object], str]
    family: str


def _distinct(scene: Scene, *fields: str) -> bool:
    return all(
        len({getattr(item, field) for item in scene.objects}) == len(scene.objects)
        for field in fields
    )


_CATEGORIES: dict[str, _Category] = {
    "single object": _Category(lambda s: len(s.objects) == 1, shape_of, "shapes"),
    "two objects": _Category(
        lambda s: len(s.objects) == 2 and _distinct(s, "shape"), shape_of, "shapes"
    ),
    "counting": _Category(
        lambda s: len(s.objects) > 1 and len({o.shape for o in s.objects}) == 1, shape_of, "shapes"
    ),
    "colours": _Category(lambda s: len(s.objects) == 1, name_of, "colours"),
    "position": _Category(
        lambda s: len(s.objects) == 2 and _distinct(s, "shape"), shape_of, "relation of shapes"
    ),
    "colour attribution": _Category(
        lambda s: len(s.objects) == 2 and _distinct(s, "shape", "colour"), name_of, "colours"
    ),
}
CATEGORIES = tuple(_CATEGORIES)
# Not GenEval's: "a red circle left of a blue square".
_CATEGORIES["position of colours"] = _Category(
    lambda s: len(s.objects) == 2 and _distinct(s, "name"), name_of, "relation"
)


def _requirement(category: str, scene: Scene, related: Related | None) -> Requirement:
    if category == "counting":
        return Requirement((Need(len(scene.objects), scene.objects[0].shape),), exact=True)
    objects = (related.a, related.b) if related else scene.objects
    coloured = _CATEGORIES[category].noun is name_of
    needs = tuple(Need(1, item.shape, item.colour if coloured else None) for item in objects)
    return Requirement(needs, relation=related.relation if related else None)


def draw_prompt(
    rng: np.random.Generator, split: Split, category: str | None = None
) -> tuple[Prompt, Scene]:
    """A prompt of `category` (any of `CATEGORIES`, if None; or "position of colours") in a wording of `split`, and a
    scene of `split` that meets it."""
    category = category or choose(rng, CATEGORIES)
    fits, noun, family = _CATEGORIES[category]
    relates = family.startswith("relation")
    while True:
        scene = draw_scene(rng, split)
        related = relate(scene, rng) if relates else None
        if fits(scene) and (related or not relates):
            break
    objects = related.say(noun) if related else count_objects(scene, noun)
    text = say(family, scene, objects, rng, split)
    return Prompt(text, category, _requirement(category, scene, related)), scene
