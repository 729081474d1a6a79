"""Grades pictures against what they were to show, by reading them back.

Prompts are graded as GenEval does; edits and compositions for the asked change and, apart from it, for all that
had to stay.
"""

import dataclasses

import numpy as np

from wemmu_jax.miniworld.compositions import Composition
from wemmu_jax.miniworld.edits import Edit
from wemmu_jax.miniworld.prompts import Need, Prompt
from wemmu_jax.miniworld.reader import Reading, Seen, read
from wemmu_jax.miniworld.scene import Scene

_POSITION_MARGIN = 0.1  # of the two objects' extents, taken off their distance; GenEval's
_ABSENT = "nothing"


@dataclasses.dataclass(frozen=True)
class Grade:
    """Whether a picture is right, and if not, why."""

    correct: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class SceneGrade(Grade):
    """`facts`: of all that the picture shows or was to show, the share that is as wanted."""

    facts: float


@dataclasses.dataclass(frozen=True)
class ChangeGrade(SceneGrade):
    """`changed`: all that was asked for is there. `kept`: everything else is as it was. `copied`: the picture
    shows the (first) source scene again."""

    changed: bool
    kept: bool
    copied: bool


def _grade(faults: list[str]) -> Grade:
    return Grade(not faults, "; ".join(faults) or "right")


def _scene_grade(faults: list[str], facts: set) -> dict:
    return {**dataclasses.asdict(_grade(faults)), "facts": 1 - len(faults) / len(facts)}


def stands(a: Seen, b: Seen, relation: str) -> bool:
    """GenEval's rule: the distance of the middles, less a margin on each axis, must point more than half its
    length in the relation's direction. Shares of width and height, so that the picture's aspect does not matter."""
    apart = np.subtract(a.middle, b.middle)
    margin = _POSITION_MARGIN * np.add(a.extent, b.extent)
    beyond = np.sign(apart) * np.maximum(np.abs(apart) - margin, 0)
    x, y = beyond / max(np.linalg.norm(apart), 1e-6)
    return {"left of": -x, "right of": x, "above": -y, "below": y}[relation] > 0.5


def _describe(need: Need) -> str:
    return f"{need.colour or 'any'} {need.shape}"


def score_prompt(image: np.ndarray, prompt: Prompt) -> Grade:
    """Grades uint8[H, W, 3] as GenEval does: every object that is asked for is there (more do no harm, except
    in counting), with its colour where one is named, and in the relation that is asked for."""
    wanted = prompt.requirement
    objects = read(image).objects
    found = [[item for item in objects if need.met_by(item)] for need in wanted.needs]
    faults = [
        f"wanted {need.count} of {_describe(need)}, found {len(items)}"
        for need, items in zip(wanted.needs, found, strict=True)
        if len(items) < need.count or (wanted.exact and len(items) > need.count)
    ]
    if wanted.relation and not faults:
        first, second = found
        if not any(stands(a, b, wanted.relation) for a in first for b in second):
            names = map(_describe, wanted.needs)
            faults.append(f" not {wanted.relation} ".join(names))
    return _grade(faults)


def _differences(found: dict, wanted: dict, facts: set) -> list[str]:
    """Where `found` differs from `wanted`, among `facts`."""
    return [
        f"{' '.join(fact)} is {found.get(fact, _ABSENT)}, not {wanted.get(fact, _ABSENT)}"
        for fact in sorted(facts)
        if found.get(fact, _ABSENT) != wanted.get(fact, _ABSENT)
    ]


def _score_change(reading: Reading, source: Scene, target: Scene) -> ChangeGrade:
    found, before, after = reading.attributes(), source.attributes(), target.attributes()
    facts = {*found, *before, *after}
    asked = {fact for fact in facts if before.get(fact, _ABSENT) != after.get(fact, _ABSENT)}
    missed = _differences(found, after, asked)
    spoiled = _differences(found, after, facts - asked)
    faults = [f"not changed: {fault}" for fault in missed]
    faults += [f"not kept: {fault}" for fault in spoiled]
    return ChangeGrade(
        **_scene_grade(faults, facts),
        changed=not missed,
        kept=not spoiled,
        copied=found == before,
    )


def score_edit(image: np.ndarray, edit: Edit) -> ChangeGrade:
    """Grades uint8[H, W, 3] as the answer to an edit."""
    return _score_change(read(image), edit.source, edit.target)


def score_composition(image: np.ndarray, composition: Composition) -> ChangeGrade:
    """Grades uint8[H, W, 3] as the answer to a composition; what had to stay is what the first source shows."""
    return _score_change(read(image), composition.sources[0], composition.target)


def score_reconstruction(image: np.ndarray, scene: Scene) -> SceneGrade:
    """Grades uint8[H, W, 3] as another picture of `scene`: every fact is the same, and there is nothing else."""
    found, wanted = read(image).attributes(), scene.attributes()
    facts = {*found, *wanted}
    return SceneGrade(**_scene_grade(_differences(found, wanted, facts), facts))
