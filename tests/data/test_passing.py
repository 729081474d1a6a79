"""Storage that fails for the moment: it is asked again, and no other record takes the place of one that it hid."""

import errno
import json
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.data.conftest import picture
from tests.data.test_pipeline import batches, encode_row, same, text_length
from tests.data.test_schedule import Sized
from wemmu_jax.cli import chat
from wemmu_jax.cli.main import TRY_AGAIN, main
from wemmu_jax.data import rows, storage
from wemmu_jax.data.formats import array_record, parquet
from wemmu_jax.data.index import load_column
from wemmu_jax.data.pools import Feed
from wemmu_jax.data.sources import build_source
from wemmu_jax.data.tasks import Task
from wemmu_jax.errors import passes

AWAY = OSError(errno.ESTALE, "Stale file handle", "/data/0.tar")


@pytest.fixture
def waits(monkeypatch):
    """The seconds that were waited, without waiting."""
    seen = []
    monkeypatch.setattr(rows, "time", types.SimpleNamespace(sleep=seen.append))
    return seen


class Source(Sized):
    """Pictures' sizes, and keys as texts."""

    def __init__(self):
        super().__init__([(512, 512)] * 200, [0] * 200)


def drawn(**functions):
    fed = [Feed("t", Task.T2I, Source())]
    return batches(feeds=fed, mixture={Task.T2I: 1}, **functions)


def failing(function, times):
    """`function`, of which the first calls for each record fail."""
    calls = {}

    def fails(example, *arguments):
        calls[example.key] = calls.get(example.key, 0) + 1
        if calls[example.key] <= times:
            raise AWAY
        return function(example, *arguments)

    return fails


@pytest.mark.parametrize("name", ["encode_row", "text_length"])
def test_a_moment_changes_nothing(name, waits):
    functions = {"encode_row": encode_row, "text_length": text_length}
    made = drawn(**{name: failing(functions[name], len(rows.WAITS))})[0]
    assert same(made, drawn()[0]) and made.bad == ()
    assert tuple(waits[: len(rows.WAITS)]) == rows.WAITS and len(waits) == 8 * len(rows.WAITS)


@pytest.mark.parametrize("name", ["encode_row", "text_length"])
def test_what_lasts_is_raised_as_it_is(name, waits):
    functions = {"encode_row": encode_row, "text_length": text_length}
    with pytest.raises(OSError) as found:
        drawn(**{name: failing(functions[name], 99)})[0]
    assert found.value is AWAY and tuple(waits) == rows.WAITS


def test_a_bad_record_whose_name_cannot_be_read_just_now(waits):
    class Hidden(Source):
        away = 0

        def __getitem__(self, index):
            self.away += 1
            if self.away % 2:
                raise AWAY
            return super().__getitem__(index)

    def never(example, bucket, length):
        raise ValueError("no picture")

    with pytest.raises(ValueError, match=r"16 records.*\n  t/\d+: no picture"):
        batches(feeds=[Feed("t", Task.T2I, Hidden())], mixture={Task.T2I: 1}, encode_row=never)[0]


def stale(example, bucket, length):
    """In workers, which import it."""
    rows.time.sleep = lambda seconds: None
    raise OSError(errno.ESTALE, "Stale file handle", "/data/0.tar")


def test_workers_hand_it_on_and_the_command_is_to_be_run_again(monkeypatch, capsys):
    read = drawn(encode_row=stale).iterate(0, workers=2, prefetch=2)
    monkeypatch.setattr(chat, "run", lambda args: next(read))
    assert main(["chat", "hi", "--checkpoint", "x"]) == TRY_AGAIN
    assert "Stale file handle: '/data/0.tar'" in capsys.readouterr().err


def test_every_format_says_so(tmp_path, monkeypatch):
    """Also those whose libraries have errors of their own."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "captions.jsonl").write_text(json.dumps({"image": "a.png", "caption": "a"}))
    row = {"image": picture("p0"), "captions": '{"caption": "blue"}'}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "0.parquet")
    out = array_record.writer(str(tmp_path / "a.arrayrecord"))
    out.write(array_record.pack("k", "text", [picture("p0")]))
    out.close()
    sources = [
        build_source({"type": "folder", "folder": str(tmp_path)}),
        build_source({"type": "bagel", "paths": str(tmp_path / "0.parquet")}),
        build_source({"type": "array-record", "paths": str(tmp_path / "a.arrayrecord")}),
    ]

    def away(*_, **__):
        raise AWAY

    for name in ("_read_local", "stamp"):
        monkeypatch.setattr(storage, name, away)
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", away)
    parquet._pictures.cache_clear()
    for source in sources:
        with pytest.raises(OSError, match="Stale file handle") as found:
            source[0].target.load(32, 32)
        assert passes(found.value)


def test_an_index_is_not_called_damaged(tmp_path, monkeypatch):
    def away(*_, **__):
        raise AWAY

    monkeypatch.setattr("wemmu_jax.data.index.np.load", away)
    with pytest.raises(OSError, match="Stale file handle"):
        load_column(tmp_path / "sizes.npy")
