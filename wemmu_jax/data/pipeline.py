"""The input pipeline: micro-batch m as arrays, by random access or as a Grain iterator.

How a row becomes arrays is the model's affair: it comes in as two functions, `encode_row` and `text_length`.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import grain
import numpy as np

from wemmu_jax.data import prompts
from wemmu_jax.data.buckets import Bucket
from wemmu_jax.data.pools import Feed, gather_pools
from wemmu_jax.data.schedule import RowPlan, Schedule
from wemmu_jax.data.tasks import Example, Task, make_example

_T = TypeVar("_T")


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
    """

    number: int
    bucket: Bucket
    arity: int
    text_length: int
    tasks: tuple[Task, ...]
    keys: tuple[str, ...]
    sample_numbers: np.ndarray
    arrays: dict[str, np.ndarray]


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
      caption_template: T2I's prompt around `{caption}`.
      process_index, process_count: which contiguous slice of the rows is this process's.
    """

    feeds: Sequence[Feed]
    mixture: Mapping[Task, float]
    buckets: Sequence[Bucket]
    rows: int
    seed: int
    encode_row: Callable[[Example, Bucket, int], Mapping[str, np.ndarray]]
    text_length: Callable[[Example], int]
    text_lengths: Sequence[int] = (128, 256, 512)
    caption_template: str = prompts.CAPTION_TEMPLATE
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
        self._pools = gather_pools(self.feeds, mixture, self.buckets, self.rows)
        self._schedule = Schedule(
            mixture, self._pools, bucket_count=len(self.buckets), rows=self.rows, seed=self.seed
        )

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, number: int) -> MicroBatch:
        plan = self._schedule.plan(int(number))
        bucket = self.buckets[plan.bucket]
        # Every process looks at all texts, so that all pad to the same length without asking each other.
        examples = [self._example(row, plan.bucket) for row in plan.rows]
        length = self._padded(max(_named(name, self.text_length, x) for name, x in examples))
        local = self.rows // self.process_count
        first = self.process_index * local
        examples = examples[first : first + local]
        names = tuple(name for name, _ in examples)
        tasks = tuple(example.task for _, example in examples)
        encoded = []
        for row, name in enumerate(names):
            encoded.append(_named(name, self.encode_row, examples[row][1], bucket, length))
            # Lets go of its decoded pictures: a micro-batch of them is gigabytes.
            examples[row] = None
        sample = plan.number * self.rows + first
        return MicroBatch(
            number=plan.number,
            bucket=bucket,
            arity=plan.arity,
            text_length=length,
            tasks=tasks,
            keys=names,
            sample_numbers=np.arange(sample, sample + local, dtype=np.uint32),
            arrays=_stack(encoded, names),
        )

    def iterate(self, start: int, *, workers: int, prefetch: int) -> grain.DatasetIterator:
        """Micro-batches start, start + 1, ... Element n of the iterator is `self[start + n]`.

        Args:
          start: number of the first micro-batch.
          workers: threads that make micro-batches; with 0 they are made when asked for.
          prefetch: how many are made ahead at most.
        """
        options = grain.ReadOptions(
            num_threads=workers, prefetch_buffer_size=prefetch if workers else 0
        )
        return iter(grain.MapDataset.source(self)[start:].to_iter_dataset(options))

    def fixed_batches(self, task: Task, count: int) -> tuple[MicroBatch, ...]:
        """The first `count` micro-batches of `task` alone: the same ones at every call, for validation."""
        alone = self._alone(task)
        return tuple(alone[number] for number in range(count))

    def examples(self, task: Task, count: int) -> tuple[Example, ...]:
        """The examples of the first `count` rows of `fixed_batches`, not encoded and on every process alike."""
        alone = self._alone(task)
        plans = map(alone._schedule.plan, range(-(-count // self.rows)))
        found = [alone._example(row, plan.bucket)[1] for plan in plans for row in plan.rows]
        return tuple(found[:count])

    def _alone(self, task: Task) -> "MicroBatches":
        return dataclasses.replace(self, mixture={task: 1.0})

    def _example(self, row: RowPlan, bucket: int) -> tuple[str, Example]:
        pool = self._pools[row.pool]
        feed, index = self.feeds[pool.feed], pool.record(bucket, row.use, self.seed)
        record = _named(f"{feed.name}, record {index}", feed.source.__getitem__, index)
        example = make_example(pool.task, record, caption_template=self.caption_template)
        return f"{feed.name}/{record.key}", example

    def _padded(self, longest: int) -> int:
        return next((size for size in self.text_lengths if size >= longest), self.text_lengths[-1])


def _named(name: str, function: Callable[..., _T], *arguments) -> _T:
    try:
        return function(*arguments)
    except (ValueError, OSError) as error:
        raise ValueError(f"{name}: {error}") from error


def _stack(rows: Sequence[Mapping[str, np.ndarray]], names: Sequence[str]) -> dict[str, np.ndarray]:
    def form(row):
        return {key: (np.shape(value), np.asarray(value).dtype) for key, value in row.items()}

    for row, name in zip(rows, names, strict=True):
        if form(row) != form(rows[0]):
            raise ValueError(f"{name} encodes to {form(row)}, but {names[0]} to {form(rows[0])}")
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
