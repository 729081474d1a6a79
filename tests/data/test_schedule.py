"""The order of arities, tasks, data sets, buckets and records."""

import time
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest

from wemmu_jax.data.buckets import make_buckets
from wemmu_jax.data.pools import Feed, gather_pools, task_arities
from wemmu_jax.data.records import Picture, Record
from wemmu_jax.data.schedule import SPAN, Schedule
from wemmu_jax.data.tasks import Task
from wemmu_jax.data.turns import Turns, exact, whole_shares

STAGES = {
    "1 and 2": {Task.REC: 50, Task.T2I: 47, Task.UNCOND: 3},
    "3": {Task.S_EDIT: 55, Task.T2I: 25, Task.REC: 20, Task.UNCOND: 10},
    "4": {Task.S_EDIT: 35, Task.M_EDIT: 20, Task.T2I: 25, Task.REC: 20, Task.UNCOND: 10},
}


class Sized:
    """A source that has sizes and source counts, and pictures that are never loaded."""

    def __init__(self, sizes, source_counts):
        self._sizes, self._source_counts = np.array(sizes), np.array(source_counts)

    def __len__(self):
        return len(self._sizes)

    def __getitem__(self, index):
        picture = Picture(*self._sizes[index].tolist(), lambda height, width: None)
        return Record(str(index), "text", (picture,) * self._source_counts[index], picture)

    def sizes(self):
        return self._sizes

    def source_counts(self):
        return self._source_counts


class AnySize:
    """A source of captioned pictures that are drawn at any size."""

    def __init__(self, length):
        self._length = length

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        return Record(str(index), "text", (), Picture(None, None, lambda height, width: None))


def random_source(length, source_counts, seed):
    rng = np.random.default_rng(seed)
    aspects = np.exp(rng.normal(0, 0.5, length))
    sizes = np.stack([500 * np.sqrt(aspects), 500 / np.sqrt(aspects)], 1).round().astype(int)
    return Sized(sizes, rng.choice(source_counts, length))


def feeds():
    captions, more = random_source(700, [0], 0), random_source(300, [0], 1)
    edits, compositions = random_source(500, [1], 2), random_source(400, [2, 2, 2, 3, 4], 3)
    return [
        Feed("captions", Task.T2I, captions, 3.0),
        Feed("more", Task.T2I, more, 1.0),
        Feed("captions", Task.REC, captions),
        Feed("drawn", Task.REC, AnySize(50), 0.5),
        Feed("more", Task.UNCOND, more),
        Feed("edits", Task.S_EDIT, edits),
        Feed("compositions", Task.M_EDIT, compositions),
    ]


def build(mixture, rows, seed=0, base=512):
    buckets = make_buckets(base, multiple=32)
    pools = gather_pools(feeds(), mixture, buckets, rows)
    return pools, Schedule(mixture, pools, bucket_count=len(buckets), rows=rows, seed=seed)


def worst_lag(counts, slots, shares):
    """The largest |turns had - share of all turns|, exactly, as a fraction."""
    shares = np.array(shares, np.int64)
    return Fraction(
        int(np.abs(counts * shares.sum() - slots[:, None] * shares).max()), int(shares.sum())
    )


@pytest.mark.parametrize("mixture", STAGES.values(), ids=STAGES)
def test_arities_and_tasks_stay_within_one_over_100k_micro_batches(mixture):
    pools, schedule = build(mixture, rows=8)
    slots = np.arange(100_001)
    shares = task_arities(pools, mixture)
    whole = sum(map(exact, mixture.values()))
    for task in mixture:
        total = sum(share for (own, _), share in shares.items() if own is task)
        assert total == Fraction(mixture[task]) / whole
    for arity in {arity for _, arity in shares}:
        wanted = sum(share for (_, own), share in shares.items() if own == arity)
        counts = schedule._turns.counts(slots)[:, schedule.arities.index(arity)]
        lag = np.abs(counts * wanted.denominator - slots * wanted.numerator).max()
        assert lag < wanted.denominator
        lane = schedule._lanes[schedule.arities.index(arity)]
        of_arity = [share / wanted for (_, own), share in shares.items() if own == arity]
        counts = lane._tasks.counts(slots)
        assert worst_lag(counts, slots, lane._tasks.shares) < 1
        period = sum(lane._tasks.shares)
        assert [Fraction(part, period) for part in lane._tasks.shares] == of_arity


