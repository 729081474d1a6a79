"""The input pipeline: micro-batch m as arrays, by random access or as a Grain iterator.

How a row becomes arrays is the model's affair: it comes in as two functions, `encode_row` and `text_length`.
"""

import dataclasses
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence

import grain
import numpy as np

from wemmu_jax.data import workers
from wemmu_jax.data.buckets import Bucket
from wemmu_jax.data.pools import Feed, gather_pools
from wemmu_jax.data.rows import Bad, Candidates, Row, RowMaker
from wemmu_jax.data.schedule import MicroBatchPlan, RowPlan, Schedule
from wemmu_jax.data.tasks import Example, Task

# Micro-batches that are put together at a time while workers make their rows.
_AT_ONCE = 2


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """This process's rows of a micro-batch.

    Attributes:
      number: the micro-batch's, from 0.
      bucket: the size of every target.
      arity: the number of pictures in every prompt.
      text_length: what every text is padded to, the same on all hosts.
      tasks: the task of each row.
      keys: "data set/record" of each row.
      sample_numbers: uint32[B], the global sample number of each row: number * rows over all hosts + row.
      arrays: what `encode_row` gave, stacked: name -> [B, ...].
      bad: what was to be in these rows and could not be used.
    """

    number: int
    bucket: Bucket
    arity: int
    text_length: int
    tasks: tuple[Task, ...]
    keys: tuple[str, ...]
    sample_numbers: np.ndarray
    arrays: dict[str, np.ndarray]
    bad: tuple[Bad, ...] = ()


