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
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from wemmu_jax.data.ledger import Ledger, TooManyReplaced
from wemmu_jax.data.pipeline import MicroBatch
from wemmu_jax.data.tasks import Task
from wemmu_jax.files import write_json
from wemmu_jax.sharding.processes import check_shared, exchange, is_first, say, together
from wemmu_jax.training.batch import on_every_process
from wemmu_jax.training.checkpoints import (
    Checkpoints,
    begun_at,
    check_workdir,
    claim_workdir,
    differences,
    only_run,
    renew_workdir,
)
from wemmu_jax.training.metrics import Progress, task_means
from wemmu_jax.training.profile import Profiler
from wemmu_jax.training.run import Run, data_identities, describe, prepare
from wemmu_jax.training.samples import draw_samples
from wemmu_jax.training.state import TrainState
from wemmu_jax.training.throughput import ASIDE, Stopwatch, Work, row_work
from wemmu_jax.training.watchdog import Watchdog

_TASKS = list(Task)


def train(
    config: ml_collections.ConfigDict, workdir: str | pathlib.Path, *, profile: bool = False
) -> None:
    """Runs a stage in `workdir` to its last step, from its latest checkpoint if there is one.

    Of several processes (see `sharding.processes.join`) all call it alike. The first one writes; the weights, the
    data and the workdir must lie where all see them. With `profile` a few steps are traced, see `Profiler`.

    Raises:
      InterruptedError: SIGTERM, as a preemption sends it to any of the processes, ended the run after the step at
        hand; its state was saved.
      FloatingPointError: a loss or gradient was not finite; names the step and the samples. The latest
        checkpoint is that of the step before.
      FileNotFoundError, ValueError: see `prepare`, `claim_workdir`, `only_run` and `Profiler`; or the processes
        were given different things.
    """
    workdir = pathlib.Path(workdir)
    _check_alike("configs", json.loads(config.to_json()))
    with together("looking at the workdir"):
        check_workdir(workdir, config)
    run = prepare(config, step=begun_at(workdir))
    _check_alike("weights", run.origin.described())
    with together("reading the data sets"):
        data = data_identities(run)
    _check_alike("data sets", data)
    with contextlib.ExitStack() as stack:
        with together("taking the workdir"):
            if is_first():
                begun = {"bridge": run.stage.bridge.to_dict(), "data": data}
                begun |= run.origin.described()
                claim_workdir(workdir, config, begun)
                stack.enter_context(only_run(workdir))
                renew_workdir(workdir, config, begun)
                _announce(run, workdir)
        check_shared(workdir)
        stop = stack.enter_context(StopOnSignal())
        watchdog = stack.enter_context(Watchdog())
        checkpoints = Checkpoints(workdir, keep=config.keep_checkpoints)
        stack.enter_context(contextlib.closing(checkpoints))
        state = _first_state(run, checkpoints)
        watchdog.moved()
        progress = Progress(
            workdir,
            steps=run.stage.optimizer.steps,
            batch=run.stage.batch,
            start=int(state.step),
            writes=is_first(),
        )
        stack.enter_context(contextlib.closing(progress))
        profiler = None
        if profile:
            profiler = Profiler(
                workdir / "profile", start=int(state.step), steps=run.stage.optimizer.steps
            )
            stack.enter_context(contextlib.closing(profiler))
        ledger = Ledger(
            workdir / f"ledger/{jax.process_index():05}.jsonl", share=config.data.bad_share
        )
        held_out = run.held_out.feeds if run.held_out else ()
        if is_first() and (bad := ledger.note_indexed([*run.data.feeds, *held_out])):
            say(f"{bad} records are left out, see {workdir / 'ledger'}")
        _run_steps(run, state, checkpoints, progress, ledger, stop, workdir, profiler, watchdog)


def _announce(run: Run, workdir: pathlib.Path) -> None:
    description = describe(run)
    say(str(run.config))
    say(json.dumps(description, indent=2))
    write_json(workdir / "run_description.json", description)


def _check_alike(what: str, mine: Mapping) -> None:
    """Raises ValueError, in all processes, if one has other values in a nested dict than the first."""
    first, *others = exchange(mine)
    for index, other in enumerate(others, 1):
        if lines := differences(first, other):
            raise ValueError(
                f"process 0 (there) and process {index} (here) have different {what}:\n  "
                + "\n  ".join(lines)
            )


