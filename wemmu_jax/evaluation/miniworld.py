"""Grades a model on held-out miniworld requests: pictures by the scorer, answers by their words."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from PIL import Image

from wemmu_jax.data.prompts import RECONSTRUCTION_PROMPT
from wemmu_jax.diffusion.guidance import Guidance, Scales, edit_guidance, request_guidance
from wemmu_jax.files import replacing, write_json
from wemmu_jax.inference.pipeline import WeMMU
from wemmu_jax.inference.requests import DrawingRequest
from wemmu_jax.miniworld import compositions, edits, prompts, questions, scorer
from wemmu_jax.miniworld.renderer import render
from wemmu_jax.miniworld.scene import Scene, draw_scene

SPLIT = "held_out"
Scores = dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A request for a picture, and who grades the answer.

    Attributes:
      text: what is asked for.
      sources: scenes that it is about.
      target: a scene that is right.
      grade: uint8[H, W, 3] -> `scorer.Grade`.
    """

    text: str
    sources: tuple[Scene, ...]
    target: Scene
    grade: Callable[[np.ndarray], scorer.Grade]


def _caption_case(rng: np.random.Generator, kind: str) -> Case:
    prompt, scene = prompts.draw_prompt(rng, SPLIT, kind)
    grade = functools.partial(scorer.score_prompt, prompt=prompt)
    return Case(prompt.text, (), scene, grade)


def _edit_case(rng: np.random.Generator, kind: str) -> Case:
    edit = edits.draw_edit(rng, SPLIT, kind)
    grade = functools.partial(scorer.score_edit, edit=edit)
    return Case(edit.instruction, (edit.source,), edit.target, grade)


def _reconstruction_case(rng: np.random.Generator, kind: str) -> Case:
    scene = draw_scene(rng, SPLIT)
    grade = functools.partial(scorer.score_reconstruction, scene=scene)
    return Case(RECONSTRUCTION_PROMPT, (scene,), scene, grade)


def _composition_case(rng: np.random.Generator, kind: str) -> Case:
    asked = compositions.draw_composition(rng, SPLIT, kind)
    grade = functools.partial(scorer.score_composition, composition=asked)
    return Case(asked.instruction, asked.sources, asked.target, grade)


@dataclasses.dataclass(frozen=True)
class DrawingTask:
    """The kinds of a task, how one of its cases is drawn from a random stream, and its guidance by a model's scales."""

    kinds: Sequence[str]
    case: Callable[[np.random.Generator, str], Case]
    guidance: Callable[[Scales], Guidance]


DRAWING_TASKS = {
    "T2I": DrawingTask(
        tuple(prompts.CATEGORIES), _caption_case, lambda s: request_guidance(s.generate)
    ),
    "S-Edit": DrawingTask(
        tuple(edits.KINDS), _edit_case, lambda s: edit_guidance(image=s.image, edit=s.edit)
    ),
    "Rec": DrawingTask(("scene",), _reconstruction_case, lambda s: request_guidance(s.reconstruct)),
    "M-Edit": DrawingTask(
        tuple(compositions.KINDS), _composition_case, lambda s: request_guidance(s.compose)
    ),
}
CHAT = "chat"
TASKS = (*DRAWING_TASKS, CHAT)


def streams(task: str, kind: str, *, count: int, seed: int) -> Iterable[np.random.Generator]:
    """A random stream for each request: the first of 100 are the first of 10."""
    words = [ord(letter) for letter in f"{task}/{kind}"]
    for number in range(count):
        yield np.random.default_rng([seed, number, *words])


def cases(task: str, kind: str, *, count: int, seed: int) -> list[Case]:
    """The requests of one kind of a drawing task."""
    return [
        DRAWING_TASKS[task].case(rng, kind) for rng in streams(task, kind, count=count, seed=seed)
    ]


def asked_questions(kind: str, *, count: int, seed: int) -> list[questions.Question]:
    """The requests of one kind of question."""
    return [
        questions.draw_question(rng, SPLIT, kind)
        for rng in streams(CHAT, kind, count=count, seed=seed)
    ]


