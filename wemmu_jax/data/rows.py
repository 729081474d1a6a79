"""One row: from the records that may fill it to arrays. What worker processes do, and this one without them.

A record that cannot be used is replaced by the next of its row's candidates, which are a pure function of the sample
number. Every host must pad a micro-batch to the same text length without reading the others' pictures; so the length
is settled by the texts alone, and what later replaces a record with a bad picture has a text that fits, if any has.

Storage that fails for the moment makes no record bad: which records a run sees would depend on its luck.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from wemmu_jax.data.buckets import Bucket
from wemmu_jax.data.pools import Feed
from wemmu_jax.data.tasks import Example, make_example
from wemmu_jax.errors import passes

# Seconds between attempts to read; what lasts longer ends the run, which whoever started it starts again.
WAITS = (1.0, 5.0, 25.0)
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Bad:
    """A record that could not be used: the data set, the record's key, and why."""

    data_set: str
    key: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The records that may fill a row, in the order in which they are tried: a feed's number, records' numbers."""

    feed: int
    records: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Measured:
    """The tokens of a row's text, the candidates from the first one on that has a text, and those before it."""

    tokens: int
    candidates: Candidates
    bad: tuple[Bad, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """What a row is made of: "data set/record", the record's number in its set, the row's arrays, and what could not be
    used in its place."""

    key: str
    record: int
    arrays: Mapping[str, np.ndarray]
    bad: tuple[Bad, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class RowMaker:
    """Makes rows; pickled into the workers.

    Attributes:
      feeds: the data sets and their tasks.
      encode_row: (example, bucket, padded text length) -> arrays.
      text_length: the tokens of an example's text.
    """

    feeds: Sequence[Feed]
    encode_row: Callable[[Example, Bucket, int], Mapping[str, np.ndarray]]
    text_length: Callable[[Example], int]

    def measure(self, candidates: Candidates) -> Measured:
        """The text of the first candidate that has one.

        Raises:
          ValueError: none has; names them.
          OSError: storage fails, see `errors.passes`.
        """
        bad: list[Bad] = []
        for place, record in enumerate(candidates.records):
            try:
                tokens = _patiently(self._tokens, candidates.feed, record)
            except (ValueError, OSError) as error:
                bad.append(self._bad(candidates.feed, record, error))
                continue
            left = dataclasses.replace(candidates, records=candidates.records[place:])
            return Measured(tokens, left, tuple(bad))
        raise ValueError(_all_bad(bad))

    def make(self, candidates: Candidates, bucket: Bucket, length: int) -> Row:
        """The row of the first candidate that can be read; after the first one, those whose text fits come before
        those whose text `encode_row` will cut.

        Raises:
          ValueError: none can be; names them.
          OSError: storage fails, see `errors.passes`.
        """
        first, *others = candidates.records
        bad: list[Bad] = []
        too_long: list[int] = []

        def tried(record: int, *, fits: bool) -> Row | None:
            try:
                return _patiently(filled, record, fits)
            except (ValueError, OSError) as error:
                bad.append(self._bad(candidates.feed, record, error))
                return None

        def filled(record: int, fits: bool) -> Row | None:
            example = self.example(candidates.feed, record)
            if fits and self.text_length(example) > length:
                too_long.append(record)
                return None
            key = f"{self.feeds[candidates.feed].name}/{example.key}"
            return Row(key, record, self.encode_row(example, bucket, length), tuple(bad))

        if row := tried(first, fits=False):
            return row
        for fits, records in ((True, others), (False, too_long)):
            for record in records:
                if row := tried(record, fits=fits):
                    return row
        raise ValueError(_all_bad(bad))

    def example(self, feed: int, record: int) -> Example:
        """A record as its feed's task uses it; nothing of it is decoded yet."""
        source, task = self.feeds[feed].source, self.feeds[feed].task
        return make_example(task, source[record])

    def _tokens(self, feed: int, record: int) -> int:
        return self.text_length(self.example(feed, record))

    def _bad(self, feed: int, record: int, error: Exception) -> Bad:
        """Raises `error` where not the record is to blame."""
        if passes(error):
            raise error
        try:
            key = _patiently(lambda: self.feeds[feed].source[record].key)
        except (ValueError, OSError) as another:
            if passes(another):
                raise
            key = f"record {record}"
        return Bad(self.feeds[feed].name, key, str(error) or type(error).__name__)


def _patiently(function: Callable[..., Result], *arguments) -> Result:
    """What `function` gives, tried again after each of `WAITS` where storage fails for the moment."""
    for wait in WAITS:
        try:
            return function(*arguments)
        except OSError as error:
            if not passes(error):
                raise
        time.sleep(wait)
    return function(*arguments)


def _all_bad(bad: Sequence[Bad]) -> str:
    lines = (f"\n  {one.data_set}/{one.key}: {one.reason}" for one in bad)
    return f"{len(bad)} records, one tried after the other, cannot be used:{''.join(lines)}"
