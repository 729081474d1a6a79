"""Every format, written by its own tools and read back exactly."""

import json
import pathlib
import subprocess

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from tests.data.conftest import PICTURES, picture, records, write_json
from wemmu_jax.data.formats import array_record
from wemmu_jax.data.sources import build_source

IMG2DATASET = pathlib.Path(__file__).parent / "fixtures/img2dataset"


def test_img2dataset_tars():
    spec = {"type": "webdataset", "paths": f"{IMG2DATASET}/{{00000..00001}}.tar"}
    source = build_source(spec)
    found = [source[number] for number in range(len(source))]
    assert [(r.key, r.text, r.target.height, r.target.width) for r in found] == [
        ("00000/000000", "a picture of a", 32, 48),
        ("00000/000001", "a picture of b", 48, 32),
        ("00000/000002", "a picture of c", 40, 40),
        ("00001/000010", "a picture of d", 20, 64),
    ]
    for number, record in enumerate(found):
        pixels = record.target.load(record.target.height, record.target.width).astype(int)
        assert np.abs(pixels - (60 * number, 10, 200)).max() <= 3, "JPEG"
    by_field = build_source({**spec, "text": "json:caption"})
    assert [by_field[n].text for n in range(4)] == [r.text for r in found]
    assert source.problems() == [], "what could not be downloaded is not in the tars"


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_webdatasets_own_writer(tmp_path, extension):
    format = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension]
    for shard, names in enumerate([("p0", "p1"), ("p2", "p3", "p4")]):
        with webdataset.TarWriter(str(tmp_path / f"cc12m-{shard:04}.tar")) as tar:
            for name in names:
                sample = {"__key__": name, extension: picture(name, format), "txt": f"über {name}"}
                tar.write({**sample, "json": {"re": {"x": 1}, "long": f"long {name}"}})
    spec = {"type": "webdataset", "paths": str(tmp_path / "cc12m-*.tar")}
    expected = [("0000", "p0"), ("0000", "p1"), ("0001", "p2"), ("0001", "p3"), ("0001", "p4")]
    assert records(spec) == [(f"cc12m-{s}/{n}", f"über {n}", n, ()) for s, n in expected]
    assert [r[1] for r in records({**spec, "text": "json:long"})][:2] == ["long p0", "long p1"]
    assert records({**spec, "text": ""})[0][1] == ""


def test_gnu_tar_with_long_names_and_folders(pictures):
    stem = "journeyDB/" + "long" * 40 + "/p3"
    (pictures / stem).parent.mkdir(parents=True)
    (pictures / f"{stem}.png").write_bytes(picture("p3"))
    (pictures / f"{stem}.txt").write_text("three")
    command = ["tar", "-cf", "blip3o.tar", "journeyDB"]
    subprocess.run(command, cwd=pictures, check=True)
    [found] = records({"type": "webdataset", "paths": [str(pictures / "blip3o.tar")]})
    assert found == (f"blip3o/{stem}", "three", "p3", ())


def test_recaption_sidecars(pictures):
    images, captions = pictures / "images", pictures / "captions"
    (images / "00").mkdir(parents=True)
    rows = []
    for name in ("p1", "p4"):
        (images / f"00/{name}.png").write_bytes(picture(name))
        write_json(captions / f"00/{name}.json", {"caption": f"again {name}", "re_caption": name})
        rows.append({"image": f"00/{name}.png", "annotation": f"00/{name}.json"})
    spec = {"type": "sidecar", "file": write_json(pictures / "data.json", rows)}
    assert records(spec) == [(f"00/{n}.png", f"again {n}", n, ()) for n in ("p1", "p4")]
    assert [r[1] for r in records({**spec, "field": "re_caption"})] == ["p1", "p4"]
    with pytest.raises(ValueError, match=r"no 'cap'; found \{caption, re_caption\}"):
        build_source({**spec, "field": "cap"})


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_io_json(pictures, lines, packed):
    rows = [
        {"input_prompt": "draw", "output_image": "p0.png", "output_image_resolution": [40, 24]},
        {"input_prompt": "edit", "output_image": "p1.png", "input_image": ["p0.png"]},
        {"input_prompt": "join", "output_image": "p2.png", "input_image": ["p4.png", "p3.png"]},
    ]
    spec = {"type": "io-json", "file": write_json(pictures / "edit.json", rows, lines=lines)}
    if packed:
        for part, names in enumerate(["p0.png p1.png", "p2.png p3.png p4.png"]):
            command = ["tar", "-cf", f"part_{part}.tar", "--remove-files", *names.split()]
            subprocess.run(command, cwd=pictures, check=True)
        spec["archives"] = str(pictures / "part_*.tar")
    assert records(spec) == [
        ("1", "draw", "p0", ()),
        ("2", "edit", "p1", ("p0",)),
        ("3", "join", "p2", ("p4", "p3")),
    ]