def test_turns_stay_within_one_for_hard_shares():
    rng = np.random.default_rng(0)
    hard = [[1], [1, 1], [1, 1, 1, 997], [1] * 40, [500, 300, 200, 1, 1, 1], list(range(1, 30))]
    hard += [rng.integers(1, 60, size=rng.integers(2, 20)).tolist() for _ in range(100)]
    for shares in hard:
        turns = Turns([Fraction(share) for share in shares])
        slots = np.arange(2 * sum(shares) + 2)
        counts = turns.counts(slots)
        assert worst_lag(counts, slots, turns.shares) < 1, shares
        owners = turns.owner(slots[:-1])
        assert (np.diff(counts, axis=0).argmax(1) == owners).all()


def test_the_simple_largest_deficit_breaks_the_bound():
    """Why `Turns` goes by deadlines: giving each slot to whoever is furthest behind is off by more than one."""
    shares = np.array([100, 3, 100, 20, 100, 2, 20, 100, 1])
    taken, worst = np.zeros(len(shares)), 0.0
    for slot in range(1, shares.sum() + 1):
        taken[np.argmax(slot * shares / shares.sum() - taken)] += 1
        worst = max(worst, np.abs(slot * shares / shares.sum() - taken).max())
    assert worst >= 1


def test_shares_with_a_period_too_long_are_rounded():
    weights = [Fraction(123_457, 999_983), Fraction(1, 10**9), Fraction(1, 3)]
    whole = whole_shares(weights, max_period=10_000)
    assert sum(whole) == 10_000 and min(whole) == 1
    for share, weight in zip(whole, weights, strict=True):
        assert abs(share / 10_000 - weight / sum(weights)) <= 1e-4
    assert whole_shares([exact(0.5), exact(0.47), exact(0.03)]) == (50, 47, 3)


@pytest.mark.parametrize("rows", [1, 12])
@pytest.mark.parametrize("mixture", STAGES.values(), ids=STAGES)
def test_plans_add_up(mixture, rows):
    """Every plan against counting by hand: shares, uses, and no record twice within an epoch of its pool."""
    pools, schedule = build(mixture, rows)
    shares = task_arities(pools, mixture)
    of_arity = Counter()
    for (_, arity), share in shares.items():
        of_arity[arity] += share
    within = {place: float(share / of_arity[place[1]]) for place, share in shares.items()}
    made, tasks_of, rows_of = Counter(), Counter(), Counter()
    used, drawn = Counter(), defaultdict(list)
    for number in range(400):
        plan = schedule.plan(number)
        assert plan.number == number and len(plan.rows) == rows
        made[plan.arity] += 1
        for arity, share in of_arity.items():
            assert abs(made[arity] - share * (number + 1)) < 1
        for row in plan.rows:
            pool = pools[row.pool]
            assert pool.arity == plan.arity
            place = (row.pool, None if pool.any_size else plan.bucket)
            assert row.use == used[place], "uses are counted without gaps"
            used[place] += 1
            drawn[place].append(pool.record(plan.bucket, row.use, seed=0))
            tasks_of[pool.task, plan.arity] += 1
            rows_of[plan.arity] += 1
            for place, share in within.items():
                assert abs(tasks_of[place] - share * rows_of[place[1]]) < 1 - 1e-9
    for (index, bucket), records in drawn.items():
        size = len(pools[index].members[bucket or 0])
        for start in range(0, len(records), size):
            epoch = records[start : start + size]
            assert len(set(epoch)) == len(epoch)
    if rows == 12:
        assert any(len(records) > len(set(records)) for records in drawn.values())