def _first_state(run: Run, checkpoints: Checkpoints) -> TrainState:
    """The latest state, or a fresh one. Takes over `run.trainable`, so that it is not in memory twice."""
    trainable, run.trainable = run.trainable, {}
    if checkpoints.latest is None:
        return run.trainer.init_state(trainable)
    del trainable
    state = checkpoints.restore(run.trainer.abstract_state)
    say(f"resumed at step {int(state.step)}")
    return state


class StopOnSignal:
    """Notices a SIGTERM; the handler of before comes back at the end."""

    def __init__(self):
        self._asked = False
        # Then JAX has a handler already, by which all processes agree on a step.
        self._joined = jax.distributed.is_initialized()

    def __enter__(self) -> "StopOnSignal":
        if not self._joined:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_) -> None:
        if not self._joined:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *_) -> None:
        self._asked = True

    def after(self, step: int) -> bool:
        """Whether to stop after `step`, the same for all processes; each must ask at every step."""
        return multihost_utils.reached_preemption_sync_point(step) if self._joined else self._asked


@dataclasses.dataclass(frozen=True)
class _Part:
    """What is left of a micro-batch once it has been dispatched; its pictures would be gigabytes.

    Attributes:
      keys, numbers: of this process's rows.
      first: global sample number of the micro-batch's first row over all processes.
      tasks: int32[B] over all processes, places in `_TASKS`.
      cut: bool[B] over all processes, rows with a text past the limit.
      replaced: int32[B] over all processes; the sum is the number of records that could not be used.
      tokens, teraflops: int32[B] and float32[B] over all processes, see `Work`.
      losses, plain: float32[B] over all processes, see `row_losses`.
    """

    keys: tuple[str, ...]
    numbers: np.ndarray
    first: int
    tasks: jax.Array
    cut: jax.Array
    replaced: jax.Array
    tokens: jax.Array
    teraflops: jax.Array
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
    profiler: Profiler | None,
    watchdog: Watchdog,
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
    with progress.stopwatch.timed(ASIDE):
        _look(run, state, start, progress, workdir, watchdog)
    running: collections.deque[_Outcome] = collections.deque()
    try:
        for step in range(start + 1, steps + 1):
            if profiler:
                profiler.before(step, state)
            state, outcome = _step(
                run, state, step, micro_batches, ledger, progress.stopwatch, watchdog
            )
            if profiler:
                profiler.after(step, state)
            running.append(outcome)
            stopping = stop.after(step)
            save = stopping or _due(step, every.checkpoint, steps)
            # What is saved or looked at has been reported, so that it is known to be good.
            wait = save or any(_due(step, n, steps) for n in (every.validate, every.sample))
            while len(running) > (0 if wait else 1):
                _report(running.popleft(), progress, ledger, line=every.log)
                watchdog.moved()
            if save:
                with progress.stopwatch.timed(ASIDE):
                    checkpoints.save(state)
                watchdog.moved()
            if stopping:
                raise InterruptedError(
                    f"stopped at step {step}/{steps}; the same command goes on from here"
                )
            with progress.stopwatch.timed(ASIDE):
                _look(run, state, step, progress, workdir, watchdog)
        while running:
            _report(running.popleft(), progress, ledger, line=every.log)
    except BaseException as error:
        # `update` kept the last good state. Of several processes all must save, and only these are errors of all.
        if jax.process_count() == 1 or isinstance(
            error, FloatingPointError | InterruptedError | TooManyReplaced
        ):
            checkpoints.save(state)
        raise
    checkpoints.save(state)


def _step(
    run: Run,
    state: TrainState,
    step: int,
    micro_batches: Iterator[MicroBatch],
    ledger: Ledger,
    stopwatch: Stopwatch,
    watchdog: Watchdog,
) -> tuple[TrainState, _Outcome]:
    """Dispatches optimizer step `step`."""
    gradients, parts = run.trainer.zero_gradients(), []
    for _ in range(run.stage.micro_batches):
        with stopwatch.timed("data"):
            micro_batch = next(micro_batches)
        text_length = micro_batch.arrays["valid"].shape[1]
        stopwatch.see((micro_batch.bucket, micro_batch.arity, text_length))
        gradients, losses, plain = run.trainer.accumulate(
            gradients, state.params, run.frozen, run.batch(micro_batch)
        )
        watchdog.moved()  # dispatched, and what had to be compiled has been
        tasks = np.array([_TASKS.index(task) for task in micro_batch.tasks], np.int32)
        replaced = np.zeros(len(tasks), np.int32)
        replaced[0] = ledger.note(micro_batch)
        rows = {"tasks": tasks, "cut": micro_batch.arrays["cut"], "replaced": replaced}
        rows |= row_work(run.trainer.model.config, run.trainer.learns, micro_batch)
        rows = on_every_process(rows, run.trainer.mesh)
        parts.append(
            _Part(
                keys=micro_batch.keys,
                numbers=micro_batch.sample_numbers,
                first=micro_batch.number * run.stage.rows,
                losses=losses,
                plain=plain,
                **rows,
            )
        )
    losses = [part.losses for part in parts]
    state, norm = run.trainer.update(state, gradients, losses, np.int32(step))
    watchdog.moved()
    return state, _Outcome(step, parts, norm)


