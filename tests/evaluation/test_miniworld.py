"""The evaluation's bookkeeping, with models whose scores are known, and what needs no model at all."""

import json

import numpy as np
import pytest
from PIL import Image

from wemmu_jax.diffusion.guidance import PAPER
from wemmu_jax.evaluation.baselines import baselines
from wemmu_jax.evaluation.miniworld import (
    DRAWING_TASKS,
    TASKS,
    answers_question,
    cases,
    evaluate,
    show,
)


class Copier:
    """Draws the first source again, or nothing."""

    default_size = 64
    scales = PAPER

    def draw(self, requests, *, size, guidance, seed, steps):
        blank = Image.new("RGB", size[::-1], "white")
        return [request.sources[0] if request.sources else blank for request in requests]

    def chat(self, question, **_):
        return "no idea"


def test_a_copier_reconstructs_and_does_nothing_else(tmp_path):
    scores = evaluate(Copier(), tmp_path, count=2, seed=0, steps=1)
    overall = {task: kinds["overall"] for task, kinds in scores.items()}
    assert overall == {"T2I": 0.0, "S-Edit": 0.0, "Rec": 1.0, "M-Edit": 0.0, "chat": 0.0}
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    grades = [json.loads(line) for line in (tmp_path / "grades.jsonl").read_text().splitlines()]
    assert len(grades) == 2 * sum(len(kinds) - 1 for kinds in scores.values())
    changes = [grade for grade in grades if grade["task"] in ("S-Edit", "M-Edit")]
    assert changes and all(grade["copied"] and not grade["changed"] for grade in changes)
    assert len(list((tmp_path / "S-Edit").glob("*.png"))) == 2 * (len(scores["S-Edit"]) - 1)


def test_grades_are_there_when_all_are(tmp_path):
    class Stopped(Copier):
        def chat(self, question, **_):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(Stopped(), tmp_path, count=1, seed=0, steps=1)
    assert not (tmp_path / "grades.jsonl").exists() and not (tmp_path / "scores.json").exists()


def test_only_the_tasks_that_are_asked_for(tmp_path):
    scores = evaluate(Copier(), tmp_path, count=1, seed=0, steps=1, tasks=("Rec",))
    assert scores == {"Rec": {"scene": 1.0, "overall": 1.0}}


@pytest.mark.parametrize("task", DRAWING_TASKS)
def test_a_rendered_target_is_right(task):
    for kind in DRAWING_TASKS[task].kinds:
        for case in cases(task, kind, count=3, seed=5):
            grade = case.grade(np.asarray(show(case.target, 48)))
            assert grade.correct, (kind, case.text, grade.reason)


def test_the_first_requests_do_not_depend_on_their_number():
    few, many = (cases("S-Edit", "move", count=count, seed=1) for count in (2, 4))
    assert [c.text for c in few] == [c.text for c in many[:2]]


def test_baselines():
    found = baselines(side=48, count=6, seed=0)
    assert {task for scores in found.values() for task in scores} == set(TASKS)
    assert found["source copied"]["Rec"]["overall"] == 1.0
    assert found["source copied"]["S-Edit"]["overall"] == 0.0
    assert "T2I" not in found["source copied"]
    assert found["pictures shuffled"]["S-Edit"]["overall"] < 0.2
    assert found["words ignored"]["S-Edit"]["overall"] < 0.3
    assert 0.1 < found["picture ignored"]["chat"]["overall"] < 0.8


@pytest.mark.parametrize(
    ("answer", "gist", "right"),
    [
        ("the star is red", "red", True),
        (" The star is RED. ", "red", True),
        ("red", "red", True),
        ("the star is blue", "red", False),
        ("the red star is blue", "red", False),
        ("a discoloured", "red", False),
        ("red stars nowhere: zero", "zero", True),
        ("the star is at the top left", "at the top right", False),
        ("", "red", False),
    ],
)
def test_an_answer_is_right_by_its_end(answer, gist, right):
    assert answers_question(answer, gist) == right
