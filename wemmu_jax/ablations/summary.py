"""What the tiny model can do after stages 3 and 4, beside what needs no model, as a section of docs/miniworld.md."""

import json
import pathlib

from wemmu_jax.ablations.report import table
from wemmu_jax.evaluation.baselines import baselines

STAGES = ("stage3", "stage4")
SIDE = 48
# What the project wants of the shipped checkpoint: (task, least overall score after stage 4).
WANTED = {"T2I": 0.85, "S-Edit": 0.80, "Rec": 0.97, "M-Edit": 0.70, "chat": 0.95}


def scores_section(folder: pathlib.Path) -> str:
    """A line for each task and kind: scores after either stage, baselines, what is wanted.

    Args:
      folder: with stage3/ and stage4/, each written by `wemmu evaluate miniworld`.

    Raises:
      FileNotFoundError: one of them is not there.
      ValueError: they were not graded on the same requests.
    """
    found = {stage: json.loads((folder / stage / "scores.json").read_text()) for stage in STAGES}
    asked = {stage: _requests(folder / stage / "grades.jsonl") for stage in STAGES}
    if asked["stage3"] != asked["stage4"]:
        raise ValueError(f"{folder}: stages 3 and 4 were not graded on the same requests")
    count = max(asked["stage4"].values())
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
        f"{count} held-out requests of each kind, scenes and wordings that training never saw. Made by "
        "`wemmu evaluate miniworld` and `wemmu miniworld report scores`; baselines are graded on the same requests."
    )
    return f"{table(heads, rows)}\n\n{said}"


def _requests(grades: pathlib.Path) -> dict[tuple[str, str], int]:
    """(task, kind) -> how many were graded."""
    counts: dict[tuple[str, str], int] = {}
    for line in grades.read_text().splitlines():
        row = json.loads(line)
        place = row["task"], row["kind"]
        counts[place] = counts.get(place, 0) + 1
    return counts


def backbones_section(card: pathlib.Path) -> str:
    """The table of the model card that `wemmu miniworld pretrain` writes."""
    lines = [line for line in card.read_text().splitlines() if line.startswith("|")]
    if len(lines) < 3:
        raise ValueError(f"{card}: no table of backbones")
    return "\n".join(lines)
