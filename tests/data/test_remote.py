"""Sets in a bucket: every format read through fsspec, as `gs://` is, by fsspec's own file systems."""

import pathlib
import subprocess

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from fsspec.implementations.memory import MemoryFile

from tests.data.conftest import PICTURES, picture, records, shown, write_json
from wemmu_jax.data import storage
from wemmu_jax.data.buckets import Bucket
from wemmu_jax.data.formats import array_record
from wemmu_jax.data.pipeline import MicroBatches
from wemmu_jax.data.sources import build_feeds, build_source
from wemmu_jax.data.tasks import Task
from wemmu_jax.errors import passes

SAID = [{"from": "human", "value": "<image>blue"}, {"from": "gpt", "value": "<gen_image>"}]
ASKED = [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "a barn"}]


@pytest.fixture
def bucket(pictures):
    """`bucket(folder)` -> URL of a bucket that holds what lies in the folder, which is then emptied."""
    system = fsspec.filesystem("memory")

    def upload() -> str:
        for path in sorted(pictures.rglob("*")):
            if path.is_file():
                system.pipe(f"/set/{path.relative_to(pictures)}", path.read_bytes())
                path.unlink()
        return "memory://set"

    yield upload
    system.rm("/set", recursive=True)


def tar(folder: pathlib.Path, name: str, *members: str) -> None:
    subprocess.run(["tar", "-cf", name, "--remove-files", *members], cwd=folder, check=True)


def webdataset(folder):
    (folder / "p1.txt").write_text("über p1")
    tar(folder, "00001.tar", "p1.png", "p1.txt")
    return {"paths": "{root}/{{00001..00001}}.tar"}, [("00001/p1", "über p1", "p1", ())]


def sidecar(folder):
    write_json(folder / "captions/p2.json", {"caption": "again"})
    (folder / "p2.png").rename(folder / "captions/p2.png")
    write_json(folder / "data.json", [{"image": "p2.png", "annotation": "p2.json"}])
    settings = {"file": "{root}/data.json", "images": "{root}/captions"}
    return settings, [("p2.png", "again", "p2", ())]


def io_json(folder):
    rows = [{"input_prompt": "edit", "output_image": "p1.png", "input_image": ["p0.png"]}]
    write_json(folder / "edit.json", rows)
    tar(folder, "part_0.tar", "p0.png")
    tar(folder, "part_1.tar", "p1.png")
    settings = {"file": "{root}/edit.json", "archives": "{root}/part_*.tar"}
    return settings, [("1", "edit", "p1", ("p0",))]


def uniworld(folder):
    write_json(folder / "one.json", [{"image": ["p3.png", "p4.png"], "conversations": SAID}])
    (folder / "data.txt").write_text("./,one.json,true\n")
    return {"file": "{root}/data.txt"}, [("1", "blue", "p4", ("p3",))]


def omnigen2(folder):
    rows = [{"instruction": "mix", "input_images": ["p0.png", "p5.png"], "output_image": "p2.png"}]
    write_json(folder / "sub/all.jsonl", rows, lines=True)
    inner = {"data": [{"path": "all.jsonl", "type": "edit", "ratio": 1}]}
    (folder / "sub/inner.yml").write_text(yaml.safe_dump(inner))
    outer = {"data": [{"path": "sub/inner.yml", "type": "edit"}]}
    (folder / "all.yml").write_text(yaml.safe_dump(outer))
    for name in ("p0", "p5", "p2"):
        (folder / f"{name}.png").rename(folder / f"sub/{name}.png")
    return {"file": "{root}/all.yml"}, [("1", "mix", "p2", ("p0", "p5"))]


def bagel(folder):
    row = {"image_list": [picture("p0"), picture("p1")], "instruction_list": [["blue"]]}
    pq.write_table(pa.Table.from_pylist([row]), folder / "0.parquet")
    return {"paths": "{root}/*.parquet"}, [("0.parquet:1:1", "blue", "p1", ("p0",))]


def imgedit(folder):
    row = {"input_images": ["p1.png"], "output_images": ["p2.png"], "prompt": "blue"}
    pq.write_table(pa.Table.from_pylist([row]), folder / "m.parquet")
    return {"paths": ["{root}/m.parquet"]}, [("m.parquet:1", "blue", "p2", ("p1",))]


def folder(folder):
    write_json(folder / "captions.jsonl", [{"image": "p5.png", "caption": "sky"}], lines=True)
    return {"folder": "{root}"}, [("1:p5.png", "sky", "p5", ())]


FORMATS = {
    "webdataset": webdataset,
    "sidecar": sidecar,
    "io-json": io_json,
    "uniworld": uniworld,
    "omnigen2": omnigen2,
    "bagel": bagel,
    "imgedit": imgedit,
    "folder": folder,
}


def at(settings, root):
    """The settings with `{root}` filled in."""
    return {
        key: value.format(root=root)
        if isinstance(value, str)
        else [part.format(root=root) for part in value]
        for key, value in settings.items()
    }


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format(kind, pictures, bucket):
    settings, expected = FORMATS[kind](pictures)
    spec = {"type": kind, **at(settings, bucket())}
    assert records(spec) == expected and build_source(spec).problems() == []


def test_conversations(pictures, bucket):
    write_json(pictures / "vlm/a.jsonl", [{"image": "p3.png", "conversations": ASKED}], lines=True)
    root = bucket()
    source = build_source({"type": "conversations", "file": f"{root}/vlm/a.jsonl", "root": root})
    assert [shown(p) for p in source[0].sources] == ["p3"] and source[0].turns[0].answer == "a barn"


