"""Jobs that need one another, run by several processes. What is done is not done again."""

import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wemmu_jax.files import read_object, write_json


@dataclasses.dataclass(frozen=True)
class Job:
    """Something to do once.

    Attributes:
      name: also the name of the file in which it is noted that it is done.
      needs: names of jobs that must be done before.
      call: a function of a module, which another process can import.
      arguments: plain values.
      made_from: what else its result depends on, in a word.
    """

    name: str
    needs: tuple[str, ...]
    call: Callable[..., None]
    arguments: Mapping[str, Any]
    made_from: str = ""


class Ledger:
    """A folder with a file for each job that is done."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder

    def _file(self, name: str) -> pathlib.Path:
        return self._folder / f"{name}.json"

    def seconds(self, name: str) -> float | None:
        """How long the job took; None while it is not done."""
        file = self._file(name)
        return read_object(file, keys=("seconds",))["seconds"] if file.exists() else None

    def note(self, name: str, seconds: float, *, made_from: str = "") -> None:
        """Notes that it is done."""
        file = self._file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"job": name, "seconds": round(seconds, 1), "made_from": made_from})

    def check(self, job: Job) -> None:
        """Raises ValueError if it is done, but was made from something else."""
        file = self._file(job.name)
        if file.exists() and read_object(file).get("made_from", "") != job.made_from:
            raise ValueError(
                f"{file}: it is done, but with another config, other backbones or other requests than today's; choose "
                "another folder"
            )


class JobFailed(ChildProcessError):
    """A job raised something; the message has its traceback."""


def run_jobs(
    jobs: Sequence[Job], ledger: Ledger, *, processes: int, say: Callable[[str], None]
) -> None:
    """Does what is not done yet. Each process has its own share of the processor's cores.

    SIGTERM and Ctrl-C are handed on, so that a training saves its state; the same call goes on from there.

    Raises:
      JobFailed: one of them failed; those that were running then are finished first.
      InterruptedError: it was stopped.
      ValueError: a job needs another that is not among them, or is done and was made from something else.
    """
    for job in jobs:
        ledger.check(job)
    waiting = {job.name: job for job in jobs if ledger.seconds(job.name) is None}
    names = {job.name for job in jobs}
    if unknown := {need for job in jobs for need in job.needs} - names:
        raise ValueError(f"needed, but nobody's job: {', '.join(sorted(unknown))}")
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    asked: list[int] = []
    for number in before:
        signal.signal(number, lambda number, _: asked.append(number))
    pool = [_Worker(cores) for cores in _shares(min(processes, max(len(waiting), 1)))]
    failure = None
    try:
        while waiting or any(worker.job for worker in pool):
            for worker in pool:
                job = _ready(waiting, pool) if not (worker.job or asked or failure) else None
                if job:
                    say(f"{job.name}: begins ({len(waiting)} to go)")
                    worker.give(waiting.pop(job.name))
            busy = [worker for worker in pool if worker.job]
            if not busy:
                break
            for worker in _finished(busy, asked):
                job, error, seconds = worker.take()
                if error and not asked:  # a training that was stopped says so by an error
                    failure = failure or f"{job.name}: {error}"
                    say(f"{job.name}: failed")
                elif not error:  # also one that ended just before it could be stopped
                    ledger.note(job.name, seconds, made_from=job.made_from)
                    say(f"{job.name}: done in {seconds:.0f} s")
    finally:
        for worker in pool:
            worker.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        raise InterruptedError("stopped; the same command goes on from here")
    if failure:
        raise JobFailed(failure)


def _ready(waiting: Mapping[str, Job], pool: Sequence["_Worker"]) -> Job | None:
    """The first job that needs nothing that is still to be done."""
    undone = waiting.keys() | {worker.job.name for worker in pool if worker.job}
    return next((job for job in waiting.values() if not undone & set(job.needs)), None)


def _finished(busy: Sequence["_Worker"], asked: Sequence[int]) -> list["_Worker"]:
    """Waits until one has something to say; hands a stop on as soon as it is asked for."""
    told = False
    while True:
        if asked and not told:
            for worker in busy:
                worker.stop()
            told = True
        if ready := multiprocessing.connection.wait([w.pipe for w in busy], timeout=0.5):
            return [worker for worker in busy if worker.pipe in ready]


def _shares(processes: int) -> list[list[int]]:
    """The cores that this process may use, dealt out; two single threads waste less than one pair."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if processes == 1 or len(cores) < processes:
        return [[]] * processes
    return [cores[number::processes] for number in range(processes)]


class _Worker:
    """A process that does one job after the other, so that it imports and compiles once."""

    def __init__(self, cores: Sequence[int]):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.job: Job | None = None
        self._process = context.Process(target=_work, args=(theirs, list(cores)), daemon=True)
        self._process.start()
        theirs.close()

    def give(self, job: Job) -> None:
        self.job = job
        self.pipe.send(job)

    def take(self) -> tuple[Job, str, float]:
        """The job that it had, what went wrong, and the seconds that it took."""
        job, self.job = self.job, None
        try:
            error, seconds = self.pipe.recv()
        except EOFError:
            self._process.join()
            error, seconds = f"the process died with exit code {self._process.exitcode}", 0.0
        return job, error, seconds

    def stop(self) -> None:
        self._process.terminate()

    def close(self) -> None:
        self.pipe.close()
        self._process.join()


def _work(pipe: multiprocessing.connection.Connection, cores: Sequence[int]) -> None:
    if cores:
        os.sched_setaffinity(0, cores)
    # Ctrl-C reaches the whole group; the parent decides. A training has a handler of its own for SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        began, error = time.perf_counter(), ""
        try:
            job.call(**job.arguments)
        except Exception:  # whatever it was, the parent names the job and raises it
            error = traceback.format_exc()
        pipe.send((error, time.perf_counter() - began))
