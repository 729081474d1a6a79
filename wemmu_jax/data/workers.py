"""Processes that make rows, and the memory that they share with the one that trains. Linux only.

A row's work is a pure function of what is asked, so that a worker that was killed costs nothing but time: the pool is
made anew, and whoever waits asks again. Rows are written where the micro-batch will have them.
"""

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import mmap
import multiprocessing
import os
import pickle
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from typing import Any

import numpy as np

from wemmu_jax.data import nursery
from wemmu_jax.data.buckets import Bucket
from wemmu_jax.data.rows import Candidates, Measured, Row, RowMaker

# A row that takes its worker with it every time, by its memory or by a decoder's fault, must not do so for ever.
MOST_DEATHS = 5

_ALIGNMENT = 64
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
# M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of mallopt(3), bytes; the latter is the most that glibc takes.
_KEPT = ((-1, 2**26), (-3, 2**25))

Form = Mapping[str, tuple[tuple[int, ...], str]]  # name -> shape, type

_maker: RowMaker | None = None  # a worker's own


class Workers:
    """A pool of processes with a `RowMaker` each; started when there is something to do."""

    def __init__(self, maker: RowMaker, count: int):
        self._count = count
        self._lock = threading.Lock()
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        # In memory, by a name that other processes know and that goes with this one.
        self._file = os.fdopen(os.memfd_create("rows"), "wb")
        pickle.dump(maker, self._file)
        self._file.flush()

    def run(self, function: Callable, jobs: Sequence[tuple]) -> list[Any]:
        """`function(*job)`, one of those below, for each job; results in the jobs' order.

        Raises:
          RuntimeError: workers were killed over and over.
          ValueError: what a job raises.
        """
        results: dict[int, Any] = {}
        for _ in range(MOST_DEATHS):
            pool = self._running()
            try:
                left = [number for number in range(len(jobs)) if number not in results]
                futures = {number: pool.submit(function, *jobs[number]) for number in left}
                for number, future in futures.items():
                    results[number] = future.result()
                return [results[number] for number in range(len(jobs))]
            except BrokenProcessPool:
                self._drop(pool)
        raise RuntimeError(
            f"data workers were killed {MOST_DEATHS} times in a row at the same rows; is memory short? "
            "With data.workers=0 this process makes the rows"
        )

    def close(self) -> None:
        """Ends the processes."""
        self._drop(self._pool)
        self._file.close()

    @property
    def processes(self) -> list[int]:
        """The ids of those that have been started."""
        return list(self._running()._processes)

    def _running(self) -> concurrent.futures.ProcessPoolExecutor:
        with self._lock:
            if self._pool is None:
                # Not fork: this process has jax's threads. The server holds what workers need once for all of them.
                # Descriptors' numbers come again, so a name has a number of its own.
                name = f"{uuid.uuid4()} /proc/{os.getpid()}/fd/{self._file.fileno()}"
                context = multiprocessing.get_context("forkserver")
                context.set_forkserver_preload([nursery.__name__])
                os.environ[nursery.VARIABLE] = name
                forkserver.ensure_running()
                del os.environ[nursery.VARIABLE]
                self._pool = concurrent.futures.ProcessPoolExecutor(
                    self._count, context, initializer=_start, initargs=(name,)
                )
            return self._pool

    def _drop(self, pool: concurrent.futures.ProcessPoolExecutor | None) -> None:
        with self._lock:
            if pool is not None and self._pool is pool:
                pool.shutdown(wait=False, cancel_futures=True)
                self._pool = None


def _start(name: str) -> None:
    global _maker
    _maker = nursery.maker if nursery.name == name else nursery.load(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    keep_memory()


def keep_memory() -> None:
    """Has this process keep what it frees, up to 64 MiB, because the next row takes as much again; to get it from the
    system anew, page by page, is a tenth of a row's time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    for parameter, value in _KEPT if mallopt else ():
        mallopt(parameter, value)


def measure(candidates: Sequence[Candidates]) -> list[Measured]:
    """In a worker: `RowMaker.measure` of each."""
    return [_maker.measure(one) for one in candidates]


def make(candidates: Candidates, bucket: Bucket, length: int) -> Row:
    """In a worker: `RowMaker.make`."""
    return _maker.make(candidates, bucket, length)


def make_into(
    file: str,
    form: Form,
    rows: int,
    number: int,
    candidates: Candidates,
    bucket: Bucket,
    length: int,
) -> Row:
    """In a worker: the same, its arrays written as row `number` of `shared_rows` and not in what is returned.

    Raises:
      ValueError: it has other names, shapes or types than `form`.
    """
    row = _maker.make(candidates, bucket, length)
    if (found := form_of(row.arrays)) != form:
        raise ValueError(f"{row.key} encodes to {found}, but the first of its form to {form}")
    with open(file, "r+b") as opened:
        shared = _views(mmap.mmap(opened.fileno(), 0), form, rows)
    for name, value in row.arrays.items():
        shared[name][number] = value
    return dataclasses.replace(row, arrays={})


def form_of(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Names, shapes and types."""
    return {name: (np.shape(value), np.asarray(value).dtype.str) for name, value in arrays.items()}


@contextlib.contextmanager
def shared_rows(form: Form, rows: int) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """A file that other processes can write to while this is open, and the arrays [rows, ...] in it, which stay.

    The memory goes when the last of the arrays does, and with this process at the latest, even a killed one.
    """
    file = os.memfd_create("micro-batch")
    try:
        os.ftruncate(file, max(sum(_sizes(form, rows)), 1))
        yield f"/proc/{os.getpid()}/fd/{file}", _views(mmap.mmap(file, 0), form, rows)
    finally:
        os.close(file)


def _sizes(form: Form, rows: int) -> list[int]:
    sizes = [
        rows * int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in form.values()
    ]
    return [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]


def _views(memory: mmap.mmap, form: Form, rows: int) -> dict[str, np.ndarray]:
    starts = np.cumsum([0, *_sizes(form, rows)]).tolist()
    return {
        name: np.ndarray((rows, *shape), dtype, memory, start)
        for start, (name, (shape, dtype)) in zip(starts, form.items(), strict=False)
    }