def test_entries_and_sidecars_lie_there_too(pictures, bucket):
    settings, _ = folder(pictures)
    write_json(pictures / "new.jsonl", [{"key": "1:p5.png", "caption": "new"}], lines=True)
    entry = {"name": "a", "tasks": ["T2I"], "type": "folder", **at(settings, "memory://set")}
    entry["captions"] = "memory://set/new*.jsonl"
    (pictures / "sets.yaml").write_text(yaml.safe_dump([entry]))
    [feed] = build_feeds([f"{bucket()}/sets.yaml"])
    assert feed.source[0].text == "new" and shown(feed.source[0].target) == "p5"


def test_what_is_missing_or_changed_is_named(pictures, bucket):
    webdataset(pictures)
    root = bucket()
    spec = {"type": "webdataset", "paths": f"{root}/{{00000..00002}}.tar"}
    source = build_source(spec)
    assert [p.key for p in source.problems()] == [f"{root}/00000.tar", f"{root}/00002.tar"]
    before = source.index.folder
    system = fsspec.filesystem("memory")
    system.pipe("/set/00001.tar", system.cat("/set/00001.tar")[:520])
    with pytest.raises(ValueError, match=r"00001\.tar: expected .* bytes at .*, found"):
        shown(source[0].target)
    with pytest.raises(ValueError, match="no record"):
        build_source(spec)
    with pytest.raises(FileNotFoundError, match=r"memory://set/no\.yaml: no such file"):
        build_feeds([f"{root}/no.yaml"])
    system.rm("/set/00001.tar")
    with pytest.raises(FileNotFoundError, match=r"\*\.tar: matches no file"):
        build_source({"type": "webdataset", "paths": f"{root}/*.tar"})
    assert before.exists()
    with pytest.raises(ValueError, match=r"nowhere://a/0\.tar: cannot be opened"):
        build_source({"type": "webdataset", "paths": "nowhere://a/0.tar"})


def test_packed_files_must_be_local(tmp_path, bucket):
    path = str(tmp_path / "a.arrayrecord")
    out = array_record.writer(path)
    out.write(array_record.pack("k", "text", [picture("p0")]))
    out.close()
    with pytest.raises(ValueError, match="no such local file"):
        build_source({"type": "array-record", "paths": f"{bucket()}/a.arrayrecord"})


def test_the_index_must_be_local(pictures, bucket, monkeypatch):
    settings, _ = folder(pictures)
    monkeypatch.setenv("WEMMU_INDEX", "memory://index")
    with pytest.raises(ValueError, match="WEMMU_INDEX memory://index: expected a local path"):
        build_source({"type": "folder", **at(settings, bucket())})


class HttpError(Exception):
    """A client's own error, as gcsfs has it: no OSError."""


class Forbidden(HttpError):
    code = 403


class TooMany(HttpError):
    code = 429


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (HttpError("503"), True),
        (TooMany("429"), True),
        (TimeoutError("slow"), True),
        (Forbidden("403"), False),
        (PermissionError("403"), False),
        (ValueError("no such bucket's name"), False),
    ],
)
def test_what_may_go_well_later_says_so(error, again, monkeypatch):
    """Exit code 75, after which whoever started a run starts it again, follows from it."""

    def fail(self, *_, **__):
        raise error

    monkeypatch.setattr(storage, "TRIES", 1)
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", fail)
    with pytest.raises(OSError, match=r"memory://b/x: ") as found:
        storage.read("memory://b/x")
    assert passes(found.value) is again


@pytest.mark.parametrize("error", [OSError, HttpError])
@pytest.mark.parametrize("kind", ["folder", "bagel"])
def test_a_network_that_fails_for_a_moment(kind, error, pictures, bucket, monkeypatch):
    settings, expected = FORMATS[kind](pictures)
    spec = {"type": kind, **at(settings, bucket())}
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    failed = []

    def failing(function, times):
        def fails(self, *arguments, **options):
            if failed.count(arguments[0]) < times:
                failed.append(arguments[0])
                raise error("503")
            return function(self, *arguments, **options)

        return fails

    system, file = type(fsspec.filesystem("memory")), MemoryFile
    for times, of in ((2, system), (3, file)):
        name = "cat_file" if of is system else "read"
        monkeypatch.setattr(of, name, failing(getattr(of, name), times))
    assert records(spec) == expected and len(failed) >= 2
    monkeypatch.setattr(storage, "TRIES", 1)
    path = f"memory:/{fsspec.filesystem('memory').find('/set')[0]}"
    for read in (storage.read, lambda path: storage.open_file(path).read()):
        failed.clear()
        with pytest.raises(OSError, match=f"{path}: 503"):
            read(path)


def test_worker_processes_read_urls(pictures):
    """`file://` is a URL to us as `gs://` is, and unlike memory the workers see it."""
    rows = [{"image": f"{name}.png", "caption": name} for name in PICTURES]
    write_json(pictures / "captions.jsonl", rows, lines=True)
    entry = {"name": "a", "tasks": ["T2I"], "type": "folder", "folder": f"file://{pictures}"}
    data = MicroBatches(
        feeds=build_feeds([entry]),
        mixture={Task.T2I: 1.0},
        buckets=[Bucket(32, 64)],
        rows=3,
        seed=0,
        encode_row=encode_row,
        text_length=text_length,
    )
    made = [batch for batch, _ in zip(data.iterate(0, workers=2), range(2), strict=False)]
    assert {key for batch in made for key in batch.keys} == {
        f"a/{number}:{name}.png" for number, name in enumerate(PICTURES, 1)
    }
    for batch, number in zip(made, range(2), strict=True):
        np.testing.assert_array_equal(batch.arrays["target"], data[number].arrays["target"])


def encode_row(example, bucket, length):
    """In workers, which import it."""
    return {"target": example.target.load(bucket.height, bucket.width)}


def text_length(example):
    """In workers, which import it."""
    return len(example.text)
