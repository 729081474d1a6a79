"""Which records can fill which rows: the pools of records that a task draws from one data set.

A feed (a data set given to a task) has a pool for each arity that its records have under the task, and a pool is
divided into buckets. All buckets of one arity are served by all its pools, because a micro-batch has one bucket
and mixes tasks and data sets.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction

import grain
import numpy as np

from wemmu_jax.data import buckets as buckets_lib
from wemmu_jax.data import turns
from wemmu_jax.data.buckets import Bucket
from wemmu_jax.data.records import RecordSource, conversations, source_counts, target_sizes
from wemmu_jax.data.tasks import Task, arities

# Weights count in fractions of a millionth, see `turns.exact`; a smaller one would be none.
LEAST_WEIGHT = 1e-6

# So many are tried before a row is given up.
SUBSTITUTES = 15


@dataclasses.dataclass(frozen=True)
class Feed:
    """A data set given to a task.

    Attributes:
      name: of the data set; goes into keys and errors.
      task: what its records are used for.
      source: the records.
      weight: its part of the task's rows, relative to the task's other feeds.

    Raises:
      ValueError: the weight is not a finite number of at least LEAST_WEIGHT.
    """

    name: str
    task: Task
    source: RecordSource
    weight: float = 1.0

    def __post_init__(self) -> None:
        if type(self.weight) not in (int, float) or not LEAST_WEIGHT <= self.weight < math.inf:
            raise ValueError(
                f"data set {self.name!r}: weight must be a finite number of at least {LEAST_WEIGHT}; "
                f"found {self.weight!r}"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Pool:
    """The records of one feed that have one arity under its task.

    Attributes:
      task, arity: what they are used for, and with how many pictures in the prompt.
      feed: index of the feed.
      weight: part of the task's rows, relative to the task's other pools of any arity.
      members: indices of the records, one array for each bucket; a single array for all of them if `any_size`.
      any_size: the records are drawn at whatever size is asked for, so that every bucket draws from all of them.
    """

    task: Task
    arity: int
    feed: int
    weight: Fraction
    members: tuple[np.ndarray, ...]
    any_size: bool

    @property
    def counts(self) -> np.ndarray:
        """int64[number of buckets] (of `any_size`: [1]), how many records there are."""
        return np.array([len(members) for members in self.members])

    def record(self, bucket: int, use: int, seed: int) -> int:
        """The record of the pool's `use`-th row of bucket `bucket` (of `any_size`: of any bucket).

        Every epoch is a fresh shuffle of all its records: none comes again before all have come, and none is
        left out at an epoch's end.
        """
        division = 0 if self.any_size else bucket
        members = self.members[division]
        order = _order(
            len(members), (seed, list(Task).index(self.task), self.feed, self.arity, division)
        )
        return int(members[order[use]])

    def substitutes(self, bucket: int, sample_number: int, seed: int) -> tuple[int, ...]:
        """Records that may take the place of one that cannot be used, in the row of that global sample number."""
        members = self.members[0 if self.any_size else bucket]
        lots = np.random.SeedSequence((seed, sample_number)).generate_state(SUBSTITUTES, np.uint64)
        return tuple(members[lots % np.uint64(len(members))].tolist())


def gather_pools(
    feeds: Sequence[Feed], tasks: Iterable[Task], buckets: Sequence[Bucket], rows: int
) -> tuple[Pool, ...]:
    """The pools of those feeds that serve `tasks`.

    Buckets in which a task has fewer records than a micro-batch has rows merge into their neighbours, for each arity by
    itself.

    Raises:
      ValueError: a task without a feed, or a feed without a record that can serve its task.
    """
    tasks = tuple(tasks)
    fed = {feed.task for feed in feeds}
    if hungry := [task.value for task in tasks if task not in fed]:
        raise ValueError(f"no data set feeds {', '.join(hungry)}, which the mixture asks for")
    divide = functools.cache(_Division(buckets))
    pools = [
        pool
        for index, feed in enumerate(feeds)
        if feed.task in tasks
        for pool in _pools_of(feed, index, divide)
    ]
    homes = {
        arity: _homes([pool for pool in pools if pool.arity == arity], len(buckets), rows)
        for arity in {pool.arity for pool in pools}
    }
    return tuple(_move(pool, homes[pool.arity]) for pool in pools)


def task_arities(
    pools: Sequence[Pool], mixture: Mapping[Task, float]
) -> dict[tuple[Task, int], Fraction]:
    """The share of all micro-batches' rows of each task and arity.

    A task's weight is exact. How it divides over arities follows the numbers of records, in thousandths: finer
    would only make the schedule's period longer.
    """
    total = sum(turns.exact(mixture[task]) for task in mixture)
    shares = {}
    for task in Task:
        own = sorted({pool.arity for pool in pools if pool.task is task})
        if not own:
            continue
        parts = turns.whole_shares(
            [
                sum(pool.weight for pool in pools if (pool.task, pool.arity) == (task, arity))
                for arity in own
            ],
            max_period=1000,
        )
        for arity, part in zip(own, parts, strict=True):
            shares[task, arity] = turns.exact(mixture[task]) / total * Fraction(part, sum(parts))
    return shares


@functools.lru_cache(maxsize=4096)
def _order(size: int, entropy: tuple[int, ...]) -> grain.MapDataset:
    # One 32-bit word, because that is all of the seed that Grain's shuffle looks at.
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    return grain.MapDataset.range(size).seed(seed).shuffle().repeat()


class _Division:
    """(source, numbers of source pictures, whether conversations) -> its records of each bucket; those that several
    tasks share are there once."""

    def __init__(self, buckets: Sequence[Bucket]):
        self._buckets = buckets

    def __call__(
        self, source: RecordSource, counts: tuple[int, ...], talks: bool
    ) -> tuple[np.ndarray, ...]:
        serving = np.isin(source_counts(source), counts) & (conversations(source) == talks)
        members = np.flatnonzero(serving).astype(np.int32)
        sizes = target_sizes(source)
        if sizes is None:
            return (members,)
        found = buckets_lib.nearest_indices(self._buckets, sizes)[members]
        return tuple(members[found == bucket] for bucket in range(len(self._buckets)))


def _pools_of(feed: Feed, index: int, divide: Callable) -> list[Pool]:
    talks = feed.task is Task.VQA
    own_kind = conversations(feed.source) == talks
    counts, sizes = np.unique(source_counts(feed.source)[own_kind], return_counts=True)
    own = arities(feed.task, counts)
    serving = int(sizes[own >= 0].sum())
    if not serving:
        raise ValueError(
            f"data set {feed.name!r}: none of its {len(feed.source)} records can serve task {feed.task.value}"
        )
    any_size = target_sizes(feed.source) is None
    pools = []
    for arity in np.unique(own[own >= 0]).tolist():
        share = Fraction(int(sizes[own == arity].sum()), serving)
        weight = turns.exact(feed.weight) * share
        members = divide(feed.source, tuple(counts[own == arity].tolist()), talks)
        pools.append(Pool(feed.task, arity, index, weight, members, any_size))
    return pools


def _homes(pools: Sequence[Pool], bucket_count: int, rows: int) -> np.ndarray:
    sized = [pool for pool in pools if not pool.any_size]
    unlimited = {pool.task for pool in pools if pool.any_size}
    limited = {pool.task for pool in sized} - unlimited
    if not limited:
        return np.arange(bucket_count)
    counts = [
        sum(pool.counts for pool in sized if pool.task is task) for task in Task if task in limited
    ]
    return buckets_lib.merge(np.stack(counts), np.full(len(counts), rows))


def _move(pool: Pool, homes: np.ndarray) -> Pool:
    if pool.any_size:
        return pool
    members = tuple(
        _joined([pool.members[old] for old in np.flatnonzero(homes == bucket)])
        for bucket in range(len(homes))
    )
    return dataclasses.replace(pool, members=members)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    if len(parts) == 1:
        return parts[0]
    return np.sort(np.concatenate([*parts, np.zeros(0, np.int32)]))
