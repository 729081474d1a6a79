"""A stage from its first step to its last; resumes by itself.

Order of a step: save, validate and sample what is there -> fetch micro-batches -> dispatch the step -> report the
step before. Metrics are fetched one step late, so that the host never waits for the device in between.
"""

import collections
import contextlib
import dataclasses
import json
import pathlib
import signal
from collections.abc import Iterator, Mapping, Sequence

import jax
import ml_collections
import numpy as np

from wemmu_jax.data.ledger import Ledger
from wemmu_jax.data.pipeline import MicroBatch
from wemmu_jax.files import write_json
from wemmu_jax.training.checkpoints import Checkpoints, check_workdir, claim_workdir, only_run
from wemmu_jax.training.metrics import Progress, task_means
from wemmu_jax.training.run import Run, describe, prepare
from wemmu_jax.training.samples import draw_samples
from wemmu_jax.training.state import TrainState


def train(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> None:
    """Runs a stage in `workdir` to its last step, from its latest checkpoint if there is one.

    SIGTERM, as a preemption sends it, ends the run after the step at hand, with a checkpoint.

    Raises:
      FloatingPointError: a loss or gradient was not finite; names the step and the samples. The latest
        checkpoint is that of the step before.
      FileNotFoundError, ValueError: see `prepare`, `claim_workdir` and `only_run`.
    """
    workdir = pathlib.Path(workdir)
    check_workdir(workdir, config)
    run = prepare(config)
    writes = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        if writes:
            bridge = {"bridge": run.stage.bridge.to_dict()}
            claim_workdir(workdir, config, run.origin.described() | bridge)
            stack.enter_context(only_run(workdir))
            _announce(run, workdir)
        stop = stack.enter_context(StopOnSignal())
        checkpoints = Checkpoints(workdir, keep=config.keep_checkpoints)
        stack.enter_context(contextlib.closing(checkpoints))
        state = _first_state(run, checkpoints)
        progress = Progress(
            workdir,
            steps=run.stage.optimizer.steps,
            batch=run.stage.batch,
            start=int(state.step),
            writes=writes,
        )
        stack.enter_context(contextlib.closing(progress))
        ledger = Ledger(
            workdir / f"ledger/{jax.process_index():05}.jsonl", share=config.data.bad_share
        )
        held_out = run.held_out.feeds if run.held_out else ()
        if writes and (bad := ledger.note_indexed([*run.data.feeds, *held_out])):
            print(f"{bad} records are left out, see {workdir / 'ledger'}", flush=True)
        _run_steps(run, state, checkpoints, progress, ledger, stop, workdir)


def _announce(run: Run, workdir: pathlib.Path) -> None:
    description = describe(run)
    print(run.config)
    print(json.dumps(description, indent=2), flush=True)
    write_json(workdir / "run_description.json", description)


def _first_state(run: Run, checkpoints: Checkpoints) -> TrainState:
    """The latest state, or a fresh one. Takes over `run.trainable`, so that it is not in memory twice."""
    trainable, run.trainable = run.trainable, {}
    if checkpoints.latest is None:
        return run.trainer.init_state(trainable)
    del trainable
    state = checkpoints.restore(run.trainer.abstract_state)
    print(f"resumed at step {int(state.step)}", flush=True)
    return state


class StopOnSignal:
    """Remembers a SIGTERM; the handler of before comes back at the end."""

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "StopOnSignal":
        self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *_) -> None:
        self.asked = True


@dataclasses.dataclass(frozen=True)
class _Part:
    """What is left of a micro-batch once it has been dispatched; its pictures would be gigabytes.

    Attributes:
      tasks, keys, numbers: of this process's rows.
      cut: how many of them had a text past the limit.
      replaced: how many records could not be used for them.
      first: global sample number of the micro-batch's first row over all processes.
      losses, plain: float32[B] over all processes, see `row_losses`.
    """

    tasks: tuple[str, ...]
    keys: tuple[str, ...]
    numbers: np.ndarray
    cut: int
    replaced: int
    first: int
    losses: jax.Array
    plain: jax.Array


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """A step that was dispatched and may not be done yet."""

    step: int
    parts: Sequence[_Part]
    norm: jax.Array


def _run_steps(
    run: Run,
    state: TrainState,
    checkpoints: Checkpoints,
    progress: Progress,
    ledger: Ledger,
    stop: StopOnSignal,
    workdir: pathlib.Path,
) -> None:
    start, steps, every = int(state.step), run.stage.optimizer.steps, run.config.every
    workers, threads = run.config.data.workers, run.config.data.threads
    micro_batches = run.data.iterate(
        start * run.stage.micro_batches,
        workers=workers,
        threads=threads,
        prefetch=2 * (threads or min(workers, 2)),
    )
    if run.held_out and every.validate:
        for held_out in run.validation_batches.values():
            ledger.note(held_out)
    # Also after a resume: a run that was stopped at this step has saved it and not looked at it.
    _look(run, state, start, progress, workdir)
    running: collections.deque[_Outcome] = collections.deque()
    try:
        for step in range(start + 1, steps + 1):
            state, outcome = _step(run, state, step, micro_batches, ledger)
            running.append(outcome)
            save = stop.asked or _due(step, every.checkpoint, steps)
            # What is saved or looked at has been reported, so that it is known to be good.
            wait = save or any(_due(step, n, steps) for n in (every.validate, every.sample))
            while len(running) > (0 if wait else 1):
                _report(running.popleft(), progress, line=every.log)
            if save:
                checkpoints.save(state)
            if stop.asked:
                print(
                    f"stopped at step {step}/{steps}; the same command goes on from here",
                    flush=True,
                )
                return
            _look(run, state, step, progress, workdir)
        while running:
            _report(running.popleft(), progress, line=every.log)
    finally:
        # After an error too: `update` kept the last good state.
        checkpoints.save(state)


