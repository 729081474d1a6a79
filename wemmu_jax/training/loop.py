"""A stage from its first step to its last; resumes by itself.

Order of a step: validate, sample and save what is there -> fetch micro-batches -> dispatch the step -> report the
step before. Metrics are fetched one step late, so that the host never waits for the device in between.
"""

import functools
import json
import pathlib
import signal
from collections.abc import Mapping, Sequence

import jax
import ml_collections
import numpy as np

from wemmu_jax.data.pipeline import MicroBatch, MicroBatches
from wemmu_jax.training.checkpoints import Checkpoints, claim_workdir, write_json
from wemmu_jax.training.metrics import Progress, task_means
from wemmu_jax.training.run import Run, describe, prepare
from wemmu_jax.training.samples import draw_samples
from wemmu_jax.training.state import TrainState


def train(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> None:
    """Runs a stage in `workdir` to its last step, from its latest checkpoint if there is one.

    Raises:
      FloatingPointError: a loss or gradient was not finite; names the step and the samples. The weights of the
        step before are kept, in the latest checkpoint.
    """
    workdir = pathlib.Path(workdir)
    run = prepare(config)
    writes = jax.process_index() == 0
    if writes:
        claim_workdir(
            workdir,
            config,
            {
                "init": str(pathlib.Path(config.init).absolute()),
                "fingerprint": run.origin.backbones.fingerprint,
                "bridge": run.stage.bridge.to_dict(),
            },
        )
        description = describe(run)
        print(config)
        print(json.dumps(description, indent=2))
        write_json(workdir / "run_description.json", description)
    state = run.trainer.init_state(run.trainable)
    checkpoints = Checkpoints(workdir, keep=config.keep_checkpoints)
    if checkpoints.latest is not None:
        state = checkpoints.restore(jax.tree.map(_abstract, state))
        print(f"resumed at step {int(state.step)}")
    start, steps, count = int(state.step), run.stage.optimizer.steps, run.stage.micro_batches
    progress = Progress(workdir, steps=steps, batch=run.stage.batch, start=start, writes=writes)
    stop = _StopOnSignal()
    threads = config.data.threads
    micro_batches = run.data.iterate(start * count, workers=threads, prefetch=2 * threads)
    pending = None
    for step in range(start, steps):
        if step > start or step == 0:
            _between_steps(run, state, step, checkpoints, progress, workdir)
        gradients, rows = run.trainer.zero_gradients(), []
        for _ in range(count):
            micro_batch = next(micro_batches)
            gradients, losses, plain = run.trainer.accumulate(
                gradients, state.params, run.frozen, run.batch(micro_batch)
            )
            rows.append((micro_batch, losses, plain))
        state, norm = run.trainer.update(state, gradients)
        if pending is not None:
            _report(*pending, progress, config.every.log)
        pending = (step + 1, rows, norm)
        if stop.asked:
            break
    if pending is not None:
        _report(*pending, progress, config.every.log)
    if int(state.step) >= steps:
        _between_steps(run, state, steps, checkpoints, progress, workdir)
    checkpoints.save(state)
    checkpoints.close()
    progress.close()


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


class _StopOnSignal:
    """SIGTERM, as a preemption sends it, ends the run after the step at hand, with a checkpoint."""

    def __init__(self):
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_) -> None:
        self.asked = True


def _due(step: int, every: int, steps: int) -> bool:
    return every > 0 and (step % every == 0 or step == steps)


def _between_steps(
    run: Run,
    state: TrainState,
    step: int,
    checkpoints: Checkpoints,
    progress: Progress,
    workdir: pathlib.Path,
) -> None:
    every, steps = run.config.every, run.stage.optimizer.steps
    if step and _due(step, every.checkpoint, steps):
        checkpoints.save(state)
    if run.held_out is None:
        return
    if _due(step, every.validate, steps):
        losses = validate(run, state.params)
        progress.write(step, {f"validation/{task}": loss for task, loss in losses.items()})
        text = "  ".join(f"{task} {loss:.4f}" for task, loss in losses.items())
        print(f"step {step:>6}/{steps}  validation  {text}", flush=True)
    if _due(step, every.sample, steps):
        picture = draw_samples(run, state.ema or state.params, workdir / f"samples/{step:06}.png")
        progress.picture(step, "samples", picture)


def validate(run: Run, params: Mapping) -> dict[str, float]:
    """Flow matching loss of each task on the same held-out samples, times and noise at every call."""
    found = {}
    for task, micro_batch in _validation_batches(run).items():
        losses = run.trainer.validate(params, run.frozen, run.batch(micro_batch))
        found[task] = float(np.mean(losses))
    return found


@functools.lru_cache(maxsize=1)
def _validation_batches_of(held_out: MicroBatches) -> dict[str, MicroBatch]:
    tasks = [task for task, weight in held_out.mixture.items() if weight]
    return {task.value: held_out.fixed_batches(task, 1)[0] for task in tasks}


def _validation_batches(run: Run) -> dict[str, MicroBatch]:
    return _validation_batches_of(run.held_out)


def _report(step: int, rows: Sequence, norm: jax.Array, progress: Progress, every: int) -> None:
    """Prints and records optimizer step `step`, or stops the run over it."""
    losses = np.concatenate([np.asarray(part) for _, part, _ in rows])
    plain = np.concatenate([np.asarray(part) for _, _, part in rows])
    norm = float(norm)
    if not (np.isfinite(losses).all() and np.isfinite(norm)):
        raise FloatingPointError(_blame(step, rows, losses, norm))
    values = {"loss": float(np.mean(losses)), "gradient_norm": norm}
    if jax.process_count() == 1:
        tasks = [task.value for micro_batch, _, _ in rows for task in micro_batch.tasks]
        values |= {f"loss_{task}": loss for task, loss in task_means(tasks, plain).items()}
    progress.step(step, values, line=step % every == 0 or step == 1)


def _blame(step: int, rows: Sequence, losses: np.ndarray, norm: float) -> str:
    keys = [key for micro_batch, _, _ in rows for key in micro_batch.keys]
    numbers = [n for micro_batch, _, _ in rows for n in micro_batch.sample_numbers]
    bad = [
        f"{number} {key}: {loss}"
        for number, key, loss in zip(numbers, keys, losses, strict=False)
        if not np.isfinite(loss)
    ]
    blamed = bad or [f"{number} {key}" for number, key in zip(numbers, keys, strict=True)]
    return (
        f"step {step}: loss or gradient is not finite (gradient norm {norm}); the weights were left as they "
        f"were. {'Samples' if bad else 'All losses are finite; the samples of the step'}:\n  "
        + "\n  ".join(blamed)
    )
