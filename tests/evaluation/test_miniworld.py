"""The evaluation's bookkeeping, with a model whose scores are known: it copies its first source."""

import json

from PIL import Image

from wemmu_jax.evaluation.miniworld import evaluate


class Copier:
    default_size = 64

    def generate(self, prompts, **_):
        return [Image.new("RGB", (64, 64), "white") for _ in prompts]

    def edit(self, image, instruction, **_):
        return image

    def reconstruct(self, image, **_):
        return image

    def compose(self, images, instruction, **_):
        return images[0]

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
