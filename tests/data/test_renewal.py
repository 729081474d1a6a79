"""What is repaired, changed or could not be read is noticed; what is as it was is not read again."""

import errno
import os
import shutil
import tarfile

import pytest

from tests.data.conftest import picture, shown, write_json
from wemmu_jax.data import indexing, storage
from wemmu_jax.data.formats.lists import IoJson
from wemmu_jax.data.formats.tar import Webdataset
from wemmu_jax.data.indexing import Renewal
from wemmu_jax.data.sources import build_feeds, build_source

NOTHING, LEFT_OUT, CHANGED = Renewal


def keys(source):
    return [source.index.key(number) for number in range(len(source))]


def siblings(source):
    """Everything that lies beside an index, of it and its renewals."""
    folder = source.index.folder
    return sorted(path.name[len(folder.stem) :] for path in folder.parent.glob(f"{folder.stem}*"))


@pytest.fixture
def read(monkeypatch):
    """The names of files that are read, as they are."""
    found, read = [], storage.read

    def noted(path, *arguments):
        found.append(path.rpartition("/")[2])
        return read(path, *arguments)

    monkeypatch.setattr(storage, "read", noted)
    return found


def edits(folder, **options):
    """An io-json of three pictures; the second is not there."""
    rows = [{"input_prompt": name, "output_image": f"{name}.png"} for name in ("p0", "p1", "p2")]
    (folder / "p1.png").rename(folder / "away.png")
    return {"type": "io-json", "file": write_json(folder / "a.json", rows), **options}


@pytest.mark.parametrize("renewal", [LEFT_OUT, CHANGED])
@pytest.mark.parametrize("processes", [0, 2])
def test_a_picture_that_came_is_taken(pictures, read, renewal, processes):
    spec = edits(pictures)
    before = build_source(spec)
    assert keys(before) == ["1", "3"] and [p.key for p in before.problems()] == ["2"]
    assert keys(build_source(spec, renewal=renewal)) == ["1", "3"] and siblings(before) == [""]
    (pictures / "away.png").rename(pictures / "p1.png")
    assert keys(build_source(spec)) == ["1", "3"], "training does not look for it"
    read.clear()
    after = build_source(spec, renewal=renewal, processes=processes)
    assert processes or (read.count("p1.png") == 1 and not {"p0.png", "p2.png"} & set(read))
    assert keys(after) == ["1", "2", "3"] and after.problems() == []
    assert [shown(after[number].target) for number in range(3)] == ["p0", "p1", "p2"]
    assert keys(before) == ["1", "3"] and shown(before[1].target) == "p2", "a run goes on as it was"
    assert siblings(after) == ["", ".1"] and keys(build_source(spec)) == keys(after)
    for again in Renewal:
        assert build_source(spec, renewal=again).index.folder == after.index.folder
    assert siblings(after) == ["", ".1"], "nothing has changed"


def test_a_picture_that_went_or_changed(pictures, read):
    spec = edits(pictures)
    (pictures / "away.png").rename(pictures / "p1.png")
    before = build_source(spec)
    (pictures / "p0.png").unlink()
    (pictures / "p1.png").write_bytes(picture("p4"))
    (pictures / "p2.png").write_bytes((pictures / "p2.png").read_bytes()[:60])
    for number, reason in enumerate(["no such file", "checksum|is cut", "is cut"]):
        with pytest.raises((ValueError, FileNotFoundError), match=reason) as error:
            before[number].target.load(8, 8)
        assert "`wemmu data index` reads anew" in str(error.value)
    checked = build_source(spec, renewal=LEFT_OUT)
    assert keys(checked) == keys(before), "for the check to find, which reads everything"
    after = build_source(spec, renewal=CHANGED)
    assert keys(after) == ["2"] and [p.key for p in after.problems()] == ["1", "3"]
    assert shown(after[0].target) == "p4"
    assert after[0].target.identity != before[1].target.identity, "it finds no old latents"
    os.utime(pictures / "p1.png", ns=(0, 0))
    read.clear()
    build_source(spec, renewal=CHANGED)
    assert read.count("p1.png") == 1, "it may be another one"


@pytest.mark.parametrize("renewal", [LEFT_OUT, CHANGED])
def test_an_annotation_that_changed_is_read_again(pictures, read, renewal):
    annotation = pictures / "captions/p1.json"
    write_json(annotation, {"caption": "old"})
    spec = {"type": "sidecar", "images": str(pictures)}
    spec["file"] = write_json(pictures / "a.json", [{"image": "p1.png", "annotation": "p1.json"}])
    before = build_source(spec)
    write_json(annotation, {"caption": "new"})
    assert build_source(spec)[0].text == "old", "a run goes on as it was"
    read.clear()
    after = build_source(spec, renewal=renewal)
    assert (before[0].text, after[0].text) == ("old", "new") and "p1.png" not in read
    annotation.unlink()
    with pytest.raises(ValueError, match=r"no record\n.*p1\.json: no such file"):
        build_source(spec, renewal=renewal)


def test_captions_stay_with_what_is_renewed(pictures):
    spec = edits(pictures)
    rows = [{"key": str(number), "caption": f"new {number}"} for number in (1, 2, 3)]
    spec["captions"] = write_json(pictures / "new.jsonl", rows, lines=True)
    assert [p.key for p in build_source(spec).problems()] == ["2"]
    (pictures / "away.png").rename(pictures / "p1.png")
    after = build_source(spec, renewal=CHANGED)
    assert [after[number].text for number in range(3)] == ["new 1", "new 2", "new 3"]