def _step(
    run: Run,
    state: TrainState,
    step: int,
    micro_batches: Iterator[MicroBatch],
    ledger: Ledger,
) -> tuple[TrainState, _Outcome]:
    """Dispatches optimizer step `step`."""
    gradients, parts = run.trainer.zero_gradients(), []
    for _ in range(run.stage.micro_batches):
        micro_batch = next(micro_batches)
        gradients, losses, plain = run.trainer.accumulate(
            gradients, state.params, run.frozen, run.batch(micro_batch)
        )
        parts.append(
            _Part(
                tasks=tuple(task.value for task in micro_batch.tasks),
                keys=micro_batch.keys,
                numbers=micro_batch.sample_numbers,
                cut=int(np.count_nonzero(micro_batch.arrays["cut"])),
                replaced=ledger.note(micro_batch),
                first=micro_batch.number * run.stage.rows,
                losses=losses,
                plain=plain,
            )
        )
    losses = [part.losses for part in parts]
    state, norm = run.trainer.update(state, gradients, losses, np.int32(step))
    return state, _Outcome(step, parts, norm)


def _due(step: int, every: int, steps: int) -> bool:
    return every > 0 and (step % every == 0 or step == steps)


def _look(
    run: Run, state: TrainState, step: int, progress: Progress, workdir: pathlib.Path
) -> None:
    """Validation losses and sample pictures, when they are due and not there yet."""
    every, steps = run.config.every, run.stage.optimizer.steps
    # Several processes may not all see what is there, and must all do the same.
    alone = jax.process_count() == 1
    if run.held_out is None:
        return
    if _due(step, every.validate, steps) and not (alone and step in progress.validated):
        losses = validate(run, state.params)
        progress.write(step, {f"validation/{task}": loss for task, loss in losses.items()})
        text = "  ".join(f"{task} {loss:.4f}" for task, loss in losses.items())
        print(f"step {step:>6}/{steps}  validation  {text}", flush=True)
    path = workdir / f"samples/{step:06}.png"
    if _due(step, every.sample, steps) and not (alone and path.exists()):
        picture = draw_samples(run, state.ema or state.params, path)
        progress.picture(step, "samples", picture)


def validate(run: Run, params: Mapping) -> dict[str, float]:
    """Flow matching loss of each task on the same held-out samples, times and noise at every call."""
    return {
        task: float(np.mean(run.trainer.validate(params, run.frozen, run.batch(micro_batch))))
        for task, micro_batch in run.validation_batches.items()
    }


def _report(outcome: _Outcome, progress: Progress, *, line: int) -> None:
    """Records a step, and prints it every `line` steps; or stops the run over it."""
    losses = np.concatenate([np.asarray(part.losses) for part in outcome.parts])
    norm = float(outcome.norm)
    if not (np.isfinite(losses).all() and np.isfinite(norm)):
        raise FloatingPointError(_blame(outcome, norm))
    values = {"loss": float(np.mean(losses)), "gradient_norm": norm}
    if jax.process_count() == 1:
        tasks = [task for part in outcome.parts for task in part.tasks]
        plain = np.concatenate([np.asarray(part.plain) for part in outcome.parts])
        values |= {f"loss_{task}": loss for task, loss in task_means(tasks, plain).items()}
    values["texts_cut"] = sum(part.cut for part in outcome.parts)
    values["records_replaced"] = sum(part.replaced for part in outcome.parts)
    progress.step(
        outcome.step, values, line=outcome.step == 1 or (line > 0 and outcome.step % line == 0)
    )


def _blame(outcome: _Outcome, norm: float) -> str:
    """Names the samples whose own loss is not finite. By the plain loss, because a row's contrastive loss has
    another row's target in it; all samples of the step where no loss of a single row is to blame."""
    rows = [
        (int(number), key, float(np.asarray(part.plain)[number - part.first]))
        for part in outcome.parts
        for number, key in zip(part.numbers, part.keys, strict=True)
    ]
    bad = [row for row in rows if not np.isfinite(row[2])]
    lines = [f"sample {number}, {key}: loss {loss}" for number, key, loss in bad or rows]
    return (
        f"step {outcome.step}: a loss or the gradient is not finite (gradient norm {norm}); the weights are those "
        f"of the step before. {'To blame' if bad else 'The samples of the step'}:\n  "
        + "\n  ".join(lines)
    )
