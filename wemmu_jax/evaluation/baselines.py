"""What needs no model: answers that copy the source, ignore the words or belong to another request, graded alike."""

import collections
from collections.abc import Callable, Sequence

import numpy as np

from wemmu_jax.evaluation.miniworld import (
    CHAT,
    DRAWING_TASKS,
    SPLIT,
    Case,
    Scores,
    asked_questions,
    cases,
    show,
    with_overall,
)
from wemmu_jax.miniworld import edits, questions
from wemmu_jax.miniworld.scene import Scene, draw_scene

Answers = list[Scene | None]  # None: the baseline has no answer to such a request


def _copied(asked: Sequence[Case], rng: np.random.Generator) -> Answers:
    return [case.sources[0] if case.sources else None for case in asked]


def _blind(asked: Sequence[Case], rng: np.random.Generator) -> Answers:
    """Any scene for a caption; for an instruction some other change of the first source."""
    return [
        edits.change_of(case.sources[0], rng) if case.sources else draw_scene(rng, SPLIT)
        for case in asked
    ]


def _shuffled(asked: Sequence[Case], rng: np.random.Generator) -> Answers:
    targets = [case.target for case in asked]
    return targets[1:] + targets[:1]


BASELINES: dict[str, Callable[[Sequence[Case], np.random.Generator], Answers]] = {
    "source copied": _copied,
    "words ignored": _blind,
    "pictures shuffled": _shuffled,
}


def baselines(*, side: int, count: int, seed: int) -> dict[str, Scores]:
    """Baseline -> what `evaluate` would say of it on the same requests; pictures are drawn by the renderer.

    Of questions there is one baseline, which ignores the picture: the commonest gist of each kind.
    """
    scores: dict[str, Scores] = {name: {} for name in BASELINES}
    for task, drawing in DRAWING_TASKS.items():
        for name, baseline in BASELINES.items():
            rng = np.random.default_rng([seed, *map(ord, name)])
            shares = {}
            for kind in drawing.kinds:
                asked = cases(task, kind, count=count, seed=seed)
                answers = list(zip(asked, baseline(asked, rng), strict=True))
                if all(answer is not None for _, answer in answers):
                    right = [c.grade(np.asarray(show(a, side))).correct for c, a in answers]
                    shares[kind] = float(np.mean(right))
            if shares:
                scores[name][task] = with_overall(shares)
    scores["picture ignored"] = {CHAT: with_overall(_commonest_gist(count=count, seed=seed))}
    return scores


def _commonest_gist(*, count: int, seed: int) -> dict[str, float]:
    shares = {}
    for kind in questions.KINDS:
        right = [question.gist for question in asked_questions(kind, count=count, seed=seed)]
        (common, _), *_ = collections.Counter(right).most_common(1)
        shares[kind] = float(np.mean([gist == common for gist in right]))
    return shares
