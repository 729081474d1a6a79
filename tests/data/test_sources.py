"""Folders of pictures, their indexes, and config entries of data sets."""

import json
import pickle
import re

import pytest
import yaml
from PIL import Image

from wemmu_jax.data import storage
from wemmu_jax.data.buckets import make_buckets
from wemmu_jax.data.formats import lists, rows
from wemmu_jax.data.pools import gather_pools
from wemmu_jax.data.records import identity
from wemmu_jax.data.sources import build_feeds, build_source
from wemmu_jax.data.tasks import Task
from wemmu_jax.miniworld.sources import MiniworldSource


@pytest.fixture
def folder(tmp_path):
    for name, size in {"a.png": (60, 40), "b.png": (30, 50), "sub/c.png": (20, 20)}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", size, (200, 10, 10)).save(path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 40)).save(tmp_path / "turned.jpg", exif=exif)
    return tmp_path


def write(folder, *lines):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "captions.jsonl").write_text(text, encoding="utf-8", errors="surrogateescape")


CAPTION = {"image": "a.png", "caption": "a red flag"}
EDIT = {"image": "b.png", "instruction": "turn it", "sources": ["a.png"]}
BOTH = {"image": "a.png", "instruction": "put them together", "sources": ["b.png", "sub/c.png"]}


def photos(folder):
    return build_source({"type": "folder", "folder": str(folder)})


