"""Micro-batches: the same samples for any number of processes and threads, and from any start."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from tests.data.test_schedule import AnySize, Sized, feeds
from wemmu_jax.data.buckets import make_buckets
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
    assert {task for batch in whole for task in batch.tasks} == set(Task)
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


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("start", [0, 37])
def test_any_number_of_threads_from_any_start(whole, workers, start):
    read = batches().iterate(start, workers=workers, prefetch=5)
    for expected in whole[start : start + 20]:
        assert same(next(read), expected)


def test_grain_state_restores(whole):
    read = batches().iterate(10, workers=2, prefetch=3)
    for _ in range(4):
        next(read)
    again = batches().iterate(10, workers=0, prefetch=0)
    again.set_state(read.get_state())
    assert same(next(again), whole[14])


def test_the_seed_orders_the_records(whole):
    made = batches(seed=1)
    other = [made[number] for number in range(10)]
    assert [batch.keys for batch in other] != [batch.keys for batch in whole[:10]]
    assert [batch.tasks for batch in other] == [batch.tasks for batch in whole[:10]]


def test_fixed_batches_are_of_one_task():
    made = batches()
    for task in Task:
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


def test_errors_name_data_set_and_record():
    class Broken(Sized):
        def __getitem__(self, index):
            raise OSError("no such file")

    broken = [Feed("bad", Task.T2I, Broken([(9, 9)] * 5, [0] * 5))]
    with pytest.raises(ValueError, match=r"bad, record \d: no such file"):
        batches(feeds=broken, mixture={Task.T2I: 1})[0]

    def refuse(example, bucket, length):
        raise ValueError("a.jpg: empty (zero bytes)")

    with pytest.raises(ValueError, match=r"(captions|more)/\d+: a\.jpg: empty"):
        batches(encode_row=refuse, mixture={Task.T2I: 1})[0]
    with pytest.raises(ValueError, match=r"(captions|more)/\d+: a\.jpg: empty"):
        next(batches(encode_row=refuse, mixture={Task.T2I: 1}).iterate(0, workers=2, prefetch=2))

    def uneven(example, bucket, length):
        return {"x": np.zeros(int(example.key) + 1)}

    with pytest.raises(ValueError, match=r"/\d+ encodes to .* but (captions|more)/\d+ to"):
        batches(encode_row=uneven, mixture={Task.T2I: 1})[0]


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
            {"name": "edits", "tasks": ["S-Edit"], "kind": "edit", **entry},
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
    with pytest.raises(
        ValueError, match=r"(photos|edits)/\d+:\d\.png: .*3\.png: cannot be decoded"
    ):
        for number in range(40):
            made[number]
