"""Folders of pictures, and config entries of data sets."""

import json

import numpy as np
import pytest
from PIL import Image

from wemmu_jax.data.sources import FolderSource, build_feeds, build_source
from wemmu_jax.data.tasks import Task


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
    (folder / "captions.jsonl").write_text(text, encoding="utf-8")


CAPTION = {"image": "a.png", "caption": "a red flag"}
EDIT = {"image": "b.png", "instruction": "turn it", "sources": ["a.png"]}
BOTH = {"image": "a.png", "instruction": "put them together", "sources": ["b.png", "sub/c.png"]}


def test_kinds_are_told_by_their_sources(folder):
    turned = {"image": "turned.jpg", "caption": "schräg 斜め"}
    write(folder, CAPTION, EDIT, "", turned, BOTH, {**BOTH, "sources": ["b.png"] * 4})
    captions, edits = FolderSource(folder), FolderSource(folder, "edit")
    both = FolderSource(folder, "composition")
    assert [len(source) for source in (captions, edits, both)] == [2, 1, 2]
    assert captions.sizes().tolist() == [[40, 60], [80, 40]], "EXIF rotation counts"
    assert both.source_counts().tolist() == [2, 4]
    assert captions[1].text == "schräg 斜め" and captions[1].key == "4:turned.jpg"
    assert edits[0].text == "turn it" and edits[0].target.width == 30
    assert [source.width for source in edits[0].sources] == [60]
    pixels = both[0].sources[1].load(28, 56)
    assert pixels.shape == (28, 56, 3) and (pixels == (200, 10, 10)).all()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "a.png", ', "line 2: not JSON"),
        ('["a.png"]', "line 2: expected an object, found list"),
        ({"image": "a.png"}, r"line 2: expected the keys .*caption.*found \{image\}"),
        ({**CAPTION, "captoin": "x"}, "line 2: expected the keys"),
        ({**CAPTION, "caption": "  "}, "line 2: 'caption' must be a text"),
        ({**CAPTION, "caption": 3}, "line 2: 'caption' must be a text"),
        ({**CAPTION, "image": ["a.png"]}, "line 2: 'image' must be a text"),
        ({**CAPTION, "image": "../a.png"}, r"line 2: 'image': '\.\./a\.png' leads out"),
        ({**CAPTION, "image": "/etc/a.png"}, "line 2: 'image': .* leads out"),
        ({**EDIT, "sources": ["sub/../../a.png"]}, "line 2: 'sources': .* leads out"),
        ({**EDIT, "sources": "a.png"}, "line 2: 'sources' must be a list"),
        ({**EDIT, "sources": []}, "line 2: 'sources' must have one to four"),
        ({**EDIT, "sources": ["a.png"] * 5}, "line 2: 'sources' must have one to four"),
    ],
)
def test_a_bad_line_is_named(folder, line, message):
    write(folder, CAPTION, line)
    with pytest.raises(ValueError, match=r"captions\.jsonl, " + message):
        FolderSource(folder)


def test_bad_files_are_named(folder):
    with pytest.raises(FileNotFoundError, match=r"captions\.jsonl: no such file"):
        FolderSource(folder)
    write(folder, CAPTION, {"image": "missing.png", "caption": "x"})
    with pytest.raises(FileNotFoundError, match=r"line 2: missing\.png: no such file"):
        FolderSource(folder)
    (folder / "missing.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"line 2: missing\.png: empty"):
        FolderSource(folder)
    (folder / "missing.png").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"line 2: missing\.png: not a picture"):
        FolderSource(folder)
    (folder / "captions.jsonl").write_bytes(b'{"image": "a.png", "caption": "\xff"}')
    with pytest.raises(ValueError, match="line 1: not JSON in UTF-8"):
        FolderSource(folder)
    write(folder, EDIT)
    with pytest.raises(ValueError, match=r"no line of kind 'caption'; found \{'edit': 1\}"):
        FolderSource(folder)
    write(folder)
    with pytest.raises(ValueError, match="found an empty file"):
        FolderSource(folder)
    with pytest.raises(ValueError, match="kind of a folder must be one of caption, edit"):
        FolderSource(folder, "captions")


def test_config_entries(folder):
    write(folder, CAPTION, EDIT)
    entry = {"type": "folder", "folder": str(folder)}
    assert len(build_source({**entry, "kind": "edit"})) == 1
    feeds = build_feeds(
        [
            {"name": "photos", "tasks": ["T2I", "Rec"], "weight": 2, **entry},
            {"name": "edits", "tasks": ["S-Edit"], "kind": "edit", **entry},
        ]
    )
    assert [(feed.name, feed.task, feed.weight) for feed in feeds] == [
        ("photos", Task.T2I, 2),
        ("photos", Task.REC, 2),
        ("edits", Task.S_EDIT, 1),
    ]
    assert feeds[0].source is feeds[1].source
    for spec, message in [
        (
            {**entry, "type": "webfolder"},
            "type must be one of folder, miniworld; found 'webfolder'",
        ),
        ({"folder": "x"}, "found None"),
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
        *[
            ({"weight": weight}, f"'a': weight must be a finite number .*; found {weight!r}")
            for weight in (-3, 0, "2", None, True, 1e-9, float("nan"), float("inf"))
        ],
        ({"type": ["x"]}, r"type must be one of folder, miniworld; found \['x'\]"),
        ({"type": 1}, "type must be one of folder, miniworld; found 1"),
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


@pytest.mark.parametrize("change", [{"folder": 3}, {"kind": ["edit"]}, {"index": None}])
def test_a_bad_value_of_a_folder_is_named(folder, change):
    write(folder, CAPTION)
    (key,) = change
    with pytest.raises(ValueError, match=f"data set .*: {key} must be .*; found"):
        build_source({"type": "folder", "folder": folder, **change})


def test_records_of_one_line_share_their_picture(folder):
    write(folder, {"image": "a.png", "instruction": "again", "sources": ["a.png"]})
    record = FolderSource(folder, "edit")[0]
    assert record.sources[0] is record.target
    assert isinstance(record.target.load(28, 28), np.ndarray)
