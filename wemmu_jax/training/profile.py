"""`wemmu train --profile`: the JAX profiler around a few steps, once the first ones have compiled."""

import pathlib

import jax

from wemmu_jax.sharding.processes import is_first, say

WARM_UP, STEPS = 3, 3  # steps before the first that is traced, and how many are


class Profiler:
    """Traces steps `first` to `last` of a run into a folder; only the first process does."""

    def __init__(self, folder: pathlib.Path, *, start: int, steps: int):
        """Of a run that begins after step `start` and ends with step `steps`.

        Raises:
          ValueError: it ends before the first step that would be traced.
        """
        self.folder = folder
        self.first, self.last = start + WARM_UP + 1, min(start + WARM_UP + STEPS, steps)
        if self.first > self.last:
            raise ValueError(
                f"nothing to profile: {WARM_UP} steps warm up, and the run goes from step {start} to {steps}"
            )
        self._tracing = False

    def before(self, step: int, state) -> None:
        """Called before `step` is dispatched, with the state that it starts from."""
        if step == self.first and is_first():
            jax.block_until_ready(state)
            jax.profiler.start_trace(self.folder)
            self._tracing = True

    def after(self, step: int, state) -> None:
        """Called after `step` was dispatched, with the state that it gives."""
        if step == self.last and self._tracing:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends the trace if there is one, and says where it lies."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            say(
                f"profile of steps {self.first} to {self.last}: {self.folder}; open it with xprof or TensorBoard, "
                "or its *.trace.json.gz with ui.perfetto.dev"
            )
