"""Many requests from a file: checked together, drawn alone, taken up again where they were left."""

import json

import numpy as np
import pytest
from PIL import Image

REQUESTS = [
    {"task": "generate", "instruction": "a red circle", "output_image": "deep/a.png", "seed": 5},
    {"task": "generate", "instruction": "a red circle", "output_image": "b.png"},
    {
        "task": "reconstruct",
        "input_images": ["pictures/source.png"],
        "output_image": "c.png",
        "height": 64,
        "width": 64,
    },
    {"task": "chat", "instruction": "how many?", "input_images": ["pictures/source.png"]},
    {
        "task": "chat",
        "instruction": "why?",
        "input_images": ["pictures/source.png"],
        "output_image": None,
    },
]


@pytest.fixture
def requests(tmp_path):
    """Writes a requests file next to a folder with one picture."""
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (40, 40), "green").save(tmp_path / "pictures/source.png")

    def write(rows) -> str:
        text = "\n\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
        (tmp_path / "requests.jsonl").write_text(text)
        return str(tmp_path / "requests.jsonl")

    return write


@pytest.fixture
def batch(wemmu, workdir, tmp_path):
    def call(file: str, *words):
        common = ("--checkpoint", workdir, "--out", tmp_path / "out", "--steps", 2)
        return wemmu("batch", file, *common, *words)

    return call


def answers(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]


def test_batch(wemmu, batch, requests, workdir, tmp_path):
    file, out = requests(REQUESTS), tmp_path / "out"
    result = batch(file)
    assert result.code == 0, result.err
    assert "3 pictures drawn, 2 questions answered, 0 skipped" in result.out

    words = ["--checkpoint", workdir, "--steps", 2, "--out", tmp_path / "alone.png", "--seed", 5]
    assert wemmu("generate", "a red circle", *words).code == 0
    alone = Image.open(tmp_path / "alone.png")
    assert np.array_equal(alone, Image.open(out / "deep/a.png"))
    assert not np.array_equal(alone, Image.open(out / "b.png"))
    first = answers(tmp_path)
    assert [a["instruction"] for a in first] == ["how many?", "why?"]

    (out / "b.png").unlink()
    kept = (out / "deep/a.png").stat().st_mtime_ns
    (out / "answers.jsonl").write_text(
        json.dumps(first[0]) + '\n{"instruction": "wh'
    )  # killed here
    result = batch(file)
    assert "1 pictures drawn, 1 questions answered, 3 skipped" in result.out
    assert (out / "deep/a.png").stat().st_mtime_ns == kept
    assert answers(tmp_path) == first

    # A line before them, another word for the same folder, and all of another file done again.
    moved = batch(
        requests([REQUESTS[0], *REQUESTS]), "--checkpoint", f"{workdir}/../{workdir.name}"
    )
    assert "line 3: output_image: line 1 writes the same file" in moved.err
    more = [{**REQUESTS[0], "output_image": "more.png"}, *REQUESTS]
    result = batch(requests(more), "--checkpoint", f"{workdir}/../{workdir.name}")
    assert "1 pictures drawn, 0 questions answered, 5 skipped" in result.out
    result = batch(requests(REQUESTS[4:]), "--overwrite")
    assert "0 pictures drawn, 1 questions answered, 0 skipped" in result.out
    assert answers(tmp_path) == first

    other = [{**REQUESTS[0], "seed": 6}, *REQUESTS[1:]]
    result = batch(requests(other))
    assert result.code == 2
    assert "seed '5' there, '6' here" in result.err
    result = batch(requests(other[:1]), "--overwrite")
    assert "1 pictures drawn, 0 questions answered, 0 skipped" in result.out
    assert not np.array_equal(alone, Image.open(out / "deep/a.png"))