def turns(*values):
    speakers = ("human", "gpt") * len(values)
    return [{"from": who, "value": value} for who, value in zip(speakers, values, strict=False)]


def test_uniworld(pictures):
    single = [
        {"image": "p0.png", "conversations": turns("a red\nbarn", "<gen_image>")},
        {
            "image": ["p1.png", "p2.png"],
            "conversations": turns("make it blue<image>", "<gen_image>"),
        },
        {
            "image": ["p1.png", "p2.png", "p3.png"],
            "conversations": turns(
                "<image>\nmake it blue", "<image>", "<image>\nput {x} on it", "<gen_image>"
            ),
        },
    ]
    single[2]["image"].insert(2, "p4.png")
    several = [
        {
            "image": ["p5.png", "p4.png", "p0.png"],
            "conversations": turns("<image>\n<image>\nreplace the dog", "<gen_image>"),
        },
        {"image": ["p0.png", "p1.png"], "conversations": turns("<image>make it", "a barn")},
        {"image": ["p1.png"], "conversations": turns("<image>make it", "<gen_image>")},
        {
            "image": ["p1.png", "p2.png"],
            "conversations": turns("make it<image>", "<gen_image>", "and now?", "done"),
        },
    ]
    write_json(pictures / "a/one.json", single)
    write_json(pictures / "a/two.json", several)
    (pictures / "data.txt").write_text(
        f"{pictures},a/one.json,false\n\n{pictures},a/two.json,true\n"
    )
    spec = {"type": "uniworld", "file": str(pictures / "data.txt")}
    one, two = str(pictures / "a/one.json"), str(pictures / "a/two.json")
    assert records(spec) == [
        (f"{one}:1", "a red barn", "p0", ()),
        (f"{one}:2", "make it blue", "p2", ("p1",)),
        (f"{one}:3", "put {x} on it", "p3", ("p1", "p2", "p4")),
        (f"{two}:1", "replace the dog", "p0", ("p5", "p4")),
    ]
    assert [(p.key, p.reason.split(": ", 1)[1]) for p in build_source(spec).problems()] == [
        (f"{two}:2", "expected a placeholder for each of the 2 images; found 1 <image>"),
        (
            f"{two}:3",
            "expected a placeholder for each of the 1 images; found 1 <image> and 1 <gen_image>",
        ),
        (f"{two}:4", "expected one <gen_image>, in the last turn; found 1"),
    ]
    for data, message in [
        (b"a,b\n", "line 1: expected image_root,annotation"),
        (b"\n,a/one.json,true\n", "line 2: expected image_root,.*; found ',a/one.json,true'"),
        (b"\n\ncaf\xe9,a/one.json,true\n", "line 3: not UTF-8"),
        (b".,../one.json,true\n", r"line 1: '\.\./one\.json' leads out"),
    ]:
        (pictures / "data.txt").write_bytes(data)
        with pytest.raises(ValueError, match=rf"data\.txt, {message}"):
            build_source(spec)


def test_omnigen2(pictures):
    t2i = [{"task_type": "t2i", "instruction": "draw", "output_image": "p0.png"}]
    edit = [
        {
            "task_type": "edit",
            "instruction": f"edit {n}",
            "input_images": ["p1.png"],
            "output_image": "p2.png",
        }
        for n in range(50)
    ]
    write_json(pictures / "t2i.jsonl", t2i, lines=True)
    write_json(pictures / "sub/edit.jsonl", edit, lines=True)
    (pictures / "sub/edit.yml").write_text(
        "data:\n  - {path: edit.jsonl, type: edit, ratio: 0.5}\n"
    )
    (pictures / "mix.yml").write_text(
        "data:\n  - {path: t2i.jsonl, type: t2i}\n  - {path: sub/edit.yml, type: edit}\n"
    )
    for name in ("p1", "p2"):
        (pictures / f"sub/{name}.png").write_bytes(picture(name))
    found = records({"type": "omnigen2", "file": str(pictures / "mix.yml")})
    assert found[0][1:] == ("draw", "p0", ())
    assert {r[2:] for r in found[1:]} == {("p2", ("p1",))}
    assert 10 <= len(found) - 1 <= 40, "half of fifty"
    assert found == records({"type": "omnigen2", "file": str(pictures / "mix.yml")})
    whole = {"type": "omnigen2", "file": str(pictures / "sub/edit.jsonl")}
    assert [r[1] for r in records(whole)] == [f"edit {n}" for n in range(50)]


