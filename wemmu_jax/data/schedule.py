"""Which rows micro-batch m is made of: a pure function of m, of the mixture and of the pools' sizes.

    micro-batch m -> its arity            off by less than one micro-batch at any m
      the arity's micro-batch j -> bucket, in proportion to the records
      the arity's rows j*B .. (j+1)*B -> task        off by less than one row, at any row
        the task's rows of that bucket -> pool       off by less than one row; in proportion to its records there
          how often the pool has served this bucket before -> a place in its shuffled order

Nothing is remembered from one micro-batch to the next but sums that any start computes again, so training resumes
anywhere and with any number of hosts and workers.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from wemmu_jax.data.pools import Pool, task_arities
from wemmu_jax.data.tasks import Task
from wemmu_jax.data.turns import Turns

# The period of the order in which a task's pools take turns in a bucket: shares are off by at most 1e-4.
PERIOD = 10_000

# Buckets keep their shares exactly over this many micro-batches of an arity, and come in random order within them.
SPAN = 128


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """One row: the `use`-th that pool number `pool` gives to the micro-batch's bucket, counted from 0 (of a pool
    of any size: to all buckets)."""

    pool: int
    use: int


@dataclasses.dataclass(frozen=True)
class MicroBatchPlan:
    """A micro-batch: its number, the pictures in each prompt, the index of its bucket, and its rows."""

    number: int
    arity: int
    bucket: int
    rows: tuple[RowPlan, ...]


class Schedule:
    """The endless sequence of micro-batches."""

    def __init__(
        self,
        mixture: Mapping[Task, float],
        pools: Sequence[Pool],
        *,
        bucket_count: int,
        rows: int,
        seed: int,
    ):
        """Args: the mixture's weights (any scale, all positive), what `gather_pools` made for its tasks, the number
        of buckets, the rows of a micro-batch over all hosts, and the seed of the buckets' order."""
        shares = task_arities(pools, mixture)
        self.arities = tuple(sorted({arity for _, arity in shares}))
        self._turns = Turns(
            [
                sum(share for (_, own), share in shares.items() if own == arity)
                for arity in self.arities
            ]
        )
        self._lanes = [
            _Lane(
                {task: share for (task, own), share in shares.items() if own == arity},
                [(index, pool) for index, pool in enumerate(pools) if pool.arity == arity],
                bucket_count=bucket_count,
                rows=rows,
                entropy=(seed, arity),
            )
            for arity in self.arities
        ]

    @property
    def shares(self) -> dict[tuple[int, int], Fraction]:
        """(arity, index of a bucket) -> its share of all micro-batches."""
        return {
            (arity, bucket): of_arity * of_bucket
            for arity, of_arity, lane in zip(
                self.arities, _proportions(self._turns.shares), self._lanes, strict=True
            )
            for bucket, of_bucket in lane.shares.items()
        }

    def plan(self, number: int) -> MicroBatchPlan:
        """Micro-batch `number`."""
        slot = np.array(number)
        lane = int(self._turns.owner(slot))
        bucket, rows = self._lanes[lane].plan(int(self._turns.counts(slot)[lane]))
        return MicroBatchPlan(number, self.arities[lane], bucket, rows)