def requests(
    task: str, kind: str, *, count: int, seed: int
) -> list[Case] | list[questions.Question]:
    """What is asked for in one kind of any task; each has a `text`."""
    asked = asked_questions if task == CHAT else functools.partial(cases, task)
    return asked(kind, count=count, seed=seed)


def answers_question(answer: str, gist: str) -> bool:
    """Whether the answer ends with what was asked for, as right ones do; case, blanks and a full stop do not count."""
    said = answer.strip().strip(".").lower()
    return f" {said}".endswith(f" {gist}")


def evaluate(
    model: WeMMU,
    out: str | pathlib.Path,
    *,
    count: int,
    seed: int,
    steps: int,
    tasks: Sequence[str] = TASKS,
) -> Scores:
    """Share of right answers for each task and kind.

    Args:
      model: what is graded.
      out: pictures go to OUT/TASK/KIND-NUMBER.png, grades with reasons to OUT/grades.jsonl, the table to
        OUT/scores.json.
      count: requests of each kind.
      seed: of the requests and of the pictures.
      steps: of the solver.
      tasks: which of `TASKS`.

    Returns:
      task -> kind -> share in [0, 1]; each task has an "overall", the mean over its kinds.
    """
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    scores: Scores = {}
    # Those who look for grades find all of them, and the scores beside.
    with replacing(out / "grades.jsonl") as partial, partial.open("w") as lines:
        for task in tasks:
            kinds = tuple(questions.KINDS) if task == CHAT else DRAWING_TASKS[task].kinds
            for kind in kinds:
                if task == CHAT:
                    grades = _answer(model, kind, count=count, seed=seed)
                else:
                    grades = _draw(model, out, task, kind, count=count, seed=seed, steps=steps)
                for number, grade in enumerate(grades):
                    row = {"task": task, "kind": kind, "number": number, **grade}
                    lines.write(json.dumps(row) + "\n")
                scores.setdefault(task, {})[kind] = float(np.mean([g["correct"] for g in grades]))
            scores[task] = with_overall(scores[task])
        write_json(out / "scores.json", scores)
    return scores


def with_overall(kinds: dict[str, float]) -> dict[str, float]:
    """The shares of a task's kinds, and their mean."""
    return {**kinds, "overall": float(np.mean(list(kinds.values())))}


def show(scene: Scene, side: int) -> Image.Image:
    """The scene as a square picture."""
    return Image.fromarray(render(scene, side, side))


def _draw(
    model: WeMMU, out: pathlib.Path, task: str, kind: str, *, count: int, seed: int, steps: int
) -> list[dict]:
    side = model.default_size
    asked = cases(task, kind, count=count, seed=seed)
    pictures = model.draw(
        [DrawingRequest(c.text, tuple(show(s, side) for s in c.sources)) for c in asked],
        size=(side, side),
        guidance=DRAWING_TASKS[task].guidance(model.scales),
        seed=seed,
        steps=steps,
    )
    (out / task).mkdir(exist_ok=True)
    grades = []
    for number, (case, picture) in enumerate(zip(asked, pictures, strict=True)):
        picture.save(out / task / f"{kind.replace(' ', '-')}-{number:04}.png")
        grade = dataclasses.asdict(case.grade(np.asarray(picture)))
        if case.sources:  # where one picture is meant; a caption fits many
            grade["psnr"] = psnr(np.asarray(picture), np.asarray(show(case.target, side)))
        grades.append({"text": case.text, **grade})
    return grades


def psnr(picture: np.ndarray, wanted: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures; at most 60, which equal ones get."""
    error = np.mean((picture.astype(np.float64) - wanted) ** 2)
    return float(10 * np.log10(255**2 / max(error, 255**2 / 1e6)))


def _answer(model: WeMMU, kind: str, *, count: int, seed: int) -> list[dict]:
    grades = []
    for asked in asked_questions(kind, count=count, seed=seed):
        picture = show(asked.scene, model.default_size)
        answer = model.chat(asked.text, images=[picture], max_new_tokens=32)
        right = answers_question(answer, asked.gist)
        grades.append({"text": asked.text, "correct": right, "reason": answer})
    return grades
