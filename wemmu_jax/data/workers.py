"""Processes that make rows, and the memory that they share with the one that trains. Linux only.

A row's work is a pure function of what is asked, so that a worker that was killed costs nothing but time: the pool is
made anew, and whoever waits asks again. Rows are written where the micro-batch will have them.
"""

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import functools
import itertools
import mmap
import multiprocessing
import os
import pickle
import signal
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from typing import Any

import numpy as np

from wemmu_jax.data import nursery
from wemmu_jax.data.buckets import Bucket
from wemmu_jax.data.processes import MOST_DEATHS, end_with_parent
from wemmu_jax.data.rows import Candidates, Measured, Row, RowMaker

_ALIGNMENT = 64
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
          ValueError, OSError: what a job raises.
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
    end_with_parent()
    _maker = nursery.maker if nursery.name == name else nursery.load(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
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
    shared: "Shared", jobs: Sequence[tuple[int, Candidates]], bucket: Bucket, length: int
) -> list[Row]:
    """In a worker: the same for some rows, their arrays written to `shared` and not in what is returned.

    Args:
      shared: the micro-batch's memory.
      jobs: the row's number in it, and what may fill it.
      bucket, length: of all rows.

    Raises:
      ValueError: a row has other names, shapes or types than `shared`.
    """
    arrays = _views(_mapped(shared.name, shared.size), shared.form, shared.rows)
    made = []
    for number, candidates in jobs:
        row = _maker.make(candidates, bucket, length)
        if (found := form_of(row.arrays)) != shared.form:
            raise ValueError(
                f"{row.key} encodes to {found}, but the first of its form to {shared.form}"
            )
        for name, value in row.arrays.items():
            arrays[name][number] = value
        made.append(dataclasses.replace(row, arrays={}))
    return made


def form_of(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Names, shapes and types."""
    return {name: (np.shape(value), np.asarray(value).dtype.str) for name, value in arrays.items()}


@dataclasses.dataclass(frozen=True)
class Shared:
    """Where workers find the memory of a micro-batch, and how it is divided.

    Attributes:
      name: a number of its own and a path, see `_mapped`.
      size: bytes of the memory, of which the rows may need fewer.
      form: of a row's arrays.
      rows: how many there are.
    """

    name: str
    size: int
    form: Form
    rows: int


class SharedRows:
    """Memory that workers write and this process reads, used again: to get it from the system anew, page by page, is a
    tenth of a row's time. It goes when this and the last arrays in it do, and with this process, even a killed one."""

    def __init__(self):
        self._free: list[_Memory] = []

    @contextlib.contextmanager
    def lend(self, form: Form, rows: int) -> Iterator[tuple[Shared, dict[str, np.ndarray]]]:
        """Memory that workers can write to while this is open, and the arrays [rows, ...] in it, which stay. It is lent
        again when they are gone; not after an error, for another worker may be writing still."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = _Memory()
        needed = max(sum(_sizes(form, rows)), 1)
        memory.grow(needed)
        mapped = mmap.mmap(memory.file, needed)
        yield Shared(memory.name, memory.size, form, rows), _views(mapped, form, rows)
        weakref.finalize(mapped, self._free.append, memory).atexit = False


class _Memory:
    """A file in memory that grows. Its name has a number of its own, because descriptors' numbers come again."""

    _numbers = itertools.count()

    def __init__(self):
        self.file, self.size = os.memfd_create("micro-batch"), 0
        self.name = f"{next(self._numbers)} /proc/{os.getpid()}/fd/{self.file}"
        weakref.finalize(self, os.close, self.file).atexit = False

    def grow(self, size: int) -> None:
        """To at least so many bytes."""
        if size > self.size:
            os.ftruncate(self.file, size)
            self.size = size


@functools.lru_cache(maxsize=16)
def _mapped(name: str, size: int) -> mmap.mmap:
    """In a worker: the memory of that name, which stays mapped, because it comes again."""
    with open(name.partition(" ")[2], "r+b") as opened:
        return mmap.mmap(opened.fileno(), size)


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
