"""Ends a process that has got stuck, which nothing else would: the threads that tell the others that it is alive go
on, and of several processes JAX takes SIGTERM for itself and waits for the next step."""

import faulthandler
import os
import sys
import threading

# Seconds. The longest that a healthy run is silent is a picture of a new kind: four programs, each compiled in up to
# ten minutes on a slow host. A save to slow storage has twenty, by Orbax's own limit, and as many again where it makes
# up for one that failed; exchanges between processes have an hour. Ending a run that was only slow costs little: what
# it has compiled is kept.
LIMIT = 3600
_LOOKS = 10


class Watchdog:
    """While it is entered, ends the process with EX_TEMPFAIL (75, the same command again) once `moved` was not called
    for `limit` seconds, and writes the stacks of all threads to stderr. No other exit would do: one that is stuck in a
    system call or on a device raises nothing and runs no handler."""

    def __init__(self, limit: float = LIMIT):
        self._limit = limit
        self._moves = 0
        self._left = threading.Event()

    def moved(self) -> None:
        """Something has come to its end: it is not stuck."""
        self._moves += 1

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._left.set()

    def _watch(self) -> None:
        moves, looks = self._moves, 0
        # By looks and not by the clock, for which a process that was held (SIGSTOP) would have been stuck.
        while looks < _LOOKS:
            if self._left.wait(self._limit / _LOOKS):
                return
            looks = looks + 1 if moves == self._moves else 0
            moves = self._moves
        try:
            self._say()
        finally:  # also where there is no stderr to write to
            os._exit(os.EX_TEMPFAIL)

    def _say(self) -> None:
        print(
            f"nothing has come to its end for {self._limit:g} s: this process is stuck, and ends with "
            f"{os.EX_TEMPFAIL}, which asks for the same command again. Where its threads are:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback()
