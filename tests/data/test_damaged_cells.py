"""One bad file, row group, row or record: the others are read, and the ledger has it by its name."""

import errno
import json
import re
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.conftest import PICTURES, picture, records, write_json
from wemmu_jax.data import storage
from wemmu_jax.data.formats import array_record
from wemmu_jax.data.sources import build_source

CAPTIONS = json.dumps({"a": "words"})


def bagel(path, pictures, captions=None, **options):
    """A Parquet file of these pictures; its entry."""
    captions = captions or [CAPTIONS] * len(pictures)
    pq.write_table(pa.table({"image": pictures, "captions": captions}), path, **options)
    return {"type": "bagel", "paths": str(path)}


def found(spec):
    """Keys of a set's records, and `key: reason` of its problems, which name their file."""
    source = build_source(spec)
    for number in range(len(source)):
        source[number].target.load(8, 8)
    problems = source.problems()
    return [source.index.key(n) for n in range(len(source))], [
        f"{problem.key}: {problem.reason}" for problem in problems
    ]


def test_cells_of_other_forms(tmp_path):
    path = tmp_path / "t.parquet"
    spec = bagel(path, [picture("p0"), None, picture("p1")])
    keys, [problem] = found(spec)
    assert keys == ["t.parquet:1", "t.parquet:3"]
    assert problem == (
        f"t.parquet:2: {path}, row group 0, row 2: expected the bytes of a picture, found [None]"
    )
    captions = [CAPTIONS, None, "{", "[" * 100_000, '{"a": null}', '{"a": "x\\u0000"}', CAPTIONS]
    keys, problems = found(bagel(path, [picture("p0")] * 7, captions))
    assert keys == ["t.parquet:1", "t.parquet:7"] and len(problems) == 5
    assert all(
        problem.startswith(f"t.parquet:{row}: {path}, row {row}: ")
        for row, problem in enumerate(problems, 2)
    )


def test_a_text_that_is_no_utf8_costs_its_row(tmp_path):
    path = tmp_path / "t.parquet"
    captions = [CAPTIONS, CAPTIONS.replace("words", "wo@@s"), CAPTIONS]
    spec = bagel(path, [picture("p0")] * 3, captions, compression="NONE")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"wo@@s", b"wo\xff\xffs"))
    keys, [problem] = found(spec)
    assert keys == ["t.parquet:1", "t.parquet:3"] and f"{path}, row 2: 'utf-8' codec" in problem


def test_pictures_as_hugging_face_stores_them(tmp_path):
    cells = [{"bytes": picture("p0"), "path": "0.png"}, {"bytes": None, "path": "1.png"}]
    spec = bagel(tmp_path / "t.parquet", cells)
    assert records(spec) == [("t.parquet:1", "words", "p0", ())]
    assert "row 2: expected the bytes of a picture" in found(spec)[1][0]


def test_an_edit_costs_what_lies_beside_it_nothing(tmp_path):
    path = tmp_path / "e.parquet"
    table = {
        "image_list": [[picture(f"p{n}") for n in range(4)], None, [picture("p1"), None]],
        "instruction_list": [[["one"], None, ["three"]], [["x"]], [["y"]]],
    }
    pq.write_table(pa.table(table), path)
    spec = {"type": "bagel", "paths": str(path)}
    assert [r[:3] for r in records(spec)] == [
        ("e.parquet:1:1", "one", "p1"),
        ("e.parquet:1:3", "three", "p3"),
    ]
    reasons = found(spec)[1]
    assert [reason.split(": ")[0] for reason in reasons] == [
        "e.parquet:1:2",
        "e.parquet:2",
        "e.parquet:3:1",
    ]
    assert "the text is empty" in reasons[0] and "found 0 and 1" in reasons[1]