def omnigen2(folder, *entries):
    """A YAML file that names others; its data set."""
    (folder / "mix.yml").write_text(json.dumps({"data": entries}))
    return {"type": "omnigen2", "file": str(folder / "mix.yml")}


def test_omnigen2_files_that_name_each_other_or_are_missing(pictures):
    row = {"instruction": "draw", "output_image": "p0.png"}
    write_json(pictures / "a.jsonl", [row] * 50, lines=True)
    with pytest.raises(ValueError, match=r"mix\.yml: names itself: .*mix\.yml -> .*mix\.yml"):
        build_source(omnigen2(pictures, {"path": "mix.yml"}))
    write_json(pictures / "b.yml", {"data": [{"path": "mix.yml"}]})
    with pytest.raises(ValueError, match=r"mix\.yml -> .*b\.yml -> .*mix\.yml"):
        build_source(omnigen2(pictures, {"path": "a.jsonl"}, {"path": "./b.yml"}))
    with pytest.raises(FileNotFoundError, match=r"gone\.yml: no such file"):
        build_source(omnigen2(pictures, {"path": "gone.yml"}))
    source = build_source(omnigen2(pictures, {"path": "a.jsonl"}, {"path": "gone.yml"}))
    gone = f"{pictures}/gone.yml"
    assert [(p.key, p.reason) for p in source.problems()] == [(gone, f"{gone}: no such file")]
    assert len(source) == 50
    spec = omnigen2(pictures, {"path": "a.jsonl"}, {"path": "a.yml", "ratio": 0.5})
    (pictures / "other.jsonl").write_bytes((pictures / "a.jsonl").read_bytes())
    write_json(pictures / "a.yml", {"data": [{"path": "other.jsonl"}]})
    assert 60 < (half := len(build_source(spec))) < 90
    write_json(pictures / "a.yml", {"data": [{"path": "other.jsonl", "ratio": 0.2}]})
    assert 50 < len(build_source(spec)) < half, "all files of the tree name the index"
    with pytest.raises(
        ValueError, match=r"a\.jsonl: .*at most 1; found 2\. .*of its own.*`weight`"
    ):
        build_source(omnigen2(pictures, {"path": "a.jsonl", "ratio": 2}))
    with pytest.raises(ValueError, match=r"mix\.yml: '\.\./a\.jsonl' leads out"):
        build_source(omnigen2(pictures, {"path": "../a.jsonl"}))


@pytest.mark.parametrize("kind", ["omnigen2", "imgedit", "io-json"])
def test_absolute_paths_and_urls_in_lists(pictures, kind):
    """Read as they are written; `..` leads out of no root."""
    (pictures / "lists").mkdir()
    far = [str(pictures / "p1.png"), f"file://{pictures}/p2.png"]
    keys = {"io-json": ("input_prompt", "input_image", "output_image")}
    text, before, after = keys.get(kind, ("instruction", "input_images", "output_image"))
    rows = [{text: "edit", before: far, after: str(pictures / "p0.png")}]
    rows.append({text: "edit", before: ["../p1.png"], after: far[0]})
    spec = {"type": kind, "file": write_json(pictures / "lists/a.jsonl", rows, lines=True)}
    if kind == "imgedit":
        rows = [{"prompt": "edit", before: r[before], "output_images": [r[after]]} for r in rows]
        pq.write_table(pa.Table.from_pylist(rows), pictures / "lists/a.parquet")
        spec = {"type": kind, "paths": str(pictures / "lists/a.parquet")}
    [found] = records({**spec, "root": str(pictures / "lists")})
    assert found[1:] == ("edit", "p0", ("p1", "p2"))
    [problem] = build_source({**spec, "root": str(pictures / "lists")}).problems()
    assert "'../p1.png' leads out of its folder" in problem.reason


