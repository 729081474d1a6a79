"""Grades a model on held-out miniworld requests: pictures by the scorer, answers by their words."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from wemmu_jax.inference.pipeline import WeMMU
from wemmu_jax.miniworld import edits, prompts, questions
from wemmu_jax.miniworld.compositions import draw_composition
from wemmu_jax.miniworld.edits import draw_edit
from wemmu_jax.miniworld.prompts import draw_prompt
from wemmu_jax.miniworld.questions import draw_question
from wemmu_jax.miniworld.renderer import render
from wemmu_jax.miniworld.scene import draw_scene
from wemmu_jax.miniworld.scorer import (
    score_composition,
    score_edit,
    score_prompt,
    score_reconstruction,
)

SPLIT = "held_out"
Scores = dict[str, dict[str, float]]


def evaluate(model: WeMMU, out: str | pathlib.Path, *, count: int, seed: int, steps: int) -> Scores:
    """Share of right answers for each task and kind.

    Args:
      model: what is graded.
      out: pictures go to OUT/TASK/KIND-NUMBER.png, grades with reasons to OUT/grades.jsonl, the table to
        OUT/scores.json.
      count: requests of each kind.
      seed: of the requests and of the pictures.
      steps: of the solver.

    Returns:
      task -> kind -> share in [0, 1]; each task has an "overall", the mean over its kinds.
    """
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    grader = _Grader(model, out, seed, steps)
    scores: Scores = {}
    with (out / "grades.jsonl").open("w") as lines:
        for task, (kinds, grade) in _TASKS.items():
            for kind in kinds:
                grades = list(grade(grader, kind, count))
                for number, one in enumerate(grades):
                    row = {"task": task, "kind": kind, "number": number, **one}
                    lines.write(json.dumps(row) + "\n")
                scores.setdefault(task, {})[kind] = float(np.mean([g["correct"] for g in grades]))
            scores[task]["overall"] = float(np.mean(list(scores[task].values())))
    (out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    return scores


class _Grader:
    """One method for each task; they yield a grade for each request."""

    def __init__(self, model: WeMMU, out: pathlib.Path, seed: int, steps: int):
        self._model, self._out, self._seed, self._steps = model, out, seed, steps
        self._side = model.default_size

    def _requests(self, task: str, kind: str, count: int) -> Iterator[np.random.Generator]:
        words = [ord(letter) for letter in f"{task}/{kind}"]
        for number in range(count):
            yield np.random.default_rng([self._seed, number, *words])

    def _save(self, picture: Image.Image, task: str, kind: str, number: int) -> np.ndarray:
        path = self._out / task / f"{kind.replace(' ', '-')}-{number:04}.png"
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
        return np.asarray(picture)

    def _show(self, scene) -> Image.Image:
        return Image.fromarray(render(scene, self._side, self._side))

    def text_to_image(self, kind: str, count: int) -> Iterator[dict]:
        """GenEval's six categories."""
        drawn = [draw_prompt(rng, SPLIT, kind)[0] for rng in self._requests("T2I", kind, count)]
        pictures = self._model.generate(
            [prompt.text for prompt in drawn], seed=self._seed, steps=self._steps
        )
        for number, (prompt, picture) in enumerate(zip(drawn, pictures, strict=True)):
            grade = score_prompt(self._save(picture, "T2I", kind, number), prompt)
            yield {"text": prompt.text, "correct": grade.correct, "reason": grade.reason}

    def edit(self, kind: str, count: int) -> Iterator[dict]:
        """Single edits: the asked change, and everything else kept."""
        for number, rng in enumerate(self._requests("S-Edit", kind, count)):
            request = draw_edit(rng, SPLIT, kind)
            picture = self._model.edit(
                self._show(request.source),
                request.instruction,
                seed=self._seed + number,
                steps=self._steps,
            )
            grade = score_edit(self._save(picture, "S-Edit", kind, number), request)
            yield {"text": request.instruction, **dataclasses.asdict(grade)}

    def reconstruct(self, kind: str, count: int) -> Iterator[dict]:
        """The scene kept."""
        for number, rng in enumerate(self._requests("Rec", kind, count)):
            scene = draw_scene(rng, SPLIT)
            picture = self._model.reconstruct(
                self._show(scene), seed=self._seed + number, steps=self._steps
            )
            grade = score_reconstruction(self._save(picture, "Rec", kind, number), scene)
            yield {"correct": grade.correct, "reason": grade.reason}

    def compose(self, kind: str, count: int) -> Iterator[dict]:
        """Two scenes into one."""
        for number, rng in enumerate(self._requests("M-Edit", kind, count)):
            request = draw_composition(rng, SPLIT)
            picture = self._model.compose(
                [self._show(scene) for scene in request.sources],
                request.instruction,
                seed=self._seed + number,
                steps=self._steps,
            )
            grade = score_composition(self._save(picture, "M-Edit", kind, number), request)
            yield {"text": request.instruction, **dataclasses.asdict(grade)}

    def chat(self, kind: str, count: int) -> Iterator[dict]:
        """The one right answer, but for case, blanks and a full stop."""
        for rng in self._requests("chat", kind, count):
            question = draw_question(rng, SPLIT, kind)
            answer = self._model.chat(
                question.text, images=[self._show(question.scene)], max_new_tokens=8
            )
            right = answer.strip().strip(".").lower() == question.answer.lower()
            yield {"text": question.text, "correct": right, "reason": answer}


# task -> (its kinds, what grades them)
_TASKS: dict[str, tuple[tuple[str, ...], Callable[[_Grader, str, int], Iterator[dict]]]] = {
    "T2I": (tuple(prompts.CATEGORIES), _Grader.text_to_image),
    "S-Edit": (tuple(edits.KINDS), _Grader.edit),
    "Rec": (("scene",), _Grader.reconstruct),
    "M-Edit": (("two scenes",), _Grader.compose),
    "chat": (tuple(questions.KINDS), _Grader.chat),
}