def test_records_of_all_kinds(folder):
    turned = {"image": "turned.jpg", "caption": "schräg 斜め"}
    write(folder, CAPTION, EDIT, "", turned, BOTH, {**BOTH, "sources": ["b.png"] * 4})
    source = photos(folder)
    assert source.source_counts().tolist() == [0, 1, 0, 2, 4]
    assert source.sizes().tolist() == [[40, 60], [50, 30], [80, 40], [40, 60], [40, 60]]
    assert source[2].text == "schräg 斜め" and source[2].key == "4:turned.jpg"
    assert source[1].text == "turn it" and source[1].target.width == 30
    assert [picture.width for picture in source[1].sources] == [60]
    pixels = source[3].sources[1].load(28, 56)
    assert pixels.shape == (28, 56, 3) and (pixels == (200, 10, 10)).all()
    feeds = build_feeds(
        [{"name": "a", "tasks": ["T2I", "M-Edit"], "type": "folder", "folder": str(folder)}]
    )
    pools = gather_pools(feeds, [Task.T2I, Task.M_EDIT], make_buckets(64, multiple=32, count=1), 1)
    assert {(p.task, p.arity): p.members[0].tolist() for p in pools} == {
        (Task.T2I, 0): [0, 2],
        (Task.M_EDIT, 2): [3],
        (Task.M_EDIT, 4): [4],
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "a.png", ', "row 2: not JSON"),
        ('["a.png"]', "row 2: expected an object, found list"),
        ({"image": "a.png"}, r"row 2: expected the keys .*caption.*found \{image\}"),
        ({**CAPTION, "captoin": "x"}, "row 2: expected the keys"),
        ({**CAPTION, "caption": "  "}, "row 2: 'caption': the text is empty"),
        ({**CAPTION, "caption": 3}, "row 2: 'caption': expected a text"),
        ('{"image": "a.png", "caption": "\\ud800"}', "row 2: 'caption': the text is no Unicode"),
        ('{"image": "a.png", "caption": "\udcff"}', "row 2: not JSON in UTF-8"),
        ({**CAPTION, "image": ["a.png"]}, "row 2: expected a picture's path"),
        ({**CAPTION, "image": "../a.png"}, r"row 2: '\.\./a\.png' leads out"),
        ({**CAPTION, "image": ""}, "row 2: expected a path below .*, found an empty one"),
        ({**CAPTION, "image": "/nowhere/a.png"}, r"/nowhere/a\.png: no such file"),
        ({**EDIT, "sources": ["sub/../../a.png"]}, "row 2: .* leads out"),
        ({**EDIT, "sources": "a.png"}, "row 2: 'sources' must be a list"),
        ({**EDIT, "sources": []}, "row 2: 'sources' must be a list of one to four"),
        ({**EDIT, "sources": ["a.png"] * 5}, "row 2: 'sources' must be a list of one to four"),
        ({**CAPTION, "image": "missing.png"}, r"missing\.png.*no such file"),
        ({**CAPTION, "image": "empty.png"}, r"empty\.png.*: empty"),
        ({**CAPTION, "image": "captions.jsonl"}, r"captions\.jsonl.*: not a picture"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(folder, line, message):
    (folder / "empty.png").write_bytes(b"")
    write(folder, CAPTION, line, EDIT)
    source = photos(folder)
    assert [record.text for record in map(source.__getitem__, range(2))] == [
        "a red flag",
        "turn it",
    ]
    [problem] = source.problems()
    assert re.search(message, problem.reason) and problem.key.startswith("2")
    entry = {"name": "a", "tasks": ["T2I"], "type": "folder", "folder": str(folder)}
    with pytest.raises(ValueError, match="'a': 1 of 3 records .*share 0.01.*\n.*" + message):
        build_feeds([entry], bad_share=0.01)
    assert len(build_feeds([entry], bad_share=0.4)[0].source) == 2


def test_hosts_can_tell_that_they_see_different_data(folder):
    write(folder, CAPTION, EDIT, BOTH)
    found = identity(photos(folder))
    assert found.startswith("3 records, ") and found == identity(photos(folder))
    others = [
        ({**CAPTION, "caption": "a red plan"}, EDIT, BOTH),
        (CAPTION, EDIT),
        (CAPTION, BOTH, EDIT),
        (CAPTION, {**EDIT, "image": "sub/c.png"}, BOTH),
    ]
    for lines in others:
        write(folder, *lines)
        assert identity(photos(folder)) != found
    write(folder, CAPTION, EDIT, BOTH)
    Image.new("RGB", (60, 40), (200, 10, 11)).save(folder / "a.png")
    write(folder, CAPTION, EDIT, BOTH, "")
    assert identity(photos(folder)) != found
    drawn = [MiniworldSource("edit", seed=0, size=size, split="train") for size in (5, 5, 6)]
    assert identity(drawn[0]) == identity(drawn[1]) != identity(drawn[2])


def test_a_set_without_a_record_is_an_error(folder):
    with pytest.raises(FileNotFoundError, match=r"captions\.jsonl: no such file"):
        photos(folder)
    write(folder)
    with pytest.raises(ValueError, match=r"no record|nothing to read"):
        photos(folder)
    write(folder, {**CAPTION, "image": "missing.png"})
    with pytest.raises(ValueError, match=r"no record\n  1:missing\.png: .*no such file"):
        photos(folder)


def test_an_index_follows_its_files(folder):
    write(folder, CAPTION)
    assert len(photos(folder)) == 1
    write(folder, CAPTION, EDIT)
    source = photos(folder)
    assert len(source) == 2
    pixels = pickle.loads(pickle.dumps(source))[1].target.load(8, 8)
    assert (pixels == (200, 10, 10)).all(), "workers open it by its folder"
    content = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(content[:-1] + b"?")
    with pytest.raises(ValueError, match=r"b\.png at 0: expected the checksum .* changed since"):
        source[1].target.load(8, 8)
    (source.index.folder / "sizes.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match=r"sizes\.npy: damaged"):
        photos(folder)


def test_config_entries(folder):
    write(folder, CAPTION, EDIT)
    entry = {"type": "folder", "folder": str(folder)}
    specs = [
        {"name": "photos", "tasks": ["T2I", "Rec"], "weight": 2, **entry},
        {"name": "edits", "tasks": ["S-Edit"], **entry},
    ]
    expected = [("photos", Task.T2I, 2), ("photos", Task.REC, 2), ("edits", Task.S_EDIT, 1)]
    feeds = build_feeds(specs)
    assert [(feed.name, feed.task, feed.weight) for feed in feeds] == expected
    assert feeds[0].source is feeds[1].source
    (folder / "sets.yaml").write_text(yaml.safe_dump(specs))
    feeds = build_feeds([str(folder / "sets.yaml")])
    assert [(feed.name, feed.task, feed.weight) for feed in feeds] == expected
    (folder / "sets.yaml").write_text("photos")
    with pytest.raises(ValueError, match=r"sets\.yaml: expected a data set's entry"):
        build_feeds([str(folder / "sets.yaml")])
    for spec, message in [
        ({**entry, "type": "webfolder"}, "type must be one of webdataset, .*; found 'webfolder'"),
        ({"folder": "x"}, "found None"),
        ({**entry, "captions": 3}, "captions must be paths; found 3"),
        ({**entry, "captions": [5]}, r"captions must be paths; found \[5\]"),
        ({"type": "bagel", "paths": ["a", 2]}, r"paths must hold only texts; found \['a', 2\]"),
        *[
            (
                {"type": "webdataset", "paths": "a.tar", "text": text},
                f"data set .*'a.tar'.*: webdataset text: .*json:FIELD; found '{text}'",
            )
            for text in ("json", "json:", ":caption")
        ],
        ({**entry, "knid": "edit"}, "knid"),
        ({"type": "folder"}, "'folder'"),
    ]:
        with pytest.raises(ValueError, match=message):
            build_source(spec)
    with pytest.raises(ValueError, match="two data sets are named 'a'"):
        build_feeds([{"name": "a", "tasks": ["T2I"], **entry}] * 2)
    with pytest.raises(ValueError, match="tasks missing"):
        build_feeds([{"name": "a", **entry}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "name must be a text; found 3"),
        ({"name": ""}, "name must be a text; found ''"),
        ({"tasks": ["T3I"]}, r"'a': tasks must be .*T2I.*; found \['T3I'\]"),
        ({"tasks": [["T2I"]]}, "'a': tasks must be"),
        ({"tasks": "T2I"}, "'a': tasks must be .*; found 'T2I'"),
        ({"tasks": []}, r"'a': tasks must be .*; found \[\]"),
        ({"tasks": 1}, "'a': tasks must be .*; found 1"),
        (
            {"tasks": ["T2I", "Rec", "T2I"]},
            r"'a': tasks must be named once; found \['T2I', 'Rec', ",
        ),
        *[
            ({"weight": weight}, f"'a': weight must be a finite number .*; found {weight!r}")
            for weight in (-3, 0, "2", None, True, 1e-9, float("nan"), float("inf"))
        ],
        ({"type": ["x"]}, r"type must be one of webdataset, .*miniworld; found \['x'\]"),
        ({"type": 1}, "type must be one of webdataset, .*miniworld; found 1"),
        ({"size": "10"}, "size must be int; found '10'"),
        ({"size": True}, "size must be int; found True"),
        ({"size": 1.5}, "size must be int; found 1.5"),
        ({"size": 0}, "miniworld size: expected at least 1, found 0"),
        ({"seed": -1}, "miniworld seed: expected at least 0, found -1"),
        ({"seed": None}, "seed must be int; found None"),
        ({"kind": ["caption"]}, "kind must be str; found"),
        ({"split": 0}, "split must be str; found 0"),
        ({"split": "test"}, "miniworld split: expected one of"),
        ({"sizes": 3}, "unexpected keyword argument 'sizes'"),
    ],
)
def test_a_bad_value_of_a_data_set_is_named(change, message):
    entry = {"name": "a", "tasks": ["T2I"], "type": "miniworld"}
    arguments = {"kind": "caption", "seed": 0, "size": 10, "split": "train"}
    assert len(build_feeds([{**entry, **arguments}])[0].source) == 10
    with pytest.raises(ValueError, match=message):
        build_feeds([{**entry, **arguments, **change}])


@pytest.mark.parametrize("change", [{"folder": 3}, {"index": None}])
def test_a_bad_value_of_a_folder_is_named(folder, change):
    write(folder, CAPTION)
    (key,) = change
    with pytest.raises(ValueError, match=f"data set .*: {key} must be .*; found"):
        build_source({"type": "folder", "folder": str(folder), **change})


def test_a_build_that_was_stopped_goes_on(folder, monkeypatch):
    write(folder, *[{**CAPTION, "caption": f"flag {n}"} for n in range(10)])
    monkeypatch.setattr(rows, "CHUNK", 4)
    scanned, scan = [], lists.Folder.scan

    def stopped(self, unit):
        if len(scanned) == 2:
            raise KeyboardInterrupt
        scanned.append(unit[2])
        return scan(self, unit)

    monkeypatch.setattr(lists.Folder, "scan", stopped)
    with pytest.raises(KeyboardInterrupt):
        photos(folder)
    monkeypatch.setattr(
        lists.Folder, "scan", lambda self, unit: (scanned.append(unit[2]), scan(self, unit))[1]
    )
    source = photos(folder)
    assert scanned == [0, 4, 8], "what was done is not done again"
    assert [record.text for record in map(source.__getitem__, range(10))] == [
        f"flag {n}" for n in range(10)
    ]
    assert [record.key.split(":")[0] for record in map(source.__getitem__, range(10))] == [
        str(n) for n in range(1, 11)
    ]
    siblings = [
        path.name for path in source.index.folder.parent.glob(f"{source.index.folder.name}*")
    ]
    assert siblings == [source.index.folder.name], "nothing half built is left"


def test_paths_with_signs_of_patterns(tmp_path):
    for name in ("br[1]/0.tar", "br[1]/a*.tar", "br1/0.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    odd = str(tmp_path / "br[1]")
    assert storage.expand(f"{odd}/0.tar") == [f"{odd}/0.tar"], "not what the pattern means"
    assert storage.expand(f"{odd}/{{0,a*}}.tar") == [f"{odd}/0.tar", f"{odd}/a*.tar"]
    escaped = tmp_path / "br[[]1]"
    assert storage.expand(f"{escaped}/*.tar") == [f"{odd}/0.tar", f"{odd}/a*.tar"]
    with pytest.raises(
        FileNotFoundError, match=r"1\.tar: matches no file; a \[ .* is written \[\[\]"
    ):
        storage.expand(f"{odd}/1.tar")
    with pytest.raises(
        ValueError, match=r"^x/\{10\.\.1\}\.tar: \{10\.\.1\} names no file: it counts down"
    ):
        storage.expand("x/{10..1}.tar")