def test_imgedit_rows_of_other_forms(pictures):
    turn = {"input_images": ["p0.png"], "output_images": ["p1.png"], "prompt": "add a cat"}
    rows = [[turn], None, [], [turn, None, turn], [{**turn, "output_images": None}], [turn]]
    path = pictures / "m.parquet"
    pq.write_table(pa.Table.from_pylist([{"data": row} for row in rows]), path)
    keys, problems = found({"type": "imgedit", "paths": str(path)})
    assert keys == ["m.parquet:1", "m.parquet:4:1", "m.parquet:4:3", "m.parquet:6"]
    assert [problem.rpartition(f": {path}, row ")[0] for problem in problems] == [
        "m.parquet:2",
        "m.parquet:3",
        "m.parquet:4:2",
        "m.parquet:5",
    ]


def damage_page(path, group, column):
    """Overwrites the header of the page of a column's cells in a row group."""
    place = pq.ParquetFile(path).metadata.row_group(group).column(column).data_page_offset
    data = bytearray(path.read_bytes())
    data[place : place + 8] = b"\xff" * 8
    path.write_bytes(data)


@pytest.mark.parametrize("column", [0, 1])
def test_a_damaged_row_group(tmp_path, column):
    path = tmp_path / "t.parquet"
    cells = [picture(name) for name in PICTURES]
    spec = bagel(path, cells, row_group_size=2, use_dictionary=False)
    damage_page(path, 1, column)
    keys, problems = found(spec)
    assert keys == [f"t.parquet:{row}" for row in (1, 2, 5, 6)]
    assert [problem.split(": ")[:2] for problem in problems] == [
        [f"t.parquet:{row}", f"{path}, row group 1"] for row in (3, 4)
    ]
    pictures = [r[2] for r in records(spec)]
    assert pictures == ["p0", "p1", "p4", "p5"]


def test_files_that_are_missing_cut_or_something_else(tmp_path):
    for number in (1, 2, 3):
        bagel(tmp_path / f"{number}.parquet", [picture("p0")])
    cut = tmp_path / "2.parquet"
    cut.write_bytes(cut.read_bytes()[:-20])
    pq.write_table(pa.table({"url": ["x"]}), tmp_path / "3.parquet")
    spec = {"type": "bagel", "paths": f"{tmp_path}/{{0..3}}.parquet"}
    keys, problems = found(spec)
    assert keys == ["1.parquet:1"] and len(problems) == 3
    for problem, number, reason in zip(
        problems, (0, 2, 3), ("no such file", "no Parquet file", "expected columns"), strict=True
    ):
        assert f"{tmp_path}/{number}.parquet: " in problem and reason in problem
    bagel(tmp_path / "0.parquet", [picture("p1")])
    assert found(spec)[0] == ["0.parquet:1", "1.parquet:1"], "a file that comes is noticed"


def archive(folder, number, *names):
    with tarfile.open(folder / f"p_{number}.tar", "w") as tar:
        for name in names:
            tar.add(folder / f"{name}.png", f"{name}.png")


def test_archives_that_are_missing_compressed_or_damaged(pictures):
    rows = [{"input_prompt": "draw", "output_image": f"{name}.png"} for name in PICTURES]
    rows.append({"input_prompt": "draw", "output_image": ["p0.png"]})
    rows.append({"input_prompt": "draw", "output_image": "p0.png", "input_image": 5})
    file = write_json(pictures / "a.json", rows)
    archive(pictures, 1, "p0", "p1", "p2", "p3")
    data = bytearray((pictures / "p_1.tar").read_bytes())
    with tarfile.open(pictures / "p_1.tar") as tar:
        data[tar.getmember("p2.png").offset_data - 512 + 130] ^= 0x10
    (pictures / "p_1.tar").write_bytes(data)
    with tarfile.open(pictures / "p_2.tar", "w:gz") as tar:
        tar.add(pictures / "p4.png", "p4.png")
    spec = {"type": "io-json", "file": file, "archives": f"{pictures}/p_{{0..2}}.tar"}
    keys, problems = found(spec)
    assert keys == ["1", "2", "4"]
    rows, tars = problems[:5], problems[5:]
    assert [row.split(":")[0] for row in rows] == ["3", "5", "6", "7", "8"]
    assert all("is in none of the 3 archives" in row for row in rows[:4])
    assert "expected a picture's path or a list of them, found 5" in rows[4]
    assert tars[0] == f"{pictures}/p_0.tar: no such file"
    assert tars[1].startswith(f"{pictures}/p_1.tar before p3.png: ")
    assert "compressed" in tars[2] and len(tars) == 3
    archive(pictures, 0, "p5")
    assert found(spec)[0] == ["1", "2", "4", "6"]


