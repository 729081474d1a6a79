"""The loop that all tiny backbones are trained by: batches as a pure function of the step, checkpoints, resume."""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import grain
import jax
import numpy as np
import optax
from jax.sharding import Mesh

from wemmu_jax.files import read_object, write_json
from wemmu_jax.rng import Stream, stream_key
from wemmu_jax.sharding.mesh import make_mesh
from wemmu_jax.sharding.rules import replicated
from wemmu_jax.training.batch import on_devices
from wemmu_jax.training.checkpoints import Checkpoints, code_version, differences, only_run
from wemmu_jax.training.loop import StopOnSignal
from wemmu_jax.training.metrics import Progress
from wemmu_jax.training.optimizer import OptimizerConfig, make_optimizer
from wemmu_jax.training.state import TrainState, running_mean

Tree = Mapping[str, Any]
EVERY_LINE, EVERY_CHECKPOINT, EVERY_EVALUATION = 50, 500, 1000
THREADS, AHEAD = 2, 4
RECIPE = "recipe.json"  # in the workdir: what it began with


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is trained, on what and how.

    Attributes:
      name: of the backbone.
      seed: everything random follows from it.
      rows: of a batch.
      optimizer: the learning rate and its schedule, weight decay, clipping.
      ema: decay of the running mean of the weights, which is the result; 0 for the weights themselves.
      init: key -> fresh parameters, float32.
      frozen: other models' parameters that the loss needs.
      batch: step, from 1 -> the arrays of its batch; depends on nothing else.
      loss: (params, frozen, batch, key of the step) -> the loss and more scalars for the log.
      evaluate: params -> scores on held-out scenes.
    """

    name: str
    seed: int
    rows: int
    optimizer: OptimizerConfig
    ema: float
    init: Callable[[jax.Array], Tree]
    frozen: Tree
    batch: Callable[[int], Tree]
    loss: Callable[[Tree, Tree, Tree, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
    evaluate: Callable[[Tree], dict[str, float]]

    def described(self) -> dict:
        """What must be equal for a run to be resumed."""
        return {
            "name": self.name,
            "seed": self.seed,
            "rows": self.rows,
            "ema": self.ema,
            "optimizer": dataclasses.asdict(self.optimizer),
        }


class _Batches:
    """The batches of a recipe as a random-access source; element n belongs to step n + 1."""

    def __init__(self, batch: Callable[[int], Tree]):
        self._batch = batch

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, number: int) -> Tree:
        return self._batch(int(number) + 1)


def pretrain(recipe: Recipe, workdir: pathlib.Path) -> Tree:
    """Trains to the last step, from the latest checkpoint in `workdir` if there is one; rows over all devices, of
    which JAX_NUM_CPU_DEVICES makes several of a CPU's cores.

    Returns:
      The parameters.

    Raises:
      FloatingPointError: the loss was not finite; names the step.
      InterruptedError: SIGTERM came; the state was saved and the same call goes on from there.
      ValueError: `workdir` belongs to another recipe, whose differing keys are named; or the devices do not divide the
        rows.
    """
    mesh = make_mesh()
    if recipe.rows % mesh.size:
        raise ValueError(f"{mesh.size} devices do not divide the {recipe.rows} rows of a batch")
    _claim(workdir, recipe.described())
    optimizer = make_optimizer(recipe.optimizer, mesh)

    def create(key: jax.Array) -> TrainState:
        return TrainState.create(recipe.init(key), optimizer, ema=recipe.ema > 0)

    key = stream_key(recipe.seed, Stream.INIT)
    steps = recipe.optimizer.steps
    with contextlib.ExitStack() as stack:
        stack.enter_context(only_run(workdir))
        stop = stack.enter_context(StopOnSignal())
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir, keep=2)))
        if checkpoints.latest is None:
            state = jax.jit(create, out_shardings=replicated(mesh))(key)
        else:
            state = checkpoints.restore(_abstract(jax.eval_shape(create, key), mesh))
            print(f"resumed at step {int(state.step)}", flush=True)
        start = int(state.step)
        progress = Progress(workdir, steps=steps, batch=recipe.rows, start=start, writes=True)
        stack.enter_context(contextlib.closing(progress))
        update = _compiled(recipe, optimizer, mesh)
        frozen = jax.device_put(recipe.frozen, replicated(mesh))
        options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
        batches = iter(
            grain.MapDataset.source(_Batches(recipe.batch))[start:].to_iter_dataset(options)
        )
        for step in range(start + 1, steps + 1):
            state, values = update(state, frozen, on_devices(next(batches), mesh))
            stopping = stop.after(step)
            saving = stopping or step % EVERY_CHECKPOINT == 0 or step == steps
            if saving or step % EVERY_LINE == 0 or step == 1:
                values = {name: float(value) for name, value in values.items()}
                if not np.isfinite(values["loss"]):
                    raise FloatingPointError(f"{recipe.name}, step {step}: loss {values['loss']}")
                progress.step(step, values, line=step % EVERY_LINE == 0 or step in (1, steps))
            if saving:
                if not np.isfinite(optax.global_norm(state.params)):
                    raise FloatingPointError(f"{recipe.name}, step {step}: weights are not finite")
                checkpoints.save(state)
            if stopping:
                raise InterruptedError(f"stopped at step {step}; the same command goes on")
            if step % EVERY_EVALUATION == 0:
                _report(progress, step, recipe.evaluate(jax.device_get(state.ema or state.params)))
    return jax.device_get(state.ema or state.params)


def _compiled(recipe: Recipe, optimizer: optax.GradientTransformation, mesh: Mesh):
    """(state, frozen, batch) -> the next state, which takes over the old one's buffers, and what is logged."""
    root = jax.random.fold_in(jax.random.key(recipe.seed), Stream.FLOW_NOISE)

    def update(state: TrainState, frozen: Tree, batch: Tree):
        key = jax.random.fold_in(root, state.step)
        gradient = jax.value_and_grad(recipe.loss, has_aux=True)
        (loss, more), gradients = gradient(state.params, frozen, batch, key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = running_mean(ema, params, state.step, recipe.ema)
        values = {"loss": loss, "gradient_norm": optax.global_norm(gradients), **more}
        return TrainState(state.step + 1, params, opt_state, ema), values

    return jax.jit(update, donate_argnums=0, out_shardings=replicated(mesh))


def _abstract(shapes: TrainState, mesh: Mesh) -> TrainState:
    place = replicated(mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes
    )


def _claim(workdir: pathlib.Path, described: dict) -> None:
    path = workdir / RECIPE
    if path.exists():
        begun = read_object(path)
        begun.pop("code", None)  # a later commit may go on
        if other := differences(begun, described):
            raise ValueError(f"{workdir} belongs to another recipe:\n  " + "\n  ".join(other))
        return
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(path, described | {"code": code_version()})


def _report(progress: Progress, step: int, scores: Mapping[str, float]) -> None:
    progress.write(step, {f"held_out/{name}": value for name, value in scores.items()})
    text = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
    print(f"step {step:>6}  held out  {text}", flush=True)