class _Lane:
    """The micro-batches of one arity, j = 0, 1, ..."""

    def __init__(
        self,
        weights: Mapping[Task, Fraction],
        pools: Sequence[tuple[int, Pool]],
        *,
        bucket_count: int,
        rows: int,
        entropy: tuple[int, ...],
    ):
        self._tasks = Turns(list(weights.values()))
        self._pools = [
            [(index, pool) for index, pool in pools if pool.task is task] for task in weights
        ]
        shares = _bucket_shares(weights, [pool for _, pool in pools], bucket_count)
        self._bucket_shares = shares
        self._bucket_ids = np.array([bucket for bucket, share in enumerate(shares) if share])
        self._buckets = Turns([share for share in shares if share])
        self._rows, self._entropy = rows, entropy
        self._used = {0: np.zeros((len(self._pools), bucket_count), np.int64)}
        self._orders: dict[tuple[int, int], _Order] = {}

    @property
    def shares(self) -> dict[int, Fraction]:
        """Bucket -> its share of the arity's micro-batches."""
        return dict(zip(self._bucket_ids.tolist(), _proportions(self._buckets.shares), strict=True))

    def plan(self, j: int) -> tuple[int, tuple[RowPlan, ...]]:
        """The bucket and the rows of the arity's micro-batch j."""
        span, place = divmod(j, SPAN)
        buckets = self._span_buckets(span)
        used = _with(self._used_before(span), buckets[:place], self._rows_of(span, place))
        bucket = int(buckets[place])

        counts = self._tasks.counts(np.arange(j * self._rows, (j + 1) * self._rows + 1))
        tasks = np.diff(counts, axis=0).argmax(axis=1)
        rows = np.empty((self._rows, 2), np.int64)  # pool, use
        for task in np.unique(tasks):
            mine = tasks == task
            slots = used[task, bucket] + np.arange(mine.sum())
            rows[mine] = self._served(task, bucket, slots, used[task])
        return bucket, tuple(RowPlan(pool, use) for pool, use in rows.tolist())

    def _served(self, task: int, bucket: int, slots: np.ndarray, used: np.ndarray) -> np.ndarray:
        """int64[N, 2], pool and use: who serves a task's rows number `slots` of a bucket, when so many rows of the task
        have been in each bucket (`used`)."""
        order = self._order(task, bucket)
        owners = order.turns.owner(slots)
        uses = np.take_along_axis(order.turns.counts(slots), owners[:, None], axis=1)[:, 0]
        for column, place in enumerate(order.pools):
            if self._pools[task][place][
                1
            ].any_size:  # what it has given to the other buckets counts as well
                others = (b for b in self._bucket_ids.tolist() if b != bucket)
                given = sum(self._order(task, b).count(place, used[b]) for b in others)
                uses[owners == column] += given
        indices = np.array([self._pools[task][place][0] for place in order.pools])
        return np.stack([indices[owners], uses], axis=1)

    def _order(self, task: int, bucket: int) -> "_Order":
        """The turns of a task's pools in a bucket, each as often as it has records there: a picture is as rare in
        the one bucket as in the other. Threads may make one twice, alike."""
        if (task, bucket) not in self._orders:
            weights = [pool.weight * self._fraction(pool, bucket) for _, pool in self._pools[task]]
            serving = [place for place, weight in enumerate(weights) if weight]
            turns = Turns([weights[place] for place in serving], PERIOD)
            self._orders[task, bucket] = _Order(serving, turns)
        return self._orders[task, bucket]

    def _fraction(self, pool: Pool, bucket: int) -> Fraction:
        """The part of the pool's rows that the bucket would have, were it for this pool alone."""
        if pool.any_size:
            return self._bucket_shares[bucket] / sum(self._bucket_shares)
        return Fraction(int(pool.counts[bucket]), int(pool.counts.sum()))

    def _rows_of(self, span: int, length: int) -> np.ndarray:
        """int64[length, tasks]: the rows of each task in each of the first micro-batches of a span."""
        return np.diff(
            self._tasks.counts((span * SPAN + np.arange(length + 1)) * self._rows), axis=0
        )

    def _span_buckets(self, span: int) -> np.ndarray:
        """int64[SPAN]. Shuffled, because two strict orders beat: with one row a micro-batch, two tasks and two
        buckets, each taking turns, one task would only ever see one bucket."""
        order = self._buckets.owner(np.arange(span * SPAN, (span + 1) * SPAN))
        lots = np.random.SeedSequence((*self._entropy, span)).generate_state(SPAN)
        return self._bucket_ids[order[np.argsort(lots, kind="stable")]]

    def _used_before(self, span: int) -> np.ndarray:
        """int64[tasks, buckets]: rows before a span. Kept for each span; threads may compute one twice, alike."""
        known = span
        while known not in self._used:
            known -= 1
        for new in range(known + 1, span + 1):
            rows = self._rows_of(new - 1, SPAN)
            self._used[new] = _with(self._used[new - 1], self._span_buckets(new - 1), rows)
        return self._used[span]


@dataclasses.dataclass(frozen=True)
class _Order:
    """The order in which a task's pools serve a bucket.

    Attributes:
      pools: those of the task's pools that have records there, by their places among them.
      turns: theirs.
    """

    pools: Sequence[int]
    turns: Turns

    def count(self, pool: int, rows: int) -> int:
        """How many of the bucket's first `rows` rows the pool serves."""
        return int(self.turns.counts(np.array(rows))[self.pools.index(pool)])


def _with(used: np.ndarray, buckets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`used` [tasks, buckets], and the rows [N, tasks] of N micro-batches of `buckets` [N]."""
    total = used.T.copy()
    np.add.at(total, buckets, rows)
    return total.T


def _proportions(shares: Sequence[int]) -> list[Fraction]:
    return [Fraction(share, sum(shares)) for share in shares]


def _bucket_shares(
    weights: Mapping[Task, Fraction], pools: Sequence[Pool], bucket_count: int
) -> list[Fraction]:
    """Shares in which each pool on average uses up its buckets alike; pools of any size go along."""
    shares = [Fraction(0)] * bucket_count
    for task, weight in weights.items():
        own = [pool for pool in pools if pool.task is task]
        whole = sum(pool.weight for pool in own)
        for pool in own:
            if pool.any_size:
                continue
            counts = pool.counts.tolist()
            for bucket, count in enumerate(counts):
                shares[bucket] += weight * pool.weight / whole * Fraction(count, sum(counts))
    return shares if any(shares) else [Fraction(1)] * bucket_count
