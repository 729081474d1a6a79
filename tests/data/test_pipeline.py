"""Micro-batches: the same samples for any number of hosts, workers and threads, and from any start."""

import dataclasses
import itertools
import json
import os
import signal
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from tests.data.test_schedule import AnySize, Sized, feeds
from wemmu_jax.data import workers as workers_lib
from wemmu_jax.data.buckets import make_buckets
from wemmu_jax.data.ledger import Ledger, TooManyReplaced
from wemmu_jax.data.pipeline import MicroBatches
from wemmu_jax.data.pools import Feed
from wemmu_jax.data.sources import build_feeds
from wemmu_jax.data.tasks import Task

MIXTURE = {Task.S_EDIT: 35, Task.M_EDIT: 20, Task.T2I: 25, Task.REC: 20, Task.UNCOND: 10}


def text_length(example):
    return 3 * int(example.key) % 400 if example.task is Task.T2I else len(example.text)


def encode_row(example, bucket, length):
    pixels = [bucket.height, bucket.width, len(example.sources), length]
    return {"key": np.int32(example.key), "form": np.array(pixels, np.int32)}


def batches(**changes):
    settings = {
        "feeds": feeds(),
        "mixture": MIXTURE,
        "buckets": make_buckets(512, multiple=32),
        "rows": 8,
        "seed": 0,
        "encode_row": encode_row,
        "text_length": text_length,
    }
    return MicroBatches(**settings | changes)


def same(a, b):
    plain = [dataclasses.replace(x, arrays={}, sample_numbers=None) for x in (a, b)]
    return (
        plain[0] == plain[1]
        and np.array_equal(a.sample_numbers, b.sample_numbers)
        and a.arrays.keys() == b.arrays.keys()
        and all(np.array_equal(a.arrays[name], b.arrays[name]) for name in a.arrays)
    )


@pytest.fixture(scope="module")
def whole():
    """The first 60 micro-batches of one process."""
    made = batches()
    return [made[number] for number in range(60)]


def test_what_is_in_them(whole):
    assert {batch.arity for batch in whole} == {0, 1, 2, 3, 4}
    assert {task for batch in whole for task in batch.tasks} == set(MIXTURE)
    assert {batch.text_length for batch in whole} == {128, 256, 512}
    for number, batch in enumerate(whole):
        assert batch.number == number and batch.sample_numbers.dtype == np.uint32
        assert batch.sample_numbers.tolist() == list(range(8 * number, 8 * number + 8))
        form = [batch.bucket.height, batch.bucket.width, batch.arity, batch.text_length]
        assert (batch.arrays["form"] == form).all() and batch.arrays["key"].shape == (8,)
        assert [int(key.split("/")[1]) for key in batch.keys] == batch.arrays["key"].tolist()


@pytest.mark.parametrize("count", [2, 8])
def test_any_number_of_processes(whole, count):
    parts = [batches(process_index=index, process_count=count) for index in range(count)]
    for number in range(15):
        local = [part[number] for part in parts]
        assert {part.text_length for part in local} == {whole[number].text_length}
        joined = dataclasses.replace(
            local[0],
            tasks=tuple(itertools.chain(*(part.tasks for part in local))),
            keys=tuple(itertools.chain(*(part.keys for part in local))),
            sample_numbers=np.concatenate([part.sample_numbers for part in local]),
            arrays={
                name: np.concatenate([part.arrays[name] for part in local])
                for name in local[0].arrays
            },
        )
        assert same(joined, whole[number])


def test_hosts_with_workers_from_the_middle_of_an_epoch(whole):
    """Two hosts, one with workers and one with threads, from micro-batch 11 on."""
    hands = ({"workers": 2}, {"threads": 2})
    reads = [
        batches(process_index=index, process_count=2).iterate(11, **own, prefetch=3)
        for index, own in enumerate(hands)
    ]
    for expected in whole[11:20]:
        parts = [next(read) for read in reads]
        assert tuple(itertools.chain(*(part.keys for part in parts))) == expected.keys
        for name, array in expected.arrays.items():
            np.testing.assert_array_equal(
                np.concatenate([part.arrays[name] for part in parts]), array
            )


