"""`wemmu data`: on thirty pictures, some of them edits of others."""

import json
import re

import numpy as np
import pytest
import yaml
from PIL import Image

from wemmu_jax.cli.main import main
from wemmu_jax.data.prompts import DESCRIPTION_PROMPT
from wemmu_jax.data.sources import build_source
from wemmu_jax.inference import captioning

# 48 pixels is the tiny preset's own size; the other is two of them.
SIZES = ((48, 48), (48, 96))


@pytest.fixture
def photos(tmp_path):
    """A YAML file of one data set, "photos"."""
    rng, lines = np.random.default_rng(0), []
    for number in range(30):
        pixels = rng.integers(0, 256, (*SIZES[number % 2], 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        lines.append({"image": f"{number}.png", "caption": f"a red circle <{number}>"})
        if number % 3 == 2:
            sources = [f"{number - 2}.png"]
            lines[-1] = {"image": f"{number}.png", "instruction": "turn", "sources": sources}
    write_lines(tmp_path, lines)
    entry = {"name": "photos", "tasks": ["T2I", "S-Edit", "Rec", "Uncond"], "type": "folder"}
    spec = tmp_path / "sets.yaml"
    spec.write_text(yaml.safe_dump([{**entry, "folder": str(tmp_path)}]))
    return spec


def write_lines(folder, lines):
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def source_size(spec, key):
    return Image.open(spec.parent / key.split(":")[1]).size


def source_of(spec, **changes):
    [entry] = yaml.safe_load(spec.read_text())
    del entry["name"], entry["tasks"]
    return build_source(entry | changes)


@pytest.mark.parametrize("processes", [0, 2])
def test_index_and_check_a_good_set(wemmu, photos, processes):
    result = wemmu("data", "index", photos, "--processes", processes)
    assert result.code == 0 and "photos: 30 records, 0 left out" in result.out
    result = wemmu("data", "check", photos, "--processes", processes)
    assert result.code == 0, result
    out = " ".join(result.out.split())
    assert "records 30 source pictures: 20 with 0, 10 with 1" in out
    assert "target heights 48 median; 48 to 48 target widths 72 median; 48 to 96" in out
    assert "same target bytes 0" in out and "unreadable 0" in out
    assert "512 x 512 15 ####" in out and "352 x 736 15 ####" in out


def test_check_says_what_is_wrong(wemmu, photos):
    folder = photos.parent
    (folder / "3.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "4.png").write_bytes(b"<html>")
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    lines[6]["caption"] = "<image> a circle"
    lines[7]["caption"] = " "
    write_lines(folder, lines)
    assert len(source_of(photos)) == 28, "what is indexed is there before one more goes bad"
    content = (folder / "9.png").read_bytes()
    (folder / "9.png").write_bytes(content[:-9] + b"123456789")
    result = wemmu("data", "check", photos, "--processes", 0)
    assert result.code == 2 and "wemmu data: photos: 4 unreadable, 0 keys twice" in result.err
    out = " ".join(result.out.split())
    assert "records 26" in out and "same target bytes 1" in out and "placeholder texts 1" in out
    assert "5:4.png" in out and "not a picture" in out and "'caption': the text is empty" in out
    assert re.search(r"10:9\.png: .*9\.png at 0: expected the checksum", result.out)
    assert re.search(r"12:11\.png: .*9\.png at 0: expected the checksum", result.out), (
        "its edit too"
    )


def test_a_set_that_is_repaired_is_good_again(wemmu, photos):
    def check():
        return wemmu("data", "check", photos, "--processes", 0)

    missing = photos.parent / "4.png"
    content = missing.read_bytes()
    missing.unlink()
    result = check()
    assert result.code == 2 and re.search(r"5:4\.png: .*4\.png: no such file", result.out)
    missing.write_bytes(content)
    result = check()
    assert result.code == 0 and "unreadable 0" in " ".join(result.out.split()), result
    Image.new("RGB", (48, 48), "red").save(photos.parent / "9.png")
    result = check()
    named = re.findall(r"^  (\d+):\S+ .*`wemmu data index` reads anew", result.out, re.MULTILINE)
    assert result.code == 2 and named == ["10", "12"], "the edit that it is a source of, too"
    result = wemmu("data", "index", photos, "--processes", 0)
    assert result.code == 0 and "photos: 30 records, 0 left out" in result.out
    assert check().code == 0


def test_specs_that_cannot_be(refused, photos):
    assert "no such file" in refused("data", "check", "nothing.yaml")
    assert "--set other" in refused("data", "check", photos, "--set", "other")
    assert "expected a stage's config" in refused(
        "data", "encode", photos, "--init", "x", "--out", "y"
    )


def test_show_draws_samples_with_their_prompts(wemmu, photos, converted, tmp_path):
    page = tmp_path / "sheet.html"
    result = wemmu("data", "show", photos, "--out", page, "--count", 20, "--init", converted)
    assert result.code == 0 and "20 samples" in result.out
    text = page.read_text()
    assert text.count("<tr>") == 20 and text.count("data:image/jpeg") > 20
    assert "a red circle &lt;" in text and "turn" in text and "Please reproduce" in text
    assert re.search(r"T2I<br>.*<br>\d+ x \d+<br>[1-9]\d* tokens", text)
    cut = (photos.parent / "2.png").read_bytes()
    (photos.parent / "2.png").write_bytes(cut[: len(cut) // 2])
    words = ["--init", converted, f"--config.data.sources=[{json.dumps(str(photos))}]"]
    words += ["--config.batch.rows=32", "--count", 32]
    result = wemmu("data", "show", "configs/tiny.py:stage3", "--out", page, *words)
    assert result.code == 0 and "32 samples" in result.out, result.err
    text = page.read_text()
    assert text.count("<tr>") == 32 and "micro-batches 0 to 7" in text
    tasks = re.findall(r"<tr><td>\d+ · ([\w-]+)<br>", text)
    # Of 110, S-Edit has 55, T2I 25, Rec 20 and Uncond 10.
    assert 8 <= tasks.count("S-Edit") <= 24 and set(tasks) == {"S-Edit", "T2I", "Rec", "Uncond"}
    assert "photos/" in text and "<i>empty</i>" in text
    assert "in the place of photos/3:2.png: " in text and "<br>photos/3:2.png<br>" not in text


def test_conversations_are_checked_and_shown(wemmu, converted, tmp_path):
    lines = []
    for number in range(8):
        Image.new("RGB", SIZES[number % 2], (30 * number, 9, 9)).save(tmp_path / f"{number}.png")
        pictures = [f"{number}.png"] * (number % 3)
        lines.append({"images": pictures, "turns": [[f"what is <{number}>?", "a circle"]]})
    write_lines(tmp_path, lines)
    stored = {"name": "talk", "tasks": ["VQA"], "type": "folder", "folder": str(tmp_path)}
    drawn = {"name": "drawn", "tasks": ["VQA"], "type": "miniworld", "kind": "conversation"}
    spec = tmp_path / "sets.yaml"
    spec.write_text(yaml.safe_dump([stored, drawn | {"seed": 0, "size": 9, "split": "train"}]))
    result = wemmu("data", "check", spec, "--processes", 0)
    assert result.code == 0, result
    out = " ".join(result.out.split())
    assert "records 8 source pictures: 3 with 0, 3 with 1, 2 with 2" in out
    assert "conversations 8 turns: 8" in out and "drawn, nothing on disk" in out
    page = tmp_path / "sheet.html"
    result = wemmu("data", "show", spec, "--out", page, "--count", 20, "--init", converted)
    assert result.code == 0, result
    text = page.read_text()
    assert text.count("VQA<br>talk/") >= 4 and text.count("VQA<br>drawn/") >= 4
    assert "what is &lt;" in text and "<code>a circle</code>" in text
    assert re.search(r"VQA<br>talk/.*<br>[1-9]\d* tokens", text)


def test_packed_sets_hold_the_same(wemmu, photos, tmp_path):
    words = ["data", "pack", photos, "--out", tmp_path / "packed", "--shard-size", 8]
    assert wemmu(*words, "--processes", 2).code == 0
    files = sorted((tmp_path / "packed").iterdir())
    assert [file.name for file in files][3] == "photos-00003-of-00004.arrayrecord"
    before = source_of(photos)
    after = build_source(
        {"type": "array-record", "paths": f"{tmp_path}/packed/photos-*.arrayrecord"}
    )
    assert len(before) == len(after) == 30
    for old, new in zip(
        map(before.__getitem__, range(30)), map(after.__getitem__, range(30)), strict=True
    ):
        assert (old.key, old.text, len(old.sources)) == (new.key, new.text, len(new.sources))
        for a, b in zip((old.target, *old.sources), (new.target, *new.sources), strict=True):
            np.testing.assert_array_equal(a.load(48, 48), b.load(48, 48))
    files[1].unlink()
    times = {file: file.stat().st_mtime_ns for file in files if file.exists()}
    assert wemmu(*words, "--processes", 0).code == 0
    assert times.items() <= {file: file.stat().st_mtime_ns for file in files}.items()


def test_what_packing_leaves_out(wemmu, photos, tmp_path):
    folder, out = photos.parent, tmp_path / "packed"
    (folder / "4.png").write_bytes(b"<html>")
    assert len(source_of(photos)) == 29, "what is indexed is there before one more goes bad"
    (folder / "9.png").write_bytes((folder / "0.png").read_bytes())
    words = ["data", "pack", photos, "--out", out, "--shard-size", 8, "--processes", 0]
    for remade in ([0, 1, 2, 3], [3], []):  # with 9.png and the edit of it in a shard that stays
        for shard in remade:
            (out / f"photos-{shard:05}-of-00004.arrayrecord").unlink(missing_ok=True)
        result = wemmu(*words)
        assert result.code == 2, result
        assert f"wemmu data: photos: 3 records left out, see {out}/photos.bad.jsonl" in result.err
        rows = [json.loads(line) for line in (out / "photos.bad.jsonl").read_text().splitlines()]
        assert [(row["data_set"], row["key"]) for row in rows] == [
            ("photos", key) for key in ("5:4.png", "10:9.png", "12:11.png")
        ]
        assert all(f"  {row['key']}: {row['reason']}\n" in result.out for row in rows)
        assert set(rows[0]) == {"data_set", "key", "reason"} and "is cut" in rows[1]["reason"]
    packed = {"type": "array-record", "paths": f"{out}/photos-*.arrayrecord"}
    assert len(build_source(packed)) == 27


def test_captions_are_what_the_model_says_of_each_picture(
    wemmu, photos, converted, tmp_path, monkeypatch
):
    from wemmu_jax.inference.pipeline import WeMMU

    monkeypatch.setattr(captioning, "PART", 10)
    content = (photos.parent / "4.png").read_bytes()
    source_of(photos)
    (photos.parent / "4.png").write_bytes(b"x" + content[1:])
    entries = yaml.safe_load(photos.read_text())
    sidecars = f"{tmp_path}/new/photos/captions-?????-of-?????.jsonl"
    photos.write_text(yaml.safe_dump([one | {"captions": sidecars} for one in entries]))
    assert "matches no file" in wemmu("data", "index", photos).err
    words = ["data", "caption", photos, "--init", converted, "--out", tmp_path / "new"]
    words += ["--resolution", 48, "--batch", 8, "--max-new-tokens", 6, "--dtype", "float32"]
    first = wemmu(*words, "--shard", "1/2")
    assert first.code == 0, first.err
    folder = tmp_path / "new/photos"
    assert [file.name for file in sorted(folder.iterdir())] == [
        "captions-00001-of-00003.bad.jsonl",
        "captions-00001-of-00003.jsonl",
        "captions.json",
    ]
    kept = (folder / "captions-00001-of-00003.jsonl").stat().st_mtime_ns
    assert wemmu(*words, "--threads", 2).code == 0
    assert (folder / "captions-00001-of-00003.jsonl").stat().st_mtime_ns == kept
    other = wemmu(*words, "--prompt", "What is it?")
    assert other.code == 2 and "captions-*.jsonl were made from something else" in other.err
    assert f"prompt: there {DESCRIPTION_PROMPT!r}, now 'What is it?'" in other.err
    rows, bad = {}, {}
    for file in sorted(folder.glob("*.jsonl")):
        for row in map(json.loads, file.read_text().splitlines()):
            (bad if "reason" in row else rows)[row["key"]] = row.get("caption", row.get("reason"))
    assert len(rows) + len(bad) == 30 and "checksum" in bad["5:4.png"]
    model = WeMMU.load(converted, dtype="float32")
    # Of the model's own size, so that `chat` looks at the same pixels.
    squares = [key for key in rows if source_size(photos, key) == (48, 48)]
    assert len(squares) > 5
    for key in squares[:3]:
        picture = photos.parent / key.split(":")[1]
        said = model.chat(DESCRIPTION_PROMPT, images=[picture], max_new_tokens=6)
        assert rows[key] == said.strip()
    recaptioned = source_of(photos)
    found = {r.key: r.text for r in map(recaptioned.__getitem__, range(len(recaptioned)))}
    assert found == {key: caption.strip() for key, caption in rows.items() if key in found}
    assert len(found) >= 20


def test_help_names_every_action(capsys):
    with pytest.raises(SystemExit):
        main(["data", "--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in ("check", "index", "show", "encode", "caption", "pack"))
