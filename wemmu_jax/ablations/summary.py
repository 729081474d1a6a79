"""Sections of docs/miniworld.md about what comes with the package: how the backbones and the four stages were trained,
and what the model can do after stages 3 and 4, beside what needs no model."""

import json
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence

from wemmu_jax.ablations import figures
from wemmu_jax.ablations.report import table
from wemmu_jax.evaluation.baselines import baselines
from wemmu_jax.evaluation.miniworld import requests

STAGES = ("stage3", "stage4")
SIDE = 48
_TASKS = ("T2I", "Uncond", "Rec", "S-Edit", "M-Edit")
# What the project wants of the shipped checkpoint: task -> least overall score after stage 4.
WANTED = {"T2I": 0.85, "S-Edit": 0.80, "Rec": 0.97, "M-Edit": 0.70, "chat": 0.95}


def scores_section(folder: pathlib.Path) -> str:
    """A line for each task and kind: scores after either stage, baselines, what is wanted.

    Args:
      folder: with stage3/ and stage4/, each written by `wemmu evaluate miniworld`.

    Raises:
      FileNotFoundError: one of them is not there.
      ValueError: they were not graded on the requests of seed 0, and on as many.
    """
    found = {stage: json.loads((folder / stage / "scores.json").read_text()) for stage in STAGES}
    asked = {stage: _requests(folder / stage / "grades.jsonl") for stage in STAGES}
    count = 1 + max(number for _, _, number in asked["stage4"])
    if not asked["stage3"] == asked["stage4"] == _drawn(asked["stage4"], count):
        raise ValueError(
            f"{folder}: stages 3 and 4 and the baselines (seed 0) were not graded on the same requests"
        )
    beside = baselines(side=SIDE, count=count, seed=0)
    rows = []
    for task, kinds in found["stage4"].items():
        for kind in kinds:
            values = [found[stage][task][kind] for stage in STAGES]
            others = [scores.get(task, {}).get(kind, "") for scores in beside.values()]
            wanted = WANTED[task] if kind == "overall" else ""
            rows.append([task, kind, *values, *others, wanted])
    heads = ["task", "kind", "after stage 3", "after stage 4", *beside, "wanted"]
    said = (
        f"{count} held-out requests of each kind, scenes and wordings that training never saw, drawn with the model's "
        "own scales of guidance. Made by `wemmu evaluate miniworld` and `wemmu miniworld report scores`; baselines are "
        "graded on the same requests."
    )
    return f"{table(heads, rows)}\n\n{said}"


def _requests(grades: pathlib.Path) -> dict[tuple[str, str, int], str]:
    """(task, kind, number) -> what was asked for."""
    rows = map(json.loads, grades.read_text().splitlines())
    return {(row["task"], row["kind"], row["number"]): row["text"] for row in rows}


def _drawn(places: Iterable[tuple[str, str, int]], count: int) -> dict[tuple[str, str, int], str]:
    """The first `count` requests of seed 0 of each task and kind."""
    return {
        (task, kind, number): one.text
        for task, kind in sorted({place[:2] for place in places})
        for number, one in enumerate(requests(task, kind, count=count, seed=0))
    }


def backbones_section(folder: pathlib.Path, pictures: pathlib.Path) -> str:
    """The table of the model card that `wemmu miniworld pretrain` writes, and how the scores came about.

    Args:
      folder: with README.md, the card, and a training.json for each backbone.
      pictures: where the figures go, beside the page.

    Raises:
      FileNotFoundError, ValueError: there is no card, or it has no table.
    """
    card = folder / "README.md"
    lines = [line for line in card.read_text().splitlines() if line.startswith("|")]
    if len(lines) < 3:
        raise ValueError(f"{card}: no table of backbones")
    shown = []
    for file in sorted(folder.rglob("training.json")):
        one = json.loads(file.read_text())
        scores = {
            name: zip(*points, strict=True) for name, points in one["curve"].items() if points
        }
        shares = {
            name: (steps, values) for name, (steps, values) in scores.items() if max(values) <= 1
        }
        label = f"{one['backbone']}: held-out share right"
        path = pictures / f"backbone-{one['backbone']}.png"
        shown.append(_figure(path, shares, label, scale="linear"))
    return "\n".join([*lines, "", *shown])


def stages_section(folder: pathlib.Path, pictures: pathlib.Path) -> str:
    """A line for each of the workdirs FOLDER/stage1 to FOLDER/stage4, and their validation losses one after the other.

    Raises:
      FileNotFoundError: one of them has no metrics.
    """
    rows, begun, losses = [], 0, {}
    for stage in ("stage1", "stage2", "stage3", "stage4"):
        lines = (folder / stage / "metrics.jsonl").read_text().splitlines()
        found = {}
        for line in map(json.loads, lines):
            found.setdefault(line["step"], {}).update(line)
        batch = json.loads((folder / stage / "config.json").read_text())["batch"]
        samples = max(found) * batch["rows"] * batch["micro_batches"]
        speed = statistics.median(_values(found, "train/samples_per_second").values())
        row = [
            stage,
            f"{max(found):,}",
            f"{samples:,}",
            f"{speed:.0f}",
            f"{samples / speed / 60:.0f}",
        ]
        for task in _TASKS:
            values = _values(found, f"validation/{task}")
            row.append(values[max(values)] if values else "")
            points = losses.setdefault(task, ([], []))
            points[0].extend(begun + step for step in sorted(values))
            points[1].extend(values[step] for step in sorted(values))
        begun += max(found)
        rows.append(row)
    heads = ["stage", "optimizer steps", "samples", "samples a second", "minutes", *_TASKS]
    label = "validation loss; stages 1 to 4"
    lines = {task: points for task, points in losses.items() if points[0]}
    shown = _figure(pictures / "stages.png", lines, label, scale="log")
    said = (
        "The last columns are flow matching losses of held-out samples at the end of a stage; in each the optimizer's "
        "rate falls to 0. Made by `launch/stages.sh configs/tiny.py` and `wemmu miniworld report stages`."
    )
    return f"{table(heads, rows)}\n\n{shown}\n\n{said}"


def _values(found: Mapping[int, Mapping], field: str) -> dict[int, float]:
    return {step: row[field] for step, row in found.items() if field in row}


def _figure(path: pathlib.Path, lines: Mapping[str, Sequence], label: str, scale: str) -> str:
    figures.curves(path, lines, label=label, scale=scale)
    return f"![{path.stem}]({path.parent.name}/{path.name})"
