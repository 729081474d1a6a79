"""What a run tells: a line on the terminal, the same numbers in TensorBoard and in `metrics.jsonl`."""

import collections
import contextlib
import json
import pathlib
from collections.abc import Mapping

import numpy as np
from tensorboardX import SummaryWriter

from wemmu_jax.training.throughput import Stopwatch, Work


def clock(seconds: float) -> str:
    """3725.4 -> '1:02:05'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def task_means(tasks: list[str], losses: np.ndarray) -> dict[str, float]:
    """Mean loss of each task among rows float32[N] with their tasks."""
    rows = collections.defaultdict(list)
    for task, loss in zip(tasks, losses, strict=True):
        rows[task].append(loss)
    return {task: float(np.mean(values)) for task, values in sorted(rows.items())}


def _validated(path: pathlib.Path, *, until: int) -> set[int]:
    """The steps up to `until` whose validation losses a run has written before; a last line may be half there."""
    steps = set()
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if any(name.startswith("validation/") for name in row):
                steps.add(row["step"])
    return {step for step in steps if step <= until}


class Progress:
    """Counts samples and writes metrics. Only the first process writes; the others stay silent.

    Attributes:
      validated: the steps whose validation losses were written when this run began.
      stopwatch: times what a step waits for, and what is none of its time.
    """

    def __init__(self, workdir: pathlib.Path, *, steps: int, batch: int, start: int, writes: bool):
        # What a run that was killed wrote past its last checkpoint is hidden, and written again.
        folder = str(workdir / "tensorboard")
        self.validated = _validated(workdir / "metrics.jsonl", until=start)
        self._writer = SummaryWriter(folder, purge_step=start + 1) if writes else None
        self._lines = (workdir / "metrics.jsonl").open("a") if writes else None
        self._steps = steps
        self.stopwatch = Stopwatch(batch=batch, start=start)

    def step(
        self, step: int, values: Mapping[str, float], *, line: bool, work: Work | None = None
    ) -> None:
        """Records the metrics of optimizer step `step`, which did `work`; prints them if `line`."""
        speeds = self.stopwatch.lap(step, work or Work())
        left = (self._steps - step) / speeds.pop("steps_per_second")
        values = {**values, **speeds, "seconds_left": left}
        self.write(step, {f"train/{name}": value for name, value in values.items()})
        if line and self._writer:
            parts = [
                f"step {step:>6}/{self._steps}",
                f"loss {values['loss']:.4f}",
                f"grad norm {values['gradient_norm']:.3f}",
                f"{values['samples_per_second']:.1f} samples/s",
            ]
            if "mfu" in values:
                parts.append(f"MFU {values['mfu']:.1%}")
            if "data_seconds" in values:
                parts.append(f"data {values['data_seconds'] / values['step_seconds']:.0%}")
            print("  ".join([*parts, f"{clock(left)} left"]), flush=True)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars into TensorBoard and the JSONL file."""
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._lines.write(json.dumps({"step": step, **values}) + "\n")
            self._lines.flush()

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """A picture uint8[H, W, 3] into TensorBoard."""
        if self._writer:
            self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes what is left."""
        if self._writer:
            self._writer.close()
            self._lines.close()