def test_one_list_of_several_that_is_missing_or_no_json(pictures):
    row = {"image": ["p0.png"], "conversations": [{"from": "human", "value": "a star"}]}
    row["conversations"].append({"from": "gpt", "value": "<gen_image>"})
    write_json(pictures / "b.json", [row])
    (pictures / "c.json").write_text("[{]")
    (pictures / "data.txt").write_text("".join(f"./,{name}.json,true\n" for name in "abc"))
    keys, problems = found({"type": "uniworld", "file": str(pictures / "data.txt")})
    assert keys == [f"{pictures}/b.json:1"]
    assert re.search(r"a\.json: no such file", problems[0])
    assert re.search(r"c\.json: not JSON", problems[1]) and len(problems) == 2


def test_rows_that_no_program_wrote(pictures):
    rows = [
        {"input_prompt": "draw", "output_image": "p0.png"},
        {"input_prompt": "draw", "output_image": "p0.png", "input_image": {"a": 1}},
        {"input_prompt": "draw", "output_image": "\udcff.png"},
        {"input_prompt": "draw", "output_image": "a\0.png"},
        {"input_prompt": "draw", "output_image": "a" * 300},
    ]
    lines = [*map(json.dumps, rows), "[" * 100_000, json.dumps(rows[0])]
    (pictures / "a.jsonl").write_text("\n".join(lines))
    keys, problems = found({"type": "io-json", "file": str(pictures / "a.jsonl")})
    assert keys == ["1", "7"]
    assert [problem.split(":")[0] for problem in problems] == ["2", "3", "4", "5", "6"]


def test_records_beside_a_damaged_one_in_an_arrayrecord(tmp_path):
    path = tmp_path / "a.arrayrecord"
    out = array_record.writer(str(path))
    names = [f"p{number % 6}" for number in range(12)]
    for number, name in enumerate(names):
        out.write(array_record.pack(f"k{number}", f"text {number}", [picture(name)]))
    for data in (b"[]\n", b"{}\n", b'{"key": 3, "text": "", "sizes": []}\n', b"no header"):
        out.write(data)
    out.close()
    data = bytearray(path.read_bytes())
    at = data.index(b"text 5")
    data[at] ^= 0x10
    path.write_bytes(data)
    spec = {"type": "array-record", "paths": str(path)}
    assert [(r[0], r[2]) for r in records(spec)] == [
        (f"k{number}", name) for number, name in enumerate(names) if number != 5
    ]
    problems = found(spec)[1]
    assert [problem.split(": ")[0] for problem in problems] == [
        f"{path}, record {number}" for number in (5, 12, 13, 14, 15)
    ]


def test_a_disk_that_fails_is_named(pictures, monkeypatch):
    """In a tar, a list's picture and an annotation; the others are read."""
    annotations = pictures / "captions"
    rows = []
    for name in ("p0", "p1", "p2"):
        write_json(annotations / f"{name}.json", {"caption": name})
        rows.append({"image": f"{name}.png", "annotation": f"{name}.json"})
    spec = {"type": "sidecar", "file": write_json(pictures / "a.json", rows)}
    spec["images"] = str(pictures)
    pread = storage.os.pread

    def fails(file, *arguments):
        if storage.os.readlink(f"/proc/self/fd/{file}").endswith(("p0.json", "p1.png")):
            raise OSError(errno.EIO, "Input/output error")
        return pread(file, *arguments)

    monkeypatch.setattr(storage.os, "pread", fails)
    keys, problems = found(spec)
    assert keys == ["p2.png"]
    assert "Input/output error" in problems[0] and "p0.json" in problems[0]
    assert "Input/output error" in problems[1] and "p1.png" in problems[1]
