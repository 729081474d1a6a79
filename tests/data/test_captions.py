"""Sidecars of captions while an index is made."""

import json
import re
import tracemalloc

import pytest
from PIL import Image

from tests.data.conftest import write_json
from wemmu_jax.data import indexing
from wemmu_jax.data.captions import Captions, write_captions
from wemmu_jax.data.formats import rows as rows_format
from wemmu_jax.data.sources import build_source


@pytest.fixture
def recaptioned(tmp_path, monkeypatch):
    """A set of ten pictures in three units, whose captions lie in two sidecars among those of others."""
    monkeypatch.setattr(rows_format, "CHUNK", 4)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "caption": f"old {number}"} for number in range(10)]
    write_json(tmp_path / "captions.jsonl", rows, lines=True)
    keys = [f"{number + 1}:a.png" for number in range(10)] + [f"other {n}" for n in range(20_000)]
    for name, own in (("new0.jsonl", keys[5::2]), ("new1.jsonl", keys[:5] + keys[6::2])):
        lines = [{"key": key, "caption": f"new {key}"} for key in own]
        write_json(tmp_path / name, lines, lines=True)
    return {"type": "folder", "folder": str(tmp_path), "captions": f"{tmp_path}/new{{0..1}}.jsonl"}


@pytest.mark.parametrize("processes", [0, 2])
def test_every_process_finds_them(recaptioned, processes):
    source = build_source(recaptioned, processes=processes)
    texts = [source[number].text for number in range(10)]
    assert texts == [f"new {number + 1}:a.png" for number in range(10)]
    folder = source.index.folder
    assert [path.name for path in folder.parent.glob(f"{folder.name}*")] == [folder.name]


def test_a_process_maps_them(recaptioned, monkeypatch):
    """Twenty thousand captions as objects are 4 MB in each process."""
    memory = []

    def traced(function, jobs, processes):
        for job in jobs:
            tracemalloc.start()
            yield function(*job)
            memory.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    monkeypatch.setattr(indexing, "each", traced)
    assert build_source(recaptioned)[3].text == "new 4:a.png"
    assert len(memory) == 3 and max(memory) < 1e6


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (" ", r"^the sidecars have no caption for it$"),
        (
            '{"key": "3:a.png", "capt',
            r"no caption for it; lines that .*: 1, first .*new1\.jsonl, line 3: expected \{",
        ),
        ({"key": 3, "caption": "x"}, r"no caption for it; .*line 3: .*expected a text, found int"),
        ({"key": "\ud800", "caption": "x"}, r"no caption for it; .*line 3: .*no Unicode"),
        ({"key": "3:a.png", "reason": "x"}, r"new1\.jsonl, line at byte 90: .*KeyError: 'caption'"),
        ({"key": "3:a.png", "caption": " "}, r"new1\.jsonl, line at byte 90: .*text is empty"),
    ],
)
def test_a_bad_line_costs_its_record(recaptioned, tmp_path, line, reason):
    file = tmp_path / "new1.jsonl"
    lines = file.read_text().splitlines()
    assert '"3:a.png"' in lines[2]
    lines[2] = line if isinstance(line, str) else json.dumps(line)
    file.write_text("\n".join(lines))
    source = build_source(recaptioned)
    assert [source[n].text for n in range(9)] == [f"new {n}:a.png" for n in (1, 2, *range(4, 11))]
    [problem] = source.problems()
    assert problem.key == "3:a.png" and re.search(reason, problem.reason), problem


def test_two_captions_leave_nothing_behind(tmp_path):
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    write_json(files[0], [{"key": " a ", "caption": " A "}], lines=True)
    write_json(files[1], [{"key": "b", "caption": ""}, {"key": " a ", "caption": "x"}], lines=True)
    with pytest.raises(ValueError, match="two captions for ' a '"):
        write_captions(list(map(str, files)), tmp_path / "table")
    assert sorted(tmp_path.iterdir()) == files
    write_captions([str(files[0])], tmp_path / "table")
    found = Captions(tmp_path / "table")
    assert len(found) == 1 and found.get(" a ") == "A" and found.get("b") is None