@pytest.mark.parametrize(
    "hands", [{}, {"threads": 1}, {"threads": 4}, {"workers": 1}, {"workers": 4}], ids=str
)
@pytest.mark.parametrize("start", [0, 37])
def test_any_number_of_hands_from_any_start(whole, hands, start):
    read = batches().iterate(start, **hands, prefetch=5)
    for expected in whole[start : start + 20]:
        assert same(next(read), expected)


def test_grain_state_restores(whole):
    read = batches().iterate(10, threads=2, prefetch=3)
    for _ in range(4):
        next(read)
    again = batches().iterate(10)
    again.set_state(read.get_state())
    assert same(next(again), whole[14])


def test_the_seed_orders_the_records(whole):
    made = batches(seed=1)
    other = [made[number] for number in range(10)]
    assert [batch.keys for batch in other] != [batch.keys for batch in whole[:10]]
    assert [batch.tasks for batch in other] == [batch.tasks for batch in whole[:10]]


def test_fixed_batches_are_of_one_task():
    made = batches()
    for task in MIXTURE:
        fixed = made.fixed_batches(task, 3)
        assert len(fixed) == 3 and {x for batch in fixed for x in batch.tasks} == {task}
        examples = made.examples(task, 11)
        assert [x.task for x in examples] == [task] * 11
        keys = [key for batch in fixed for key in batch.keys]
        assert [x.key for x in examples] == [key.split("/")[1] for key in keys[:11]]
        assert all(same(a, b) for a, b in zip(fixed, made.fixed_batches(task, 3), strict=True))


def test_pictures_of_any_size_go_to_every_bucket():
    made = batches(feeds=[Feed("drawn", Task.T2I, AnySize(40))], mixture={Task.T2I: 1}, rows=4)
    seen = [made[number] for number in range(30)]
    assert len({batch.bucket for batch in seen}) == 9
    for start in (0, 10, 20):
        epoch = list(itertools.chain(*(batch.keys for batch in seen[start : start + 10])))
        assert len(set(epoch)) == 40


def test_too_long_a_text_takes_the_longest_padding():
    made = batches(text_length=lambda example: 10_000)
    assert made[0].text_length == 512


class Broken(Sized):
    """Every tenth record has no text."""

    def __getitem__(self, index):
        if index % 10 == 3:
            raise OSError(f"no text of {index}")
        return super().__getitem__(index)


def picky(example, bucket, length):
    """Every tenth record has no picture."""
    if int(example.key) % 10 == 7:
        raise ValueError(f"no picture of {example.key}")
    return {**encode_row(example, bucket, length), "big": np.full((3, 5), int(example.key))}


def broken_feeds():
    return [
        Feed("t", Task.T2I, Broken([(512, 512)] * 200, [0] * 200)),
        Feed("e", Task.S_EDIT, Broken([(512, 512)] * 200, [1] * 200)),
    ]


def broken(**changes):
    mixture = {Task.T2I: 1, Task.S_EDIT: 1}
    return batches(**{"feeds": broken_feeds(), "mixture": mixture, "encode_row": picky} | changes)


def test_bad_records_are_replaced_alike_everywhere():
    made = broken()
    seen = [made[number] for number in range(50)]
    keys = [key for batch in seen for key in batch.keys]
    assert len(keys) == 400 and not [key for key in keys if key[-1] in "37"]
    bad = Counter(one for batch in seen for one in batch.bad)
    for one in bad:
        text, picture = f"no text of {one.key[7:]}", f"no picture of {one.key}"
        assert one.reason == (text if one.key.startswith("record") else picture)
        assert one.data_set in "te"
    planned = {
        f"{name}/{number}" for name in "te" for number in range(200) if number % 10 in (3, 7)
    }
    assert {f"{one.data_set}/{one.key.removeprefix('record ')}" for one in bad} == planned
    assert {Counter(keys)[key] for key in keys} >= {1, 2}, "some take the place of others"
    parts = [broken(process_index=index, process_count=4) for index in range(4)]
    for number in range(0, 50, 7):
        local = [part[number] for part in parts]
        assert tuple(itertools.chain(*(part.keys for part in local))) == seen[number].keys
        assert tuple(itertools.chain(*(part.bad for part in local))) == seen[number].bad