def test_bagel(tmp_path):
    t2i = {
        "image": [picture("p0"), picture("p1"), picture("p2")],
        "captions": [json.dumps({"a": "one", "b": "two"}), '{"a": "x"}', "{}"],
    }
    pq.write_table(pa.table(t2i), tmp_path / "t2i.parquet", row_group_size=2)
    edits = {
        "image_list": [[picture("p3"), picture("p4"), picture("p5")], [picture("p1")]],
        "instruction_list": [[["first"], ["second", "then"]], [["odd"]]],
    }
    pq.write_table(pa.table(edits), tmp_path / "edit.parquet")
    spec = {"type": "bagel", "paths": str(tmp_path / "t2i.parquet")}
    found = records(spec)
    assert [(r[0], r[2]) for r in found] == [("t2i.parquet:1", "p0"), ("t2i.parquet:2", "p1")]
    assert found[0][1] in ("one", "two") and found[1][1] == "x"
    assert [p.key for p in build_source(spec).problems()] == ["t2i.parquet:3"]
    assert [r[1] for r in records({**spec, "caption": "a"})] == ["one", "x"]
    edit = records({"type": "bagel", "paths": str(tmp_path / "edit.parquet")})
    assert [(r[0], r[2], r[3]) for r in edit] == [
        ("edit.parquet:1:1", "p4", ("p3",)),
        ("edit.parquet:1:2", "p5", ("p4",)),
    ]
    assert edit[0][1] == "first" and edit[1][1] in ("second", "then")


def test_imgedit(pictures):
    rows = [
        {"input_images": ["p0.png"], "output_images": ["p1.png"], "prompt": "add a cat"},
        {"input_images": ["p2.png"], "output_images": [], "prompt": "add a cat"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), pictures / "single.parquet")
    spec = {"type": "imgedit", "paths": str(pictures / "single.parquet")}
    assert records(spec) == [("single.parquet:1", "add a cat", "p1", ("p0",))]
    pq.write_table(pa.Table.from_pylist([{"data": [rows[0], rows[0]]}]), pictures / "m.parquet")
    several = records({"type": "imgedit", "paths": str(pictures / "m.parquet")})
    assert [r[0] for r in several] == ["m.parquet:1:1", "m.parquet:1:2"]


def test_array_record(tmp_path):
    path = str(tmp_path / "packed-00000.arrayrecord")
    out = array_record.writer(path)
    for number, name in enumerate(PICTURES):
        out.write(
            array_record.pack(f"k/{name}", f"text {name}", [picture(name)] * (number % 3 + 1))
        )
    out.close()
    assert ArrayRecordReader(path).num_records() == len(PICTURES)
    assert records({"type": "array-record", "paths": path}) == [
        (f"k/{n}", f"text {n}", n, (n,) * (i % 3)) for i, n in enumerate(PICTURES)
    ]


def test_a_picture_in_a_record_twice_is_decoded_once(pictures):
    write_json(
        pictures / "captions.jsonl",
        [{"image": "p0.png", "instruction": "again", "sources": ["p0.png"]}],
        lines=True,
    )
    record = build_source({"type": "folder", "folder": str(pictures)})[0]
    assert record.sources[0] is record.target


def test_sidecars_take_the_texts_place(pictures):
    rows = [{"image": f"p{n}.png", "caption": f"old {n}"} for n in range(3)]
    write_json(pictures / "captions.jsonl", rows, lines=True)
    spec = {"type": "folder", "folder": str(pictures)}
    keys = [r[0] for r in records(spec)]
    new = [{"key": key, "caption": f"new {key}"} for key in reversed(keys[:2])]
    sidecar = write_json(pictures / "new.jsonl", new, lines=True)
    recaptioned = {**spec, "captions": sidecar}
    assert [r[1] for r in records(recaptioned)] == [f"new {key}" for key in keys[:2]]
    [problem] = build_source(recaptioned).problems()
    assert problem.key == keys[2] and "no caption" in problem.reason
    write_json(pictures / "new.jsonl", [new[0], new[0]], lines=True)
    with pytest.raises(ValueError, match="two captions for"):
        build_source(recaptioned)


def test_exif_rotation_is_in_the_index(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 40)).save(tmp_path / "turned.jpg", exif=exif)
    rows = [{"image": "turned.jpg", "caption": "schräg 斜め"}]
    write_json(tmp_path / "captions.jsonl", rows, lines=True)
    source = build_source({"type": "folder", "folder": str(tmp_path)})
    assert source.sizes().tolist() == [[80, 40]] and source[0].text == "schräg 斜め"
