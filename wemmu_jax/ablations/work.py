"""What a job does. Functions of plain values, so that another process can be asked to do them."""

import contextlib
import dataclasses
import pathlib
import shutil
from collections.abc import Sequence

import jax
import numpy as np

from configs.ablations import BUDGETS, PHASES, get_config
from wemmu_jax.ablations.studies import Run
from wemmu_jax.conversion.convert import convert
from wemmu_jax.evaluation.attention import measure_attention
from wemmu_jax.evaluation.miniworld import cases, evaluate, show
from wemmu_jax.files import write_json
from wemmu_jax.inference.pipeline import WeMMU
from wemmu_jax.inference.requests import DrawingRequest
from wemmu_jax.training.loop import train

ATTENDED = 32  # requests that the attention is the mean of
BATCH = 16  # pictures drawn at a time
REQUESTS_SEED = 7  # of what is graded; training has other seeds, and other scenes anyway


def _begin(out: str, budget: str) -> pathlib.Path:
    """Seeds and phases share their programs."""
    folder = pathlib.Path(out)
    jax.config.update("jax_disable_most_optimizations", not BUDGETS[budget].optimised)
    jax.config.update("jax_compilation_cache_dir", str((folder / "compilation_cache").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return folder


def convert_backbones(*, out: str, budget: str, backbones: str) -> None:
    """Hugging Face folders BACKBONES/vlm and BACKBONES/sana -> OUT/converted."""
    converted = _begin(out, budget) / "converted"
    # There if it was killed before it was noted as done, and then perhaps of other backbones.
    shutil.rmtree(converted, ignore_errors=True)
    convert(f"{backbones}/vlm", f"{backbones}/sana", str(converted))


def train_phase(*, out: str, budget: str, run: str) -> None:
    """Trains OUT/runs/RUN to its last step; what training says goes to OUT/logs/RUN.log."""
    folder, named = _begin(out, budget), Run.parse(run)
    config = get_config(f"{budget}/{run}")
    start = PHASES[named.phase].start
    init = folder / "converted" if start is None else folder / f"runs/{named.at(start)}"
    config.init = str(init.absolute())
    if jax.default_backend() != "cpu":
        # Layers written out one by one run fastest on a CPU; a GPU's programs are long to compile even of one of each.
        config.model.remat = "none"
    log = folder / f"logs/{run}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as said, contextlib.redirect_stdout(said):
        train(config, folder / f"runs/{run}")
    jax.clear_caches()


def grade(*, out: str, budget: str, run: str, tasks: Sequence[str]) -> None:
    """Scores of the run's checkpoint, into OUT/grades/RUN."""
    folder, limits = _begin(out, budget), BUDGETS[budget]
    model = WeMMU.load(folder / f"runs/{run}", dtype="float32")
    evaluate(
        dataclasses.replace(model, batch_size=BATCH),
        folder / f"grades/{run}",
        count=limits.graded,
        seed=REQUESTS_SEED,
        steps=limits.solver_steps,
        tasks=tasks,
    )
    jax.clear_caches()


def attend(*, out: str, budget: str, run: str) -> None:
    """The attention of the run's queries to held-out edits: OUT/attention/RUN.json, and its map beside it."""
    folder = _begin(out, budget)
    model = WeMMU.load(folder / f"runs/{run}", dtype="float32")
    count = min(ATTENDED, 8 * BUDGETS[budget].graded)
    asked = [
        case
        for kind in ("recolour", "remove")
        for case in cases("S-Edit", kind, count=count // 2, seed=REQUESTS_SEED)
    ]
    requests = [
        DrawingRequest(case.text, tuple(show(scene, model.default_size) for scene in case.sources))
        for case in asked
    ]
    found = measure_attention(model, requests, seed=REQUESTS_SEED)
    file = folder / f"attention/{run}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file.with_suffix(".npy"), found.map)
    fields = {
        "mass": found.mass,
        "log_ratio": found.log_ratio,
        "logit_difference": found.logit_difference,
        "mass_difference": found.mass_difference,
        "groups": found.groups,
        "text": requests[0].text,
    }
    write_json(file, fields)
    jax.clear_caches()
