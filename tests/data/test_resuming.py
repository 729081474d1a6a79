"""What goes on where it was stopped goes on with what it was made from."""

import errno
import os
import pathlib

import pytest
from PIL import Image

from tests.data.conftest import write_json
from wemmu_jax.data import merging
from wemmu_jax.data.manifest import go_on
from wemmu_jax.data.packing import pack
from wemmu_jax.data.sources import build_source


@pytest.fixture
def grown(tmp_path):
    """Makes a set of so many pictures, a caption each."""

    def grow(count, *, folder="set", text="number"):
        root = tmp_path / folder
        root.mkdir(exist_ok=True)
        for number in range(count):
            Image.new("RGB", (8 + number, 8)).save(root / f"{number}.png")
        rows = [{"image": f"{n}.png", "caption": f"{text} {n}"} for n in range(count)]
        write_json(root / "captions.jsonl", rows, lines=True)
        return build_source({"type": "folder", "folder": str(root)})

    return grow


def packed(source, folder, shard_size=4, name="a"):
    problems = pack(
        source, folder, name=name, shard_size=shard_size, processes=0, progress=lambda *_: None
    )
    assert problems == []
    return len(build_source({"type": "array-record", "paths": f"{folder}/{name}-0*.arrayrecord"}))


def test_a_set_whose_name_another_begins_with_is_packed_beside_it(grown, tmp_path):
    assert packed(grown(6), tmp_path / "packed", name="a-b") == 6
    assert packed(grown(5), tmp_path / "packed") == 5


def test_a_set_that_changed_is_not_packed_into_what_was_packed_before(grown, tmp_path):
    out = tmp_path / "packed"
    assert packed(grown(6), out) == 6
    before = {file: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(
        ValueError,
        match=r"packed/a-\[0-9\]\*-of-\*\.arrayrecord were made from something else.*"
        r"another folder or delete(?s:.)*records: there '6 records, .*', now '8 records",
    ):
        packed(grown(8), out)  # two shards again
    with pytest.raises(ValueError, match="shard_size: there 4, now 3"):
        packed(grown(6), out, shard_size=3)
    assert {file: file.read_bytes() for file in out.iterdir()} == before
    first = out / "a-00000-of-00002.arrayrecord"
    first.unlink()
    os.utime(tmp_path / "set/captions.jsonl", ns=(1, 1))
    assert packed(grown(6), out) == 6 and first.read_bytes() == before[first], "it is the same set"
    (out / "a.json").unlink()
    with pytest.raises(ValueError, match=r"a-00000.* is there, but not a\.json, which says"):
        packed(grown(6), out)


def test_a_disk_without_room_for_an_index(grown, monkeypatch):
    """An error before anything is mapped: later it would be a SIGBUS, which kills without a word."""
    left, taken = 4, []

    def allocate(file, offset, size):
        taken.append(os.readlink(f"/proc/self/fd/{file}"))
        assert (offset, size) == (0, os.fstat(file).st_size) and size > 0
        if len(taken) > left:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(merging.os, "posix_fallocate", allocate)
    with pytest.raises(OSError, match=r"No space left on device: .*\.npy'") as found:
        grown(6)
    assert found.value.errno == errno.ENOSPC and len(taken) == left + 1
    root = pathlib.Path(taken[0]).parents[1]
    assert not list(root.glob("*.partial-*")) and list(root.glob("*.building")), "to go on from"
    left = 99
    assert len(grown(6)) == 6


def test_a_file_system_that_takes_no_room_at_once(grown, monkeypatch):
    def allocate(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(merging.os, "posix_fallocate", allocate)
    assert len(grown(7)) == 7


def test_which_sets_are_the_same(grown):
    here = grown(5).index
    elsewhere = grown(5, folder="elsewhere").index
    renamed = grown(5, folder="renamed", text="picture").index
    assert here.folder != elsewhere.folder
    assert here.identity == elsewhere.identity != renamed.identity
    assert here.picture_identity == renamed.picture_identity
    other = grown(5, folder="other")
    assert other.index.identity == here.identity
    Image.new("RGB", (8, 8), "red").save(other.index.pictures(0)[0].place.path)
    path = other.format.folder + "/captions.jsonl"
    os.utime(path, ns=(1, 1))
    changed = build_source({"type": "folder", "folder": other.format.folder}).index
    assert changed.picture_identity != here.picture_identity
    assert changed.identity != here.identity


def test_a_manifest_is_written_before_anything_is_made(tmp_path):
    file = tmp_path / "new/folder/made.json"
    go_on(file, {"a": (1, 2)}, made="*.bin")
    assert [path.name for path in file.parent.iterdir()] == ["made.json"]
    go_on(file, {"a": [1, 2]}, made="*.bin")
    with pytest.raises(
        ValueError, match=r"\n  a: there \[1, 2\], now None\n  b: there None, now 3"
    ):
        go_on(file, {"b": 3}, made="*.bin")
