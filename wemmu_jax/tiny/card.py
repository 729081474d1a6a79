"""The model card of the tiny backbones: how each was trained and what it can do. Written by the commands that train."""

import json
import pathlib
import platform
import statistics
from collections.abc import Mapping, Sequence

import jax

from wemmu_jax.files import read_object, write_json
from wemmu_jax.tiny.loop import RECIPE, Recipe
from wemmu_jax.training.metrics import clock

FILE = "training.json"
_HEAD = """# Tiny backbones of WeMMU in JAX

A Qwen2.5-VL, a Sana DiT and a DC-AE small enough to train on two cores, in the layout of their Hugging Face originals.
They know miniworld, drawn scenes of coloured shapes, and nothing else. Weights are bfloat16 and were scored as such, on
scenes and wordings that training never saw. The DiT was scored behind a small reader of captions, which learned with it
and is not here. This page is written by `wemmu miniworld pretrain`, which also wants `--out` and `--workdir`.

| backbone | parameters | command | samples | time | hardware | version | scores |
|---|---|---|---|---|---|---|---|
"""


def describe(
    recipe: Recipe, workdir: pathlib.Path, command: str, *, parameters: int, scores: Mapping
) -> dict:
    """What there is to tell of a training that `command` has done."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["train/samples_per_second"] for row in rows if "train/samples_per_second" in row]
    samples, speed = recipe.rows * recipe.optimizer.steps, statistics.median(speeds)
    return {
        "backbone": recipe.name,
        "command": command,
        "parameters": parameters,
        "steps": recipe.optimizer.steps,
        "samples": samples,
        # Not the wall's: a run may have been stopped and gone on.
        "seconds_at_median_speed": round(samples / speed),
        "samples_per_second": round(speed, 1),
        "hardware": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}, {_processor()}",
        "version": read_object(workdir / RECIPE, keys=("code",))["code"],
        "scores": {name: round(value, 4) for name, value in scores.items()},
        "curve": {name: _curve(rows, f"held_out/{name}") for name in scores},
    }


def _curve(rows: Sequence[Mapping], field: str) -> list[tuple[int, float]]:
    """(step, value) pairs; a step that was run twice counts once."""
    return sorted({row["step"]: round(row[field], 4) for row in rows if field in row}.items())


def write_card(root: pathlib.Path, folder: pathlib.Path, description: Mapping) -> None:
    """Puts FOLDER/training.json beside a backbone, and all of them into ROOT/README.md."""
    write_json(folder / FILE, description)
    rows = []
    for file in sorted(root.rglob(FILE)):
        one = read_object(file)
        scores = ", ".join(f"{name} {value:.3f}" for name, value in one["scores"].items())
        cells = [
            one["backbone"],
            f"{one['parameters']:,}",
            f"`{one['command']}`",
            f"{one['samples']:,}",
            f"{clock(one['seconds_at_median_speed'])} at {one['samples_per_second']} a second",
            one["hardware"],
            one["version"],
            scores,
        ]
        rows.append(f"| {' | '.join(cells)} |\n")
    (root / "README.md").write_text(_HEAD + "".join(rows))


def _processor() -> str:
    """The machine's processor, in words."""
    file = pathlib.Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (
        f"{len(names)} cores of {names[0]}"
        if names
        else platform.processor() or "processor unknown"
    )
