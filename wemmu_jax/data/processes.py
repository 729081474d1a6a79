"""Processes that work for this one: they end with it, and one that is killed is started again."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

# Work that takes its process with it every time, by its memory or by a decoder's fault, must not do so for ever.
MOST_DEATHS = 5


def end_with_parent() -> None:
    """In a worker process of multiprocessing: ends it when the process that asked for it dies, however it dies.

    Not PR_SET_PDEATHSIG: of a worker that a server forked it tells of the server's death, which waits for its workers,
    and it fires when the thread that started the process ends."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    # Until a pipe is closed that only the parent holds, or it has been closed.
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGKILL)


def each(function: Callable, jobs: Sequence[tuple], processes: int) -> Iterator[Any]:
    """`function(*job)` for each job as they are done, in any order; in so many processes, with 0 in this one. A job
    whose process was killed is done again.

    Raises:
      ChildProcessError: processes were killed over and over.
    """
    if processes == 0 or len(jobs) < 2:
        yield from (function(*job) for job in jobs)
        return
    left, deaths = dict(enumerate(jobs)), 0
    while left:
        before = len(left)
        for number, result in _while_alive(function, left, processes):
            del left[number]
            yield result
        deaths = deaths + 1 if len(left) == before else 1
        if left and deaths == MOST_DEATHS:
            raise ChildProcessError(
                f"worker processes were killed {MOST_DEATHS} times with nothing done in between; is memory short? "
                "Run the same command again, it goes on from what is done; fewer --processes take less memory"
            )


def _while_alive(
    function: Callable, jobs: dict[int, tuple], processes: int
) -> Iterator[tuple[int, Any]]:
    """(number, result) of jobs, in any order, until all are done or a process was killed."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        processes, mp_context=context, initializer=end_with_parent
    ) as pool:
        try:
            futures = {pool.submit(function, *job): number for number, job in jobs.items()}
            for future in concurrent.futures.as_completed(futures):
                # What was done before the others' process was killed comes too.
                if not isinstance(future.exception(), BrokenProcessPool):
                    yield futures[future], future.result()
        except BrokenProcessPool:  # while the jobs were handed over
            return
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