def test_epochs_are_whole_and_differ():
    pools, _ = build({Task.T2I: 1}, rows=4)
    pool = pools[0]
    bucket = int(pool.counts.argmax())
    size = int(pool.counts[bucket])
    epochs = [[pool.record(bucket, e * size + k, seed=5) for k in range(size)] for e in range(3)]
    assert all(sorted(epoch) == pool.members[bucket].tolist() for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != [pool.record(bucket, k, seed=6) for k in range(size)]


def test_resume_at_a_million_is_fast_and_equal_to_running_there():
    _, running = build(STAGES["4"], rows=4)
    seen = [running.plan(number) for number in range(SPAN * 12)]
    for number in (len(seen) - 1, 5 * SPAN, 77):
        assert build(STAGES["4"], rows=4)[1].plan(number) == seen[number]
    assert build(STAGES["4"], rows=4, seed=1)[1].plan(77) != seen[77]
    start = time.monotonic()
    _, far = build(STAGES["4"], rows=2304)
    plan = far.plan(1_000_000)
    assert time.monotonic() - start < 10
    assert plan == build(STAGES["4"], rows=2304)[1].plan(1_000_000)


def test_buckets_come_in_proportion_and_do_not_beat_with_the_tasks():
    sizes = [(512, 512)] * 50 + [(700, 350)] * 50
    source = Sized(sizes, [0] * 100)
    mixture = {Task.T2I: 1, Task.UNCOND: 1}
    buckets = make_buckets(512, multiple=32, count=3, max_ratio=2)
    pools = gather_pools([Feed("a", task, source) for task in mixture], mixture, buckets, 1)
    schedule = Schedule(mixture, pools, bucket_count=3, rows=1, seed=0)
    seen = Counter()
    for number in range(10 * SPAN):
        plan = schedule.plan(number)
        seen[plan.bucket, pools[plan.rows[0].pool].task] += 1
    by_bucket = [sum(seen[bucket, task] for task in mixture) for bucket in range(3)]
    assert by_bucket == [0, 5 * SPAN, 5 * SPAN]
    assert all(seen[bucket, task] > 2.2 * SPAN for bucket in (1, 2) for task in mixture)


def draw(feeds, mixture, micro_batches, rows=8):
    """(record, data set) -> how often it comes, and the pools."""
    buckets = make_buckets(512, multiple=32, count=3, max_ratio=2)
    pools = gather_pools(feeds, mixture, buckets, rows)
    schedule = Schedule(mixture, pools, bucket_count=3, rows=rows, seed=0)
    drawn = Counter()
    for number in range(micro_batches):
        plan = schedule.plan(number)
        for row in plan.rows:
            pool = pools[row.pool]
            drawn[pool.feed, pool.record(plan.bucket, row.use, seed=0)] += 1
    return pools, drawn


def test_data_sets_of_other_aspects_use_up_their_records_alike():
    """One is wide and seldom tall, one tall and seldom wide, one is drawn at any size."""
    wide, tall = [(362, 724)], [(724, 362)]
    feeds = [
        Feed("wide", Task.T2I, Sized(wide * 270 + tall * 30, [0] * 300), 2.0),
        Feed("tall", Task.T2I, Sized(wide * 20 + tall * 180, [0] * 200), 1.0),
        Feed("drawn", Task.T2I, AnySize(100), 1.0),
    ]
    _, drawn = draw(feeds, {Task.T2I: 1}, 5 * SPAN)
    rows = 5 * SPAN * 8
    for feed, share in enumerate((0.5, 0.25, 0.25)):
        uses = [drawn[feed, record] for record in range(len(feeds[feed].source))]
        assert sum(uses) == pytest.approx(share * rows, abs=4)
        assert max(uses) - min(uses) <= 1


def test_a_data_set_without_a_bucket_leaves_it_to_others():
    square, tall = [(512, 512)], [(724, 362)]
    feeds = [
        Feed("all", Task.T2I, Sized(square * 60 + tall * 60, [0] * 120)),
        Feed("square", Task.T2I, Sized(square * 40, [0] * 40)),
    ]
    pools, drawn = draw(feeds, {Task.T2I: 1}, 2 * SPAN)
    assert [pool.counts.tolist() for pool in pools] == [[0, 60, 60], [0, 40, 0]]
    for feed in (0, 1):
        share = sum(count for (own, _), count in drawn.items() if own == feed) / (2 * SPAN * 8)
        assert share == pytest.approx(0.5, abs=0.01)


def test_a_bucket_short_of_records_merges_for_its_arity_alone():
    square, tall = [(512, 512)] * 50, [(724, 362)]
    buckets = make_buckets(512, multiple=32, count=3, max_ratio=2)
    feeds = [
        Feed("captions", Task.T2I, Sized(square + tall * 20, [0] * 70)),
        Feed("edits", Task.S_EDIT, Sized(square + tall * 3, [1] * 53)),
    ]
    captions, edits = gather_pools(feeds, [Task.T2I, Task.S_EDIT], buckets, rows=8)
    assert captions.counts.tolist() == [0, 50, 20]
    assert edits.counts.tolist() == [0, 53, 0]


def test_what_cannot_be_served_is_an_error():
    buckets = make_buckets(512, multiple=32)
    source = random_source(5, [1], 0)
    with pytest.raises(ValueError, match="no data set feeds M-Edit"):
        gather_pools([Feed("a", Task.S_EDIT, source)], [Task.S_EDIT, Task.M_EDIT], buckets, 1)
    with pytest.raises(ValueError, match="'a': none of its 5 records can serve task T2I"):
        gather_pools([Feed("a", Task.T2I, source)], [Task.T2I], buckets, 1)