def _due(step: int, every: int, steps: int) -> bool:
    return every > 0 and (step % every == 0 or step == steps)


def _look(
    run: Run,
    state: TrainState,
    step: int,
    progress: Progress,
    workdir: pathlib.Path,
    watchdog: Watchdog,
) -> None:
    """Validation losses and sample pictures, when they are due and not there yet."""
    every, steps = run.config.every, run.stage.optimizer.steps
    if run.held_out is None:
        return
    # What is there already is for the first process to say, so that all do the same.
    if _due(step, every.validate, steps) and not exchange(step in progress.validated)[0]:
        losses = validate(run, state.ema or state.params, watchdog.moved)
        progress.write(step, {f"validation/{task}": loss for task, loss in losses.items()})
        text = "  ".join(f"{task} {loss:.4f}" for task, loss in losses.items())
        say(f"step {step:>6}/{steps}  validation  {text}")
    path = workdir / f"samples/{step:06}.png"
    if _due(step, every.sample, steps) and not exchange(path.exists())[0]:
        picture = draw_samples(run, state.ema or state.params, path, watchdog.moved)
        if picture is None:
            say(f"step {step:>6}/{steps}  no pictures: no held-out record makes a request")
        else:
            progress.picture(step, "samples", picture)


def validate(
    run: Run, params: Mapping, moved: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Flow matching loss of each task on the same held-out samples, times and noise at every call. `moved` is told of
    each."""
    losses = {}
    for task, micro_batch in run.validation_batches.items():
        found = run.trainer.validate(params, run.frozen, run.batch(micro_batch))
        losses[task] = float(np.mean(found))
        moved()
    return losses


def _report(outcome: _Outcome, progress: Progress, ledger: Ledger, *, line: int) -> None:
    """Records a step, and prints it every `line` steps; or stops the run over it."""
    with progress.stopwatch.timed("device"):
        losses = np.concatenate([np.asarray(part.losses) for part in outcome.parts])
        norm = float(outcome.norm)
    if not (np.isfinite(losses).all() and np.isfinite(norm)):
        raise FloatingPointError(_blame(outcome, norm))
    values = {"loss": float(np.mean(losses)), "gradient_norm": norm}
    tasks = [_TASKS[place].value for part in outcome.parts for place in np.asarray(part.tasks)]
    plain = np.concatenate([np.asarray(part.plain) for part in outcome.parts])
    values |= {f"loss_{task}": loss for task, loss in task_means(tasks, plain).items()}
    values["texts_cut"] = sum(int(np.count_nonzero(part.cut)) for part in outcome.parts)
    values["records_replaced"] = sum(int(np.sum(part.replaced)) for part in outcome.parts)
    work = Work(
        tokens=sum(int(np.sum(part.tokens)) for part in outcome.parts),
        teraflops=sum(float(np.sum(part.teraflops)) for part in outcome.parts),
    )
    shown = outcome.step == 1 or (line > 0 and outcome.step % line == 0)
    progress.step(outcome.step, values, line=shown, work=work)
    ledger.count(len(tasks), values["records_replaced"])


def _blame(outcome: _Outcome, norm: float) -> str:
    """Names the samples whose own loss is not finite. By the plain loss, because a row's contrastive loss has
    another row's target in it; all samples of the step where no loss of a single row is to blame."""
    mine = [
        (int(number), key, float(np.asarray(part.plain)[number - part.first]))
        for part in outcome.parts
        for number, key in zip(part.numbers, part.keys, strict=True)
    ]
    rows = sorted(tuple(row) for rows in exchange(mine) for row in rows)
    bad = [row for row in rows if not np.isfinite(row[2])]
    lines = [f"sample {number}, {key}: loss {loss}" for number, key, loss in bad or rows]
    return (
        f"step {outcome.step}: a loss or the gradient is not finite (gradient norm {norm}); the weights are those "
        f"of the step before. {'To blame' if bad else 'The samples of the step'}:\n  "
        + "\n  ".join(lines)
    )
