"""Runs of all four stages, six and five steps long, on backbones of two layers and pictures of 32 x 32 pixels.

The runs are real ones, by `train`, each begun once for all tests. On one device; `tests/sharding` sees to more.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import signal
from collections.abc import Callable, Iterable, Iterator
from unittest import mock

import jax
import ml_collections
import numpy as np
import pytest

from tests.backbones import write_backbones
from tests.conftest import unoptimised
from wemmu_jax.conversion.convert import convert
from wemmu_jax.conversion.memory import flatten
from wemmu_jax.miniworld.sources import KINDS, MiniworldSource
from wemmu_jax.sharding.mesh import make_mesh
from wemmu_jax.tiny import backbones as tiny_backbones
from wemmu_jax.training import loop, run
from wemmu_jax.training.checkpoints import Checkpoints
from wemmu_jax.training.curriculum import load_config
from wemmu_jax.training.state import TrainState

STEPS = {"stage1": 6, "stage2": 5, "stage3": 5, "stage4": 5}


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Meshes of a single device, because eight threads that wait for each other on two cores are slow; and
    `unoptimised`."""
    one = functools.partial(make_mesh, devices=jax.devices()[:1])
    with unoptimised(), mock.patch.object(run, "make_mesh", one):
        yield


def host(tree) -> dict[str, np.ndarray]:
    """A tree of parameters as path -> a copy in numpy."""
    return {path: np.array(leaf) for path, leaf in flatten(tree).items()}


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are equal to the bit."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()


@dataclasses.dataclass
class Seen:
    """What was seen of a run while it ran.

    Attributes:
      run: built from the config.
      trainable, frozen: path -> value before the first step of this run.
      keys, tasks: of each row, in order.
      gradients: path -> the largest absolute value of any step's gradient.
      states: step -> the trainable values after it.
      stopped: what the run said when SIGTERM had ended it.
    """

    run: run.Run
    trainable: dict[str, np.ndarray]
    frozen: dict[str, np.ndarray]
    keys: list[str] = dataclasses.field(default_factory=list)
    tasks: list[str] = dataclasses.field(default_factory=list)
    gradients: dict[str, float] = dataclasses.field(default_factory=dict)
    states: dict[int, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    stopped: str = ""


def watched(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    *,
    at_batch: Callable | None = None,
    at_step: Callable[[int], None] | None = None,
) -> Seen:
    """Trains, and looks on. `at_batch` (micro-batch, arrays on the device) -> arrays may change what is trained on."""
    seen = None

    def prepare(config, **named):
        nonlocal seen
        built = run.prepare(config, **named)
        seen = Seen(built, host(built.trainable), host(built.frozen))
        update, batch = built.trainer.update, built.batch

        def spied_batch(micro_batch):
            made = batch(micro_batch)
            held_out = built.__dict__.get("validation_batches", {}).values()
            if not any(micro_batch is other for other in held_out):
                seen.keys += micro_batch.keys
                seen.tasks += [task.value for task in micro_batch.tasks]
            return made if at_batch is None else at_batch(micro_batch, made)

        def spied_update(state, gradients, losses, step):
            for path, leaf in flatten(gradients).items():
                largest = float(np.abs(leaf).max())
                seen.gradients[path] = max(seen.gradients.get(path, 0.0), largest)
            if at_step is not None:
                at_step(int(step))
            state, norm = update(state, gradients, losses, step)
            seen.states[int(step)] = host(state.params)
            return state, norm

        built.trainer.__dict__["update"] = spied_update
        built.batch = spied_batch
        return built

    with mock.patch.object(loop, "prepare", prepare), quick():
        try:
            loop.train(config, workdir)
        except InterruptedError as error:
            seen.stopped = str(error)
    return seen


def stop_at(step: int) -> Callable[[int], None]:
    """For `at_step`: this process asks itself to stop while `step` runs."""
    return lambda now: os.kill(os.getpid(), signal.SIGTERM) if now == step else None


def last_state(seen: Seen, workdir: pathlib.Path) -> TrainState:
    """The state of the workdir's latest checkpoint."""
    checkpoints = Checkpoints(workdir)
    state = checkpoints.restore(seen.run.trainer.abstract_state)
    checkpoints.close()
    return state


@pytest.fixture(autouse=True)
def _quick():
    with quick():
        yield


def write_converted(folder: pathlib.Path, *, seed: int = 0) -> pathlib.Path:
    """Backbones of two layers, converted."""
    sources = [MiniworldSource(kind, seed=0, size=200, split="train") for kind in KINDS]
    texts: Iterable[str] = [source[i].text for source in sources for i in range(len(source))]
    vision = {
        **tiny_backbones.VLM_CONFIG["vision_config"],
        "depth": 2,
        "fullatt_block_indexes": [1],
    }
    with (
        mock.patch.dict(tiny_backbones.VLM_CONFIG, num_hidden_layers=2, vision_config=vision),
        mock.patch.dict(tiny_backbones.DIT_CONFIG, num_layers=2),
        unoptimised(),
    ):
        write_backbones(folder / "hf", texts, seed=seed)
    convert(str(folder / "hf/vlm"), str(folder / "hf/sana"), str(folder / "converted"))
    return folder / "converted"


@pytest.fixture(scope="session")
def converted(tmp_path_factory) -> pathlib.Path:
    """What every chain of stages starts from."""
    return write_converted(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(scope="session")
def config_of(converted):
    """(stage, init, {key: value}) -> a config that trains in seconds."""

    def config(
        stage: str, init: pathlib.Path | None = None, **changes
    ) -> ml_collections.ConfigDict:
        made = load_config(f"configs/tiny.py:{stage}")
        made.init = str(init or converted)
        made.update_from_flattened_dict(
            {
                "model.remat": "full",
                "data.resolution": 32,
                "data.buckets": 1,
                "data.text_lengths": (96,),
                "batch.rows": 8,
                "validation_rows": 8,
                "optimizer.steps": STEPS[stage],
                "optimizer.warmup": 1,
                "optimizer.ema": 0.0,
                "every.validate": 0,
                "every.sample": 0,
                "every.checkpoint": 0,
                "every.log": 2,
            }
        )
        made.update_from_flattened_dict(changes)
        return made

    return config


@pytest.fixture(scope="session")
def stage1(config_of, tmp_path_factory) -> tuple[Seen, pathlib.Path]:
    """Six steps of stage 1, with a running mean."""
    workdir = tmp_path_factory.mktemp("runs") / "stage1"
    return watched(config_of("stage1", **{"optimizer.ema": 0.9}), workdir), workdir


@pytest.fixture(scope="session")
def stage2(stage1, config_of, tmp_path_factory) -> tuple[Seen, pathlib.Path]:
    """Five steps of stage 2 after it."""
    workdir = tmp_path_factory.mktemp("runs") / "stage2"
    return watched(config_of("stage2", stage1[1]), workdir), workdir


@pytest.fixture(scope="session")
def stage3(stage2, config_of, tmp_path_factory) -> tuple[Seen, pathlib.Path]:
    """Five steps of stage 3 after it."""
    workdir = tmp_path_factory.mktemp("runs") / "stage3"
    return watched(config_of("stage3", stage2[1]), workdir), workdir


@pytest.fixture(scope="session")
def stage4(stage3, config_of, tmp_path_factory) -> tuple[Seen, pathlib.Path]:
    """Five steps of stage 4 after it, validated before and after."""
    workdir = tmp_path_factory.mktemp("runs") / "stage4"
    return watched(config_of("stage4", stage3[1], **{"every.validate": 5}), workdir), workdir