def test_a_text_that_replaces_another_fits():
    class Long(Sized):
        def __getitem__(self, index):
            return dataclasses.replace(super().__getitem__(index), text="x" * (2 * index))

    fed = [Feed("t", Task.T2I, Long([(512, 512)] * 240, [0] * 240))]
    made = batches(feeds=fed, mixture={Task.T2I: 1}, encode_row=picky, rows=2, text_length=len_text)
    replaced = [batch for batch in map(made.__getitem__, range(120)) if batch.bad]
    assert len({batch.text_length for batch in replaced}) == 3
    for batch in replaced:
        assert max(2 * int(key.split("/")[1]) for key in batch.keys) <= batch.text_length


def test_where_no_text_fits_one_is_cut():
    class Long(Sized):
        def __getitem__(self, index):
            text = "x" * (100 if index == 7 else 5000)
            return dataclasses.replace(super().__getitem__(index), text=text)

    fed = [Feed("t", Task.T2I, Long([(512, 512)] * 8, [0] * 8))]
    made = batches(feeds=fed, mixture={Task.T2I: 1}, encode_row=picky, rows=1, text_length=len_text)
    [batch] = [batch for batch in map(made.__getitem__, range(8)) if batch.bad]
    assert batch.text_length == 128 and batch.keys[0] != "t/7"
    assert [one.key for one in batch.bad] == ["7"] * len(batch.bad)


def len_text(example):
    return len(example.text)


def test_when_nothing_can_be_used():
    class Empty(Sized):
        def __getitem__(self, index):
            raise OSError("no such file")

    fed = [Feed("t", Task.T2I, Empty([(9, 9)] * 5, [0] * 5))]
    with pytest.raises(ValueError, match=r"16 records, .*\n  t/record \d: no such file"):
        batches(feeds=fed, mixture={Task.T2I: 1})[0]


def uneven(example, bucket, length):
    return {"x": np.zeros(int(example.key) + 1)}


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_of_several_forms_are_an_error(workers):
    read = batches(encode_row=uneven, mixture={Task.T2I: 1}).iterate(0, workers=workers)
    with pytest.raises(ValueError, match=r"/\d+ encodes to .* but .* to"):
        next(read)


