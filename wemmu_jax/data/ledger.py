"""The ledger of a run: every record that could not be used, written as it is met, and the end of the run when they are
too many. JSON lines `{"data_set", "key", "reason"}`; a record is written once, however often it is met."""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterable

from wemmu_jax.data.pipeline import MicroBatch
from wemmu_jax.data.pools import Feed
from wemmu_jax.data.rows import Bad

# A share means nothing among the first few rows.
LEAST_ROWS = 1000


class TooManyReplaced(ValueError):
    """More rows had to be replaced than the config allows."""


class Ledger:
    """Of one process, for the rows that it made; how many were replaced is counted over all processes."""

    def __init__(self, file: pathlib.Path, *, share: float):
        """Goes on with what an earlier run wrote. `share`: the part of the rows that may have been replaced."""
        self._file, self._share = file, share
        self._known: set[tuple[str, str]] = set()
        self._reasons: collections.Counter[tuple[str, str]] = collections.Counter()
        self._rows = self._replaced = 0
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        if whole != lines:  # a run was killed while it wrote
            file.write_bytes(b"".join(whole))
        for line in whole:
            row = json.loads(line)
            self._known.add((row["data_set"], row["key"]))

    def note_indexed(self, feeds: Iterable[Feed]) -> int:
        """Writes what the data sets' indexes found; returns how many records that is."""
        # A set feeds several tasks, and one that is held out may have the name of one that is not.
        sources = {(feed.name, id(feed.source)): feed.source for feed in feeds}
        found = [
            (name, problem)
            for (name, _), source in sources.items()
            if hasattr(source, "problems")
            for problem in source.problems()
        ]
        self._write(Bad(name, problem.key, problem.reason) for name, problem in found)
        return sum(problem.records for _, problem in found)

    def note(self, micro_batch: MicroBatch) -> int:
        """Writes what a micro-batch could not use; returns how many records that is."""
        self._write(micro_batch.bad)
        for one in micro_batch.bad:
            self._reasons[one.data_set, one.reason.partition("\n")[0]] += 1
        return len(micro_batch.bad)

    def count(self, rows: int, replaced: int) -> None:
        """Counts rows of all processes, which must all call it alike, or one would stop while the others wait for it.

        Raises:
          TooManyReplaced: more than the share of the rows so far had to be replaced.
        """
        self._rows += rows
        self._replaced += replaced
        if self._replaced > self._share * max(self._rows, LEAST_ROWS):
            worst = "".join(
                f"\n  {count} x {name}: {reason}"
                for (name, reason), count in self._reasons.most_common(10)
            )
            raise TooManyReplaced(
                f"{self._replaced} of {self._rows} rows had to be replaced, more than the share {self._share} that "
                f"data.bad_share allows; all are in {self._file.parent}, this process met:{worst or ' none'}"
            )

    def _write(self, found: Iterable[Bad]) -> None:
        new = {(one.data_set, one.key): one for one in found}
        lines = [
            json.dumps(dataclasses.asdict(one), ensure_ascii=False) + "\n"
            for place, one in new.items()
            if place not in self._known
        ]
        self._known |= new.keys()
        if lines:
            with self._file.open("a", encoding="utf-8", errors="replace") as file:
                file.write("".join(lines))