BAD = [
    ("{", "not JSON"),
    ("[]", "expected an object, found list"),
    ({"task": "paint"}, "task: expected one of"),
    ({"instruction": "x"}, "task: expected one of"),
    ({"task": "generate", "instruction": "x", "output": "x.png"}, "unknown fields ['output']"),
    ({"task": "generate", "output_image": "x.png"}, "instruction: missing"),
    ({"task": "generate", "instruction": "x"}, "output_image: missing"),
    ({"task": "generate", "instruction": 3}, "instruction: expected str, found int"),
    ({"task": "generate", "instruction": "x", "seed": True}, "seed: expected int, found bool"),
    ({"task": "generate", "instruction": "x", "seed": -1}, "seed: expected 0 to 4294967295"),
    ({"task": "chat", "instruction": "x", "input_images": [1]}, "input_images: expected paths"),
    ({"task": "chat", "instruction": "x", "output_image": "x.png"}, "chat writes none"),
    ({"task": "chat", "instruction": "x", "input_images": ["no.png"]}, "no.png: no such file"),
    (
        {"task": "generate", "instruction": "x", "output_image": "../x.png"},
        "inside the output folder",
    ),
    ({"task": "generate", "instruction": "x", "output_image": "x.jpg"}, "written as PNG"),
    (
        {"task": "generate", "instruction": "x", "output_image": "h.png", "height": 50},
        "the nearest that works is 48 x 48",
    ),
    (
        {"task": "generate", "instruction": "a " * 600, "output_image": "long.png"},
        "at most 512 text tokens",
    ),
    (
        {"task": "edit", "instruction": "x", "output_image": "e.png"},
        "edit: expected 1 pictures, found 0",
    ),
    (
        {"task": "generate", "instruction": "x", "output_image": "b.png"},
        "output_image: line 3 writes the same file",
    ),
    (
        {"task": "generate", "instruction": "x", "output_image": "b.png/x.png"},
        "out/b.png as a file",
    ),
    ({"task": "generate", "instruction": "x", "output_image": "n\0.png"}, "no NUL, found 'n"),
    (
        {"task": "generate", "instruction": "x", "output_image": "n\ud800.png"},
        "output_image: expected Unicode text, found",
    ),
    (
        {"task": "generate", "instruction": "x", "output_image": "n" * 252 + ".png"},
        "output_image: expected names of at most 255 bytes",
    ),
    (
        {"task": "generate", "instruction": "x", "output_image": "answers.jsonl/x.png"},
        "answers.jsonl is where answers go",
    ),
    ({"task": "generate", "instruction": "\ud800", "output_image": "u.png"}, "Unicode text"),
    ({"task": "chat", "instruction": "x", "width": 64}, "width: chat answers in words"),
]


def test_every_bad_line_is_named_before_anything_is_drawn(batch, requests, tmp_path):
    rows = [row for row, _ in BAD]
    result = batch(requests([*REQUESTS, *rows]))
    assert result.code == 2
    assert not (tmp_path / "out").exists()
    named = [line.strip() for line in result.err.splitlines()[1:]]
    assert len(named) == len(BAD)
    for number, (line, (_, message)) in enumerate(zip(named, BAD, strict=True)):
        assert line.startswith(f"line {1 + 2 * (len(REQUESTS) + number)}: ")
        assert message in line


def test_targets_that_files_on_disk_stand_in_the_way_of(batch, requests, tmp_path):
    (tmp_path / "out/folder.png").mkdir(parents=True)
    (tmp_path / "out/file.png").touch()
    names = ["folder.png", "file.png/x.png", "deep.png/x.png", "deep.png"]
    rows = [{"task": "generate", "instruction": "x", "output_image": name} for name in names]
    result = batch(requests(rows), "--overwrite")
    assert result.code == 2
    out = tmp_path / "out"
    assert [line.strip() for line in result.err.splitlines()[1:]] == [
        f"line 1: output_image: {out}/folder.png is a folder; expected a file",
        f"line 3: output_image: {out}/file.png is a file; {out}/file.png/x.png needs it as a folder",
        "line 7: output_image: line 5 needs it as a folder",
    ]
    assert sorted(path.name for path in out.rglob("*")) == ["file.png", "folder.png"]


def test_a_name_of_full_length(batch, requests, tmp_path):
    name = "n" * 251 + ".png"
    result = batch(requests([{**REQUESTS[0], "output_image": name}]))
    assert result.code == 0, result.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_out_is_a_file(wemmu, workdir, requests, tmp_path):
    (tmp_path / "file").touch()
    words = ["--checkpoint", workdir, "--out", tmp_path / "file"]
    result = wemmu("batch", requests(REQUESTS[3:]), *words)
    assert result.code == 2
    assert f"--out: {tmp_path / 'file'} is a file" in result.err


def test_no_requests(batch, requests, tmp_path):
    assert "no.jsonl: no such file" in batch(tmp_path / "no.jsonl").err
    assert "holds no request" in batch(requests([])).err


def test_answers_that_are_none(batch, requests, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/answers.jsonl").write_text("hello\n")
    assert "answers.jsonl, line 1: not JSON" in batch(requests(REQUESTS)).err