def test_the_ledger(tmp_path):
    made = broken()
    seen = [made[number] for number in range(50)]
    for _ in range(2):  # a run that was killed in a line, and the one that goes on
        ledger = Ledger(tmp_path / "ledger/0.jsonl", share=0.3)
        assert sum(map(ledger.note, seen)) == sum(len(batch.bad) for batch in seen) > 80
        lines = (tmp_path / "ledger/0.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert len(rows) == 80 and {tuple(row) for row in rows} == {("data_set", "key", "reason")}
        with (tmp_path / "ledger/0.jsonl").open("a") as file:
            file.write('{"data_set": "t", "k')
    ledger = Ledger(tmp_path / "other.jsonl", share=0.05)
    with pytest.raises(TooManyReplaced, match=r"51 of \d+ rows .*0\.05.*\n  3 x t: no picture"):
        for batch in seen:
            ledger.count(len(batch.keys), ledger.note(batch))


def slow(example, bucket, length):
    time.sleep(0.02)
    return picky(example, bucket, length)


def test_a_killed_worker_costs_nothing(monkeypatch):
    alone, pools = broken(), []

    class Watched(workers_lib.Workers):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            pools.append(self)

    monkeypatch.setattr(workers_lib, "Workers", Watched)
    read = broken(encode_row=slow).iterate(0, workers=2, prefetch=2)
    [pool], killed = pools, set()
    for number in range(12):
        assert same(next(read), alone[number])
        if number in (2, 5, 6):
            worker = pool.processes[0]
            os.kill(worker, signal.SIGKILL)
            killed.add(worker)
    assert len(killed) == 3 and not killed & set(pool.processes)


def test_arrays_that_live_keep_their_values(whole):
    """Their memory is used again, when the last view of it is gone."""
    read, kept = batches().iterate(0, workers=2), {}
    for number in range(20):
        batch = next(read)
        if number % 3 == 0:
            kept[number] = batch.arrays["form"][:, :3]
        del batch
    for number, form in kept.items():
        np.testing.assert_array_equal(form, whole[number].arrays["form"][:, :3])


def test_memory_is_lent_again_when_it_is_not_seen():
    shared = workers_lib.SharedRows()

    def lend(size):
        with shared.lend({"x": ((size,), "|u1")}, rows=2) as (where, arrays):
            arrays["x"][:] = 1
            return where.name, arrays["x"][1]

    first, view = lend(100)
    second, other = lend(100)
    assert second != first
    del view
    third, larger = lend(100_000)
    assert third == first and larger.sum() == 100_000
    del larger, other
    with pytest.raises(KeyError), shared.lend({"x": ((1,), "|u1")}, rows=2) as (where, _):
        raise KeyError  # a worker may be writing to it still
    assert where.name == second
    lent = [lend(1) for _ in range(3)]
    names = {name for name, _ in lent}
    assert len(names) == 3 and first in names and second not in names


def test_settings_that_cannot_be():
    for changes, message in [
        ({"process_count": 3}, "8 rows of a micro-batch do not divide among 3"),
        ({"text_lengths": (256, 128)}, "increasing"),
        ({"mixture": {Task.T2I: 0}}, "one of them above"),
        ({"mixture": {Task.T2I: 2, Task.REC: -1}}, "weights >= 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            batches(**changes)


def test_a_folder_from_files_to_arrays(tmp_path):
    lines = []
    for number in range(12):
        name = f"{number}.png"
        size = (90, 40) if number % 2 else (50, 50)
        Image.new("RGB", size, (number * 20, 0, 0)).save(tmp_path / name)
        lines.append({"image": name, "caption": f"number {number}"})
    lines += [
        {"image": f"{number}.png", "instruction": "brighter", "sources": [f"{number - 1}.png"]}
        for number in range(1, 12)
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    entry = {"type": "folder", "folder": str(tmp_path)}
    fed = build_feeds(
        [
            {"name": "photos", "tasks": ["T2I", "Rec", "Uncond"], **entry},
            {"name": "edits", "tasks": ["S-Edit"], **entry},
        ]
    )

    def pixels(example, bucket, length):
        target = example.target.load(bucket.height, bucket.width)
        sources = [picture.load(28, 56) for picture in example.sources]
        return {"target": target, "sources": np.array(sources, np.uint8)}

    made = batches(
        feeds=fed,
        mixture={Task.T2I: 1, Task.UNCOND: 1, Task.REC: 1, Task.S_EDIT: 1},
        buckets=make_buckets(64, multiple=32, count=3, max_ratio=2),
        rows=4,
        encode_row=pixels,
        text_length=lambda example: len(example.text),
    )
    for batch in map(made.__getitem__, range(20)):
        height, width = batch.bucket.height, batch.bucket.width
        assert batch.arrays["target"].shape == (4, height, width, 3)
        for row, (task, key) in enumerate(zip(batch.tasks, batch.keys, strict=True)):
            number = int(key.split(":")[1].split(".")[0])
            assert (batch.arrays["target"][row, ..., 0] == number * 20).all()
            shown = {Task.REC: number * 20, Task.S_EDIT: (number - 1) * 20}.get(task)
            assert shown is None or (batch.arrays["sources"][row, ..., 0] == shown).all()
    content = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(content[: len(content) // 2])
    bad = {(one.data_set, one.key) for number in range(40) for one in made[number].bad}
    assert bad == {("photos", "4:3.png"), ("photos", "15:3.png"), ("edits", "15:3.png")} | {
        ("edits", "16:4.png")
    }
