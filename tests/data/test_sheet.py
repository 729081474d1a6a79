"""The page of samples shows what training sees."""

import html
import re

import numpy as np
import pytest

from wemmu_jax.data.buckets import make_buckets
from wemmu_jax.data.pipeline import MicroBatches
from wemmu_jax.data.pools import Feed
from wemmu_jax.data.records import Picture, Record
from wemmu_jax.data.sheet import write_sheet
from wemmu_jax.data.tasks import Task

ROWS = 256
MIXTURE = {Task.S_EDIT: 35, Task.M_EDIT: 20, Task.T2I: 25, Task.REC: 20, Task.UNCOND: 10}


class Drawn:
    """999 records of so many sources in three shapes; every seventh picture is cut, every eleventh text empty."""

    def __init__(self, sources):
        self._sources = sources
        self._sizes = np.array([(20, 80), (50, 50), (80, 20)] * 333, np.int32)

    def __len__(self):
        return len(self._sizes)

    def __getitem__(self, number):
        def load(height, width):
            if number % 7 == 3:
                raise ValueError(f"<{number}> is cut")
            return np.full((height, width, 3), number % 256, np.uint8)

        picture = Picture(*self._sizes[number].tolist(), load)
        text = "" if number % 11 == 5 else "x" * (number % 300)
        return Record(str(number), text, (picture,) * self._sources, picture)

    def sizes(self):
        return self._sizes


def encode_row(example, bucket, length):
    return {"target": example.target.load(bucket.height, bucket.width)[:1, :1]}


@pytest.fixture(scope="module")
def data():
    captions = Drawn(0)
    feeds = [Feed("captions", task, captions) for task in (Task.T2I, Task.REC, Task.UNCOND)]
    feeds += [Feed("edits", Task.S_EDIT, Drawn(1)), Feed("both", Task.M_EDIT, Drawn(2))]
    return MicroBatches(
        feeds=feeds,
        mixture=MIXTURE,
        buckets=make_buckets(64, multiple=32, count=3),
        rows=ROWS,
        seed=0,
        encode_row=encode_row,
        text_length=lambda example: len(example.text),
    )


def test_a_page_shows_the_mixture_and_what_takes_a_bad_records_place(data, tmp_path):
    page = tmp_path / "sheet.html"
    assert write_sheet(page, data, count=64) == 64
    text = html.unescape(page.read_text())
    rows = re.findall(r"<tr><td>(\d+) · ([\w-]+)<br>(\w+)/(\d+)<br>(\d+ x \d+)<br>(\d+) tok", text)
    assert len(rows) == 64 and {int(row[0]) for row in rows} == set(range(16))
    tasks = [row[1] for row in rows]
    for task, weight in MIXTURE.items():
        assert abs(tasks.count(task.value) - 64 * weight / 110) < 8, task
    assert len({row[4] for row in rows}) == 3
    seen = [data[number] for number in range(16)]
    for number, task, name, key, size, tokens in rows:
        batch = seen[int(number)]
        assert (task, f"{name}/{key}") in {
            (of.value, own) for of, own in zip(batch.tasks, batch.keys, strict=True)
        }
        assert size == f"{batch.bucket.height} x {batch.bucket.width}"
        assert int(key) % 7 != 3 and (int(key) % 11 != 5 or task in ("Rec", "Uncond"))
        assert task in ("Rec", "Uncond") or int(tokens) == int(key) % 300
    bad = {f"{one.data_set}/{one.key}: {one.reason}" for batch in seen for one in batch.bad}
    shown = re.findall(r"<b>in the place of ([^<]*(?:<\d+>)?[^<]*)</b>", text)
    assert len(shown) >= 5 and set(shown) <= bad
    assert any("cut" in one for one in shown) and any("no text" in one for one in shown)
    assert text.count("<img ") >= 64
