"""Trials of the scorer: a scene that is right, one that is wrong in one fact, and pictures of them."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tests.miniworld.distort import blurred_and_noisy, near_miss
from tests.miniworld.reading import is_so
from wemmu_jax.miniworld.compositions import draw_composition
from wemmu_jax.miniworld.edits import draw_edit
from wemmu_jax.miniworld.prompts import CATEGORIES, draw_prompt
from wemmu_jax.miniworld.renderer import render
from wemmu_jax.miniworld.scene import Scene, random_scene
from wemmu_jax.miniworld.scorer import (
    Grade,
    score_composition,
    score_edit,
    score_prompt,
    score_reconstruction,
)

_SIZES = ((48, 48), (48, 72), (64, 64))


class Trial(NamedTuple):
    """A scene that is right, one that is wrong in one fact, and the scorer of pictures of them."""

    right: Scene
    wrong: Scene
    score: Callable[[np.ndarray], Grade]


def _meets(scene, requirement):
    """The requirement checked on the scene itself; None where a diagonal leaves the relation open."""
    groups = [
        [o for o in scene.objects if o.shape == need.shape and need.colour in (None, o.colour)]
        for need in requirement.needs
    ]
    for need, group in zip(requirement.needs, groups, strict=True):
        if len(group) < need.count or (requirement.exact and len(group) > need.count):
            return False
    if not requirement.relation:
        return True
    words = ("left of", "right of", "above", "below")
    so = {word for a in groups[0] for b in groups[1] for word in words if is_so(a, word, b)}
    return requirement.relation in so if so else None


def _prompt_trial(category):
    def draw(rng):
        prompt, scene = draw_prompt(rng, "held_out", category)
        wrong = scene
        while _meets(wrong, prompt.requirement) is not False:
            wrong = near_miss(scene, rng)
        return Trial(scene, wrong, lambda image: score_prompt(image, prompt))

    return draw


def _edit_trial(rng):
    edit = draw_edit(rng, "train")
    return Trial(edit.target, near_miss(edit.target, rng), lambda image: score_edit(image, edit))


def _composition_trial(rng):
    made = draw_composition(rng, "train")
    return Trial(
        made.target, near_miss(made.target, rng), lambda image: score_composition(image, made)
    )


def _reconstruction_trial(rng):
    scene = random_scene(rng)
    wrong = near_miss(scene, rng)
    return Trial(scene, wrong, lambda image: score_reconstruction(image, scene))


TRIALS = {f"prompt: {category}": _prompt_trial(category) for category in CATEGORIES} | {
    "edit": _edit_trial,
    "composition": _composition_trial,
    "reconstruction": _reconstruction_trial,
}


class Shares(NamedTuple):
    """Of pictures that are right, clean and spoiled, how many pass; and of near misses."""

    clean: float
    spoiled: float
    taken_in: float


def shares_of(trial: Callable[[np.random.Generator], Trial], count: int) -> Shares:
    """`count` trials, on the tiny preset's own size, a wide and a larger one in turn."""
    rng = np.random.default_rng(count)
    clean, spoiled, taken_in = 0, 0, 0
    for i in range(count):
        right, wrong, score = trial(rng)
        size = _SIZES[i % len(_SIZES)]
        picture = render(right, *size)
        clean += score(picture).correct
        spoiled += score(blurred_and_noisy(picture, rng)).correct
        taken_in += score(render(wrong, *size)).correct
    return Shares(clean / count, spoiled / count, taken_in / count)