@dataclasses.dataclass(kw_only=True, eq=False)
class MicroBatches:
    """The endless sequence of micro-batches; `self[m]` is the m-th, whatever was read before it.

    Attributes:
      feeds: the data sets and the tasks that they feed; those of tasks outside the mixture are left aside.
      mixture: the weight of each task, in any scale; a task of weight 0 does not occur.
      buckets: target sizes, in the order of their aspect, as `make_buckets` gives them.
      rows: of a micro-batch, over all processes.
      seed: of the records' order.
      encode_row: (example, bucket, padded text length) -> arrays, of the same names, shapes and dtypes for all
        examples of one arity. It cuts a text that is longer.
      text_length: the tokens of an example's text.
      text_lengths: what texts are padded to: the smallest that holds the longest text of the micro-batch.
      process_index, process_count: which contiguous slice of the rows is this process's.
      pools: the records that can fill rows, see `gather_pools`.
      maker: makes rows.
    """

    feeds: Sequence[Feed]
    mixture: Mapping[Task, float]
    buckets: Sequence[Bucket]
    rows: int
    seed: int
    encode_row: Callable[[Example, Bucket, int], Mapping[str, np.ndarray]]
    text_length: Callable[[Example], int]
    text_lengths: Sequence[int] = (128, 256, 512)
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self):
        if self.rows <= 0 or self.rows % self.process_count:
            raise ValueError(
                f"the {self.rows} rows of a micro-batch do not divide among {self.process_count} processes"
            )
        if not self.text_lengths or sorted(set(self.text_lengths)) != list(self.text_lengths):
            raise ValueError(f"text_lengths must be increasing; found {tuple(self.text_lengths)}")
        if min(self.mixture.values(), default=0) < 0 or not any(self.mixture.values()):
            raise ValueError(
                f"the mixture must have weights >= 0, one of them above; found {self.mixture}"
            )
        mixture = {task: self.mixture[task] for task in Task if self.mixture.get(task)}
        self.pools = gather_pools(self.feeds, mixture, self.buckets, self.rows)
        self._schedule = Schedule(
            mixture, self.pools, bucket_count=len(self.buckets), rows=self.rows, seed=self.seed
        )
        self.maker = RowMaker(self.feeds, self.encode_row, self.text_length)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, number: int) -> MicroBatch:
        return self._micro_batch(int(number), _Here(self.maker))

    def iterate(
        self, start: int, *, workers: int = 0, threads: int = 0, prefetch: int = 0
    ) -> grain.DatasetIterator:
        """Micro-batches start, start + 1, ... Element n of the iterator is `self[start + n]`.

        Args:
          start: number of the first micro-batch.
          workers: processes that make rows.
          threads: without workers, threads that make micro-batches; with neither they are made when asked for.
          prefetch: how many are made ahead at most.
        """
        elements = _Elements(self, workers)
        threads = _AT_ONCE if workers else threads
        options = grain.ReadOptions(
            num_threads=threads, prefetch_buffer_size=prefetch if threads else 0
        )
        return iter(grain.MapDataset.source(elements)[start:].to_iter_dataset(options))

    def _micro_batch(self, number: int, hands: "_Here | _Workers") -> MicroBatch:
        plan = self.plan(number)
        bucket = self.buckets[plan.bucket]
        measured, length = self._measured(plan, hands)
        local = self.rows // self.process_count
        first = self.process_index * local
        measured = measured[first : first + local]
        rows, arrays = hands.make(plan.arity, [row.candidates for row in measured], bucket, length)
        sample = plan.number * self.rows + first
        return MicroBatch(
            number=plan.number,
            bucket=bucket,
            arity=plan.arity,
            text_length=length,
            tasks=tuple(self.feeds[row.candidates.feed].task for row in measured),
            keys=tuple(row.key for row in rows),
            sample_numbers=np.arange(sample, sample + local, dtype=np.uint32),
            arrays=arrays,
            bad=tuple(
                bad
                for text, row in zip(measured, rows, strict=True)
                for bad in (*text.bad, *row.bad)
            ),
        )

    def _measured(self, plan: MicroBatchPlan, hands: "_Here | _Workers") -> tuple[list, int]:
        """All rows, and what their texts are padded to. Every process looks at all of them, so that all pad to the same
        length without asking each other."""
        measured = hands.measure([self.candidates(plan, row) for row in range(self.rows)])
        return measured, self._padded(max(row.tokens for row in measured))

    def sample(self, number: int, rows: Sequence[int]) -> list[tuple[Example, Row]]:
        """Some of a micro-batch's rows over all processes, each with the example that it is made of in the end."""
        plan, hands = self.plan(number), _Here(self.maker)
        measured, length = self._measured(plan, hands)
        found = []
        for text in (measured[row] for row in rows):
            made = self.maker.make(text.candidates, self.buckets[plan.bucket], length)
            example = self.maker.example(text.candidates.feed, made.record)
            found.append((example, dataclasses.replace(made, bad=text.bad + made.bad)))
        return found

    def fixed_batches(self, task: Task, count: int) -> tuple[MicroBatch, ...]:
        """The first `count` micro-batches of `task` alone: the same ones at every call, for validation."""
        alone = self.alone(task)
        return tuple(alone[number] for number in range(count))

    def examples(self, task: Task, count: int) -> tuple[Example, ...]:
        """What the first `count` rows of `fixed_batches` are made of, on every process alike."""
        alone, found = self.alone(task), []
        for number in range(-(-count // self.rows)):
            rows = range(min(self.rows, count - number * self.rows))
            found += [example for example, _ in alone.sample(number, rows)]
        return tuple(found)

    def alone(self, task: Task) -> "MicroBatches":
        """The same records as micro-batches of one task."""
        return dataclasses.replace(self, mixture={task: 1.0})

    @property
    def shares(self) -> dict[tuple[int, Bucket], float]:
        """(arity, bucket) -> its share of all micro-batches; buckets with too few records are not there."""
        found = self._schedule.shares.items()
        return {(arity, self.buckets[index]): float(share) for (arity, index), share in found}

    def plan(self, number: int) -> MicroBatchPlan:
        """Which rows micro-batch `number` is made of."""
        return self._schedule.plan(number)

    def candidates(self, plan: MicroBatchPlan, row: int) -> Candidates:
        """The record that is to fill a row, and those that may take its place."""
        planned: RowPlan = plan.rows[row]
        pool = self.pools[planned.pool]
        own = pool.record(plan.bucket, planned.use, self.seed)
        sample = plan.number * self.rows + row
        return Candidates(pool.feed, (own, *pool.substitutes(plan.bucket, sample, self.seed)))

    def _padded(self, longest: int) -> int:
        return next((size for size in self.text_lengths if size >= longest), self.text_lengths[-1])


class _Elements:
    """What Grain reads: micro-batches by their number, and the workers that go with the last of who reads them."""

    def __init__(self, data: MicroBatches, count: int):
        self._data = data
        self._hands = _Here(data.maker)
        if count:
            pool = workers.Workers(data.maker, count)
            self._hands = _Workers(pool, count)
            weakref.finalize(self, pool.close)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, number: int) -> MicroBatch:
        return self._data._micro_batch(int(number), self._hands)


@dataclasses.dataclass
class _Here:
    """Makes rows in the thread that asks."""

    maker: RowMaker

    def measure(self, rows: Sequence[Candidates]) -> list:
        return [self.maker.measure(row) for row in rows]

    def make(
        self, arity: int, rows: Sequence[Candidates], bucket: Bucket, length: int
    ) -> tuple[list[Row], dict[str, np.ndarray]]:
        made = [self.maker.make(row, bucket, length) for row in rows]
        forms = [workers.form_of(row.arrays) for row in made]
        for row, form in zip(made, forms, strict=True):
            if form != forms[0]:
                raise ValueError(f"{row.key} encodes to {form}, but {made[0].key} to {forms[0]}")
        return made, {name: np.stack([row.arrays[name] for row in made]) for name in forms[0]}


class _Workers:
    """Makes rows in processes, straight into the micro-batch's arrays."""

    def __init__(self, pool: workers.Workers, count: int):
        self._pool, self._count = pool, count
        self._memory = workers.SharedRows()
        self._forms: dict[tuple, workers.Form] = {}
        self._lock = threading.Lock()

    def measure(self, rows: Sequence[Candidates]) -> list:
        jobs = [(part,) for part in self._parts(rows)]
        return [one for part in self._pool.run(workers.measure, jobs) for one in part]

    def make(
        self, arity: int, rows: Sequence[Candidates], bucket: Bucket, length: int
    ) -> tuple[list[Row], dict[str, np.ndarray]]:
        form = self._form(arity, rows[0], bucket, length)
        with self._memory.lend(form, len(rows)) as (shared, arrays):
            jobs = [(shared, part, bucket, length) for part in self._parts(list(enumerate(rows)))]
            made = self._pool.run(workers.make_into, jobs)
        return [row for part in made for row in part], arrays

    def _parts(self, rows: Sequence) -> list[Sequence]:
        """One for each worker."""
        size = -(-len(rows) // self._count)
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _form(self, arity: int, row: Candidates, bucket: Bucket, length: int) -> workers.Form:
        """What rows of this kind encode to; the first of each kind is made twice to know."""
        kind = (arity, bucket, length)
        with self._lock:
            if kind not in self._forms:
                [made] = self._pool.run(workers.make, [(row, bucket, length)])
                self._forms[kind] = workers.form_of(made.arrays)
            return self._forms[kind]