def shards(folder):
    """Three tars of a sample each."""
    for number in range(3):
        (folder / f"p{number}.txt").write_text(f"words {number}")
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for extension in ("png", "txt"):
                tar.add(folder / f"p{number}.{extension}", f"p{number}.{extension}")
    return {"type": "webdataset", "paths": f"{folder}/{{0..3}}.tar"}


def test_a_disk_that_failed_for_a_moment(pictures, monkeypatch, read):
    """Units without such an error are not scanned again, where all they hold is in the index's name."""
    spec = shards(pictures)
    with monkeypatch.context() as patch:
        pread = os.pread

        def fails(file, size, offset):
            if os.readlink(f"/proc/self/fd/{file}").endswith("1.tar"):
                raise OSError(errno.EIO, "Input/output error")
            return pread(file, size, offset)

        patch.setattr(storage.os, "pread", fails)
        before = build_source(spec)
    assert keys(before) == ["0/p0", "2/p2"]
    assert [(p.key.rpartition("/")[2], p.again) for p in before.problems()] == [
        ("1.tar", True),
        ("3.tar", False),
    ]
    scanned, scan = [], Webdataset.scan
    monkeypatch.setattr(
        Webdataset, "scan", lambda self, path: (scanned.append(path[-5:]), scan(self, path))[1]
    )
    read.clear()
    after = build_source(spec, renewal=CHANGED)
    assert scanned == ["1.tar"] and set(read) == {"1.tar"}
    assert [(key, after[n].text, shown(after[n].target)) for n, key in enumerate(keys(after))] == [
        (f"{n}/p{n}", f"words {n}", f"p{n}") for n in range(3)
    ]
    assert [p.key.rpartition("/")[2] for p in after.problems()] == ["3.tar"]
    build_source(spec, renewal=CHANGED)
    assert scanned == ["1.tar"], "of the rest the name says that it is as it was"


def test_archives_that_could_not_be_read_for_a_moment(pictures, monkeypatch):
    spec = edits(pictures, archives=f"{pictures}/*.tar")
    with tarfile.open(pictures / "0.tar", "w") as tar:
        for name in ("p0", "p2"):
            tar.add(pictures / f"{name}.png", f"{name}.png")
    with tarfile.open(pictures / "1.tar", "w") as tar:
        tar.add(pictures / "away.png", "p1.png")

    def fails(path):
        if path.endswith("1.tar"):
            raise OSError(errno.EIO, "Input/output error")
        return size_of(path)

    size_of = storage.size_of
    with monkeypatch.context() as patch:
        patch.setattr(storage, "size_of", fails)
        assert keys(build_source(spec)) == ["1", "3"]
    after = build_source(spec, renewal=LEFT_OUT)
    assert keys(after) == ["1", "2", "3"] and after.problems() == []


def test_a_run_that_is_refused_says_how_to_renew(pictures):
    entry = {"name": "a", "tasks": ["T2I"], **edits(pictures)}
    with pytest.raises(ValueError, match="`wemmu data index` reads anew"):
        build_feeds([entry], bad_share=0.1)


def test_a_renewal_that_was_stopped_leaves_nothing(pictures, monkeypatch):
    spec = edits(pictures)
    source = build_source(spec)
    (pictures / "away.png").rename(pictures / "p1.png")
    with monkeypatch.context() as patch:
        patch.setattr(IoJson, "scan", lambda self, unit: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_source(spec, renewal=CHANGED)
    assert siblings(source) == [""]


def test_what_a_stopped_build_left_is_looked_at_again(pictures, monkeypatch):
    """A part of last week may hold a problem of last week."""
    spec = edits(pictures)
    with monkeypatch.context() as patch:
        patch.setattr(indexing, "merge_parts", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_source(spec)
    (pictures / "away.png").rename(pictures / "p1.png")
    assert keys(build_source(spec, renewal=CHANGED)) == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("module", "step"), [(indexing, "merge_parts"), (shutil, "copyfileobj"), (indexing, "settle")]
)
def test_two_hosts_that_build_together(pictures, monkeypatch, module, step):
    """The other one is done, and takes the parts away, before this one merges them, while it does, or after."""
    spec, function, other = edits(pictures), getattr(module, step), []

    def slow(*arguments):
        if not other:
            other.append(None)
            other[0] = build_source(spec)
        return function(*arguments)

    monkeypatch.setattr(module, step, slow)
    source = build_source(spec)
    assert keys(source) == keys(other[0]) == ["1", "3"]
    assert siblings(source) == [""]


def test_a_host_that_scans_while_another_finishes(pictures, monkeypatch):
    spec, scan, other = edits(pictures), IoJson.scan, []

    def slow(self, unit):
        if not other:
            other.append(None)
            other[0] = build_source(spec)
        return scan(self, unit)

    monkeypatch.setattr(IoJson, "scan", slow)
    assert keys(build_source(spec)) == ["1", "3"] and siblings(other[0]) == [""]


def test_two_hosts_that_renew_together(pictures, monkeypatch):
    spec, merge, other = edits(pictures), indexing.merge_parts, []
    build_source(spec)
    (pictures / "away.png").rename(pictures / "p1.png")

    def slow(parts, folder, meta):
        if not other:
            other.append(None)
            other[0] = build_source(spec, renewal=CHANGED)
        return merge(parts, folder, meta)

    monkeypatch.setattr(indexing, "merge_parts", slow)
    source = build_source(spec, renewal=CHANGED)
    assert keys(source) == ["1", "2", "3"] and siblings(source) == ["", ".1"]


def test_an_error_of_a_build_is_still_one(pictures):
    (pictures / "a.json").write_text("[{]")
    with pytest.raises(ValueError, match=r"a\.json: not JSON"):
        build_source({"type": "io-json", "file": str(pictures / "a.json")})
