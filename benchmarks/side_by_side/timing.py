"""Two libraries in turns: parity first, then seconds."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch

from benchmarks.side_by_side.pair import free, to_numpy

LEAST = 0.2  # seconds of one sample: quick programs are repeated until it is reached
OURS = "ours"


def _nothing() -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Side:
    """What one library does in a row.

    Attributes:
      run: once; returns its outputs, which may still be on their way.
      start, stop: before and after a turn, where both libraries' states do not fit on the device at once; `stop` also
        before the first of all.
    """

    run: Callable[[], Any]
    start: Callable[[], None] = _nothing
    stop: Callable[[], None] = _nothing


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
      ours: this project.
      theirs: rungs of torch, "eager" and "compiled".
      compared: (outputs of ours, of theirs) -> pairs of arrays and tensors that should be equal.
      tolerance: of their relative L2 error.
      flops: of the model, by formula, in one run.
      control: the bare products and attention of the row in both libraries, (ours, theirs).
      apart: see `Sizes`.
      pictures: drawn in one run.
    """

    ours: Side
    theirs: Mapping[str, Side]
    compared: Callable[[Any, Any], Sequence[tuple[Any, Any]]]
    tolerance: float
    flops: float
    control: tuple[Side, Side] | None = None
    apart: bool = False
    pictures: int = 0


@dataclasses.dataclass(frozen=True)
class Result:
    """What was found.

    Attributes:
      error: the largest relative L2 error, of all rungs.
      first: seconds of each side's first run, compilation included.
      seconds: of each side, one for each round; the controls are "control ours" and "control torch".
      flops, pictures: of one run.
    """

    error: float
    first: dict[str, float]
    seconds: dict[str, list[float]]
    flops: float
    pictures: int = 0

    @property
    def best(self) -> str:
        """The faster rung of torch."""
        rungs = self.seconds.keys() - {OURS, "control ours", "control torch"}
        return min(rungs, key=self.median)

    def median(self, side: str) -> float:
        """Seconds of a side."""
        return statistics.median(self.seconds[side])

    def ratio(self, mine: str, other: str) -> tuple[float, float, float]:
        """Median and quartiles of one side's time over another's, round by round."""
        ratios = [a / b for a, b in zip(self.seconds[mine], self.seconds[other], strict=True)]
        return tuple(float(np.quantile(ratios, q)) for q in (0.5, 0.25, 0.75))


def relative_l2(ours, theirs) -> float:
    """||ours - theirs|| / ||theirs|| in float64. Shapes must be equal; infinite where something is not finite."""
    ours = np.asarray(ours).astype(np.float64)
    theirs = to_numpy(theirs) if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
    theirs = theirs.astype(np.float64)
    if ours.shape != theirs.shape:
        raise AssertionError(f"shapes differ: ours {ours.shape}, theirs {theirs.shape}")
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    return float(error) if np.isfinite(error) else math.inf


def _run(side: Side) -> Any:
    outputs = side.run()
    jax.block_until_ready([x for x in jax.tree.leaves(outputs) if isinstance(x, jax.Array)])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return outputs


def _turn(side: Side, row: Row, *, repeats: int = 1) -> float:
    """Seconds of a run."""
    if row.apart:
        side.start()
        _run(side)  # touches fresh memory
    start = time.perf_counter()
    for _ in range(repeats):
        _run(side)
    seconds = (time.perf_counter() - start) / repeats
    if row.apart:
        side.stop()
        free()
    return seconds


def measure(row: Row, *, rounds: int, rungs: Sequence[str] = ("eager", "compiled")) -> Result:
    """Compares what both sides give, then times them in turns.

    Raises:
      AssertionError: they do not agree.
    """
    sides = {OURS: row.ours} | {name: row.theirs[name] for name in rungs}
    first, repeats, error, ours = {}, {}, 0.0, None
    if row.apart:  # modules are built where they will run
        for side in sides.values():
            side.stop()
        free()
    for name, side in sides.items():
        side.start()
        start = time.perf_counter()
        outputs = _run(side)
        first[name] = time.perf_counter() - start
        if name == OURS:
            ours = outputs
        else:
            pairs = row.compared(ours, outputs)
            error = max(error, *(relative_l2(a, b) for a, b in pairs))
        if error > row.tolerance:
            raise AssertionError(f"{name}: relative error {error:.1e} > {row.tolerance:.0e}")
        if row.apart:
            del outputs
            side.stop()
            free()
    del ours
    if row.control:
        sides |= dict(zip(("control ours", "control torch"), row.control, strict=True))
    if rounds:
        for name, side in sides.items():
            # Turns of a row that is apart take long to begin, and begin with a run that is not timed.
            repeats[name] = 1
            if not row.apart:
                _turn(side, row)
                repeats[name] = math.ceil(LEAST / _turn(side, row))
    seconds = {name: [] for name in sides}
    for number in range(rounds):
        # Every other round backwards, so that nobody always comes after the same one.
        for name in list(sides)[:: -1 if number % 2 else 1]:
            seconds[name].append(_turn(sides[name], row, repeats=repeats[name]))
    return Result(error, first, seconds, row.flops, row.pictures)
