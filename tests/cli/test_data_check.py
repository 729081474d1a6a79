"""`wemmu data check` finds what training would refuse, all of it at once."""

import json
import types

import pytest
import yaml
from PIL import Image

from wemmu_jax.cli import data
from wemmu_jax.data import measuring, sources
from wemmu_jax.data.buckets import make_buckets
from wemmu_jax.data.sources import build_feeds


@pytest.fixture
def entry(tmp_path):
    """Makes a folder of three pictures, no two of one size, and its entry."""

    def make(name, tasks=("T2I",), *, edits=False, **changes):
        folder = tmp_path / name
        folder.mkdir()
        lines = []
        for number in range(3):
            Image.new("RGB", (8 + number, 8)).save(folder / f"{number}.bmp")
            line = {"image": f"{number}.bmp", "caption": f"number {number}"}
            if edits:
                line = {"image": line["image"], "instruction": "turn", "sources": ["0.bmp"]}
            lines.append(json.dumps(line) + "\n")
        (folder / "captions.jsonl").write_text("".join(lines))
        made = {"name": name, "tasks": list(tasks), "type": "folder", "folder": str(folder)}
        return {**made, **changes}

    return make


def spec_of(tmp_path, *entries):
    file = tmp_path / "sets.yaml"
    file.write_text(yaml.safe_dump(list(entries)))
    return file


@pytest.mark.parametrize(
    ("spec", "given", "resolution"),
    [
        ("configs/wemmu_3b.py:stage1", None, 512),
        ("configs/wemmu_3b.py:stage2", None, 1024),
        ("configs/wemmu_3b.py:stage2", 768, 768),
        ("sets.yaml", None, 512),
    ],
)
def test_pictures_are_sorted_into_the_buckets_of_the_stage(spec, given, resolution):
    args = types.SimpleNamespace(spec=spec, resolution=given, overrides={})
    assert data._buckets(args) == make_buckets(resolution, multiple=32)


def test_entries_are_looked_at_before_any_file(refused, entry, tmp_path):
    good = entry("good")
    wrong = [
        {**good, "name": "a", "tasks": ["S-Edit", "M-Edti"]},
        {**good, "name": "b", "weight": -1},
        {**good, "name": "c", "type": "fodler"},
        {**good, "name": "d", "foldr": "x"},
        good,
    ]
    spec = spec_of(tmp_path, good, *wrong)
    expected = [
        "'a': tasks must be",
        "found ['S-Edit', 'M-Edti']",
        "'b': weight must be",
        "found 'fodler'",
        "foldr",
        "two data sets are named 'good'",
    ]
    for action in ("check", "index", "pack"):
        words = ["--out", tmp_path / "out"] if action == "pack" else []
        said = refused("data", action, spec, "--processes", 0, *words)
        assert all(text in said for text in expected), said
        assert "reading" not in said and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"(?s)M-Edti.*weight must be.*two data sets"):
        build_feeds([str(spec)])


def test_what_is_wrong_with_one_set_keeps_no_other_from_its_turn(wemmu, entry, tmp_path):
    missing, half = {**entry("missing"), "folder": "nowhere"}, entry("half")
    (tmp_path / "half/1.bmp").write_bytes(b"no picture")
    spec = spec_of(tmp_path, missing, half, entry("good"))
    result = wemmu("data", "check", spec, "--processes", 0)
    assert result.code == 2
    assert "wemmu data: missing: nowhere/captions.jsonl: no such file" in result.err
    assert "\nhalf: 1 unreadable, 0 keys twice" in result.err and "good:" not in result.err
    out = " ".join(result.out.split())
    assert "half records 2" in out and "good records 3" in out
    assert wemmu("data", "index", spec, "--processes", 0).code == 2
    packed = wemmu("data", "pack", spec, "--processes", 0, "--out", tmp_path / "packed")
    assert packed.code == 2 and "wemmu data: missing: nowhere" in packed.err
    assert (tmp_path / "packed/good-00000-of-00001.arrayrecord").exists()


def test_a_set_must_serve_its_tasks(wemmu, entry, tmp_path):
    both, edits = entry("both", ["T2I", "Rec", "S-Edit", "VQA"]), entry("edits", edits=True)
    drawn = {"name": "drawn", "tasks": ["S-Edit"], "type": "miniworld", "kind": "caption"}
    drawn |= {"seed": 0, "size": 9, "split": "train"}
    result = wemmu("data", "check", spec_of(tmp_path, both, edits, drawn), "--processes", 0)
    assert result.code == 2, result
    for name, reason in [
        ("both", "none of its 3 records can serve task S-Edit; none of its 3 records can serve"),
        ("edits", "none of its 3 records can serve task T2I"),
        ("drawn", "none of its 9 records can serve task S-Edit"),
    ]:
        assert f"{name}: {reason}" in result.err
    assert "task T2I;" not in result.err and "task Rec" not in result.err


def test_a_set_without_words_cannot_serve_a_task_that_needs_them(wemmu, tmp_path):
    fixture = "tests/data/fixtures/img2dataset/00000.tar"
    made = {"name": "mute", "tasks": ["Rec", "T2I"], "type": "webdataset", "paths": fixture}
    spec = spec_of(tmp_path, {**made, "text": ""})
    result = wemmu("data", "check", spec, "--processes", 0)
    assert result.code == 2
    assert "mute: task T2I can use none of its records that were tried: record" in result.err
    assert "has no text" in result.err


def test_a_config_is_checked_for_its_own_tasks(wemmu, entry, tmp_path):
    spec = spec_of(tmp_path, entry("photos", ["T2I", "Uncond", "Rec", "S-Edit"]))
    words = ["configs/tiny.py:stage1", f'--config.data.sources=["{spec}"]', "--processes", 0]
    result = wemmu("data", "check", *words, "--config.data.held_out=[]")
    assert result.code == 0, "stage 1 edits nothing"
    result = wemmu("data", "check", *words, "--config.data.mixture.M-Edit=1.0")
    assert result.code == 2
    assert "data.sources: no data set feeds M-Edit, which the mixture asks for" in result.err


@pytest.mark.parametrize("sum_of", [None, lambda data: 7])
def test_pictures_that_share_a_checksum_are_not_the_same(
    wemmu, entry, tmp_path, monkeypatch, sum_of
):
    """Of twelve million, seventeen thousand share their CRC-32 by chance."""
    if sum_of:
        for module in (measuring, sources):
            monkeypatch.setattr(module, "zlib", types.SimpleNamespace(crc32=sum_of))
    spec = spec_of(tmp_path, entry("photos"))
    content = (tmp_path / "photos/2.bmp").read_bytes()
    (tmp_path / "photos/1.bmp").write_bytes(content)
    result = wemmu("data", "check", spec, "--processes", 0)
    assert result.code == 0 and "same target bytes 1 " in " ".join(result.out.split())
