"""Broken tars, odd pictures, odd captions: each is read rightly or ends in the ledger, and no good record is lost."""

import io
import re
import struct
import subprocess
import tarfile
import zlib

import numpy as np
import pytest
import webdataset
from PIL import Image

from tests.data.conftest import PICTURES, picture, shown
from wemmu_jax.data.buckets import make_buckets
from wemmu_jax.data.indexing import Renewal
from wemmu_jax.data.ledger import Ledger
from wemmu_jax.data.pipeline import MicroBatches
from wemmu_jax.data.sources import build_feeds, build_source
from wemmu_jax.data.tasks import Task


def write_tar(path, samples, **options):
    with webdataset.TarWriter(str(path), **options) as tar:
        for key, (image, text) in samples.items():
            tar.write({"__key__": key, "png": image, "txt": text, "json": {"url": key}})


def tar_of_all(path):
    write_tar(path, {name: (picture(name), f"a {name}") for name in PICTURES})
    with tarfile.open(path) as tar:
        return {member.name: member for member in tar}


def flip_header(data, member):
    data[member.offset_data - 512 + 130] ^= 0x10


def zero_header(data, member):
    data[member.offset_data - 512 : member.offset_data] = bytes(512)


def flip_date(data, member):
    """In the header before the header, which holds only the date."""
    assert member.offset == member.offset_data - 3 * 512
    data[member.offset + 130] ^= 0x10


def zero_block(data, member):
    start = member.offset_data
    data[start : start + 512] = bytes(512)


def cut_inside(data, member):
    del data[member.offset_data + 2 :]


def cut_before(data, member):
    del data[member.offset :]


def cut_in_the_header(data, member):
    del data[member.offset_data - 100 :]


@pytest.mark.parametrize(
    ("damage", "member", "lost", "reason"),
    [
        # A sample's members lie in the order json, png, txt.
        (flip_header, "p0.png", {"p0"}, "p0 no picture .* header is damaged"),
        (flip_header, "p2.png", {"p2"}, "p2 no picture .* header is damaged"),
        (flip_header, "p2.txt", {"p2"}, r"p2 no \.txt"),
        (flip_header, "p5.txt", {"p5"}, r"p5 no \.txt"),
        (flip_header, "p2.json", set(), "before p2 .* header is damaged"),
        (flip_date, "p2.png", set(), "before p2 .* header is damaged"),
        (zero_header, "p3.png", {"p3"}, "p3 no picture .* header is damaged"),
        (zero_header, "p0.json", set(), "before p0 .* header is damaged"),
        (zero_block, "p3.png", {"p3"}, "not a picture of a known format"),
        (zero_block, "p3.txt", {"p3"}, "p3 the text has NUL characters"),
        (cut_inside, "p4.png", {"p4", "p5"}, r"the tar is cut: p4\.png should end at"),
        (cut_inside, "p4.txt", {"p4", "p5"}, r"the tar is cut: p4\.txt should end at"),
        (cut_in_the_header, "p5.json", {"p5"}, "before its end .* header is damaged"),
        (cut_before, "p4.txt", {"p4", "p5"}, r"p4 no \.txt"),
        (cut_before, "p4.json", {"p4", "p5"}, None),
    ],
)
def test_a_damaged_tar(tmp_path, damage, member, lost, reason):
    path = tmp_path / "0.tar"
    members = tar_of_all(path)
    data = bytearray(path.read_bytes())
    damage(data, members[member])
    path.write_bytes(data)
    source = build_source({"type": "webdataset", "paths": str(path)})
    found = [source[number] for number in range(len(source))]
    kept = [name for name in PICTURES if name not in lost]
    assert [(r.key, r.text, shown(r.target)) for r in found] == [
        (f"0/{name}", f"a {name}", name) for name in kept
    ]
    if reason is None:
        assert source.problems() == [], "an archive may end anywhere between two files"
    else:
        [problem] = source.problems()
        assert re.search(reason, f"{problem.key} {problem.reason}")


def test_what_is_no_damage(tmp_path):
    """Archives joined by `cat`, padded by more zeros than usual, or holding folders and links."""
    tar_of_all(tmp_path / "a.tar")
    write_tar(tmp_path / "more.tar", {f"more-{name}": (picture(name), name) for name in PICTURES})
    first, more = ((tmp_path / f"{name}.tar").read_bytes() for name in ("a", "more"))
    (tmp_path / "b.tar").write_bytes(first + bytes(10 * 512) + more + bytes(512 * 64))
    source = build_source({"type": "webdataset", "paths": str(tmp_path / "b.tar")})
    assert len(source) == 2 * len(PICTURES) and source.problems() == []
    tar_with_others(tmp_path / "c.tar")
    source = build_source({"type": "webdataset", "paths": str(tmp_path / "c.tar")})
    assert [source.index.key(number) for number in range(len(source))] == ["c/p0", "c/p1", "c/p2"]
    assert source.problems() == []


def tar_with_others(path):
    """Three samples, with a folder, a symbolic and a hard link before each."""
    with tarfile.open(path, "w") as tar:
        for name in ("p0", "p1", "p2"):
            for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
                other = tarfile.TarInfo(f"{name}-{kind.decode()}")
                other.type, other.linkname = kind, "p0.png"
                tar.addfile(other)
            for extension, data in (("png", picture(name)), ("txt", name.encode())):
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    with tarfile.open(path) as tar:
        return {member.name: member for member in tar}


@pytest.mark.parametrize("damage", [flip_header, zero_header])
@pytest.mark.parametrize(("name", "next_one"), [("p1", "p2"), ("p2", "its end")])
def test_a_sample_of_which_nothing_is_left_before_a_folder(tmp_path, damage, name, next_one):
    path = tmp_path / "c.tar"
    members = tar_with_others(path)
    with tarfile.open(path, "a") as tar:
        folder = tarfile.TarInfo("last")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    data = bytearray(path.read_bytes())
    for extension in ("png", "txt"):
        damage(data, members[f"{name}.{extension}"])
    path.write_bytes(data)
    source = build_source({"type": "webdataset", "paths": str(path)})
    assert len(source) == 2
    [problem] = source.problems()
    assert problem.key == f"{path} before {next_one}" and "header is damaged" in problem.reason


def test_missing_empty_and_compressed_shards(tmp_path):
    tar_of_all(tmp_path / "00001.tar")
    (tmp_path / "00002.tar").write_bytes(b"")
    spec = {"type": "webdataset", "paths": str(tmp_path / "{00000..00002}.tar")}
    source = build_source(spec)
    assert len(source) == 6
    assert [(p.key, p.reason) for p in source.problems()] == [
        (str(tmp_path / "00000.tar"), "no such file"),
        (f"{tmp_path}/00002.tar before its end", "an empty file, not even an empty tar"),
    ]
    with tarfile.open(tmp_path / "00000.tar", "w:gz") as tar:
        tar.add(tmp_path / "00001.tar", "x.png")
    assert "compressed" in build_source(spec).problems()[0].reason
    (tmp_path / "00000.tar").unlink()
    entry = {"name": "a", "tasks": ["T2I"], **spec}
    with pytest.raises(ValueError, match=r"'a': 12 of 18 records cannot be read"):
        build_feeds([entry], bad_share=0.01)


def write_members(path, *members):
    """A tar of (name, content)."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def read_tar(path):
    """(key, text, picture) of the samples, and (key, reason) of the problems without the tar's own name."""
    source = build_source({"type": "webdataset", "paths": str(path)})
    found = [source[number] for number in range(len(source))]
    problems = [
        tuple(text.replace(f"{path}: ", "") for text in (p.key, p.reason))
        for p in source.problems()
    ]
    return [(r.key, r.text, shown(r.target)) for r in found], problems


def test_a_name_that_comes_twice_is_reported_and_the_first_counts(tmp_path):
    path = tmp_path / "0.tar"
    one, two = ((f"a.{kind}", data) for kind, data in (("png", picture("p1")), ("txt", b"1")))
    again = (("a.png", picture("p2")), ("a.txt", b"2"))
    other = (("b.png", picture("p3")), ("b.txt", b"3"))
    kept = [("0/a", "1", "p1"), ("0/b", "3", "p3")]
    write_members(path, one, two, *again, *other)
    assert read_tar(path) == (kept, [("0/a", "a.png, a.txt: there twice, and the first counts")])
    write_members(path, one, ("a.PNG", picture("p2")), two, *other)
    assert read_tar(path) == (kept, [("0/a", "a.PNG: there twice, and the first counts")])
    write_members(path, one, two, *other, *again)
    came_before = "the name came before, and the first counts"
    assert read_tar(path) == (kept, [("0/a", f"a.png, a.txt: {came_before}")])
    write_members(path, one, *other, two)
    found, [lacks, late] = read_tar(path)
    assert found == kept[1:] and lacks[0] == "0/a" and "no .txt beside png" in lacks[1]
    assert late == ("0/a", f"a.txt: {came_before}")


def test_a_member_with_nothing_before_its_dot(tmp_path):
    path = tmp_path / "0.tar"
    whole = [(name, picture("p1") if name.endswith("png") else b"1") for name in ("a.png", "a.txt")]
    nameless = [(name, whole[name.endswith("txt")][1]) for name in (".png", "sub/.txt")]
    write_members(path, *nameless, *whole)
    reason = "nothing before the dot: of no sample"
    kept = [("0/a", "1", "p1")]
    assert read_tar(path) == (kept, [(name, reason) for name in (".png", "sub/.txt")])
    # What macOS puts beside every file neither parts a sample nor is one.
    others = [(name, b"x") for name in ("._a.png", "._a.txt", ".DS_Store")]
    write_members(path, others[0], whole[0], *others[1:], whole[1])
    assert read_tar(path) == (kept, [])


@pytest.mark.parametrize("form", ["gnu", "posix"])
@pytest.mark.parametrize(("sparse", "kept"), [("p1.png", "p0 p2"), ("p1.json", "p0 p1 p2")])
def test_a_sparse_member_costs_only_itself(tmp_path, form, sparse, kept):
    files = []
    for name in ("p0", "p1", "p2"):
        for kind, data in (("json", b"{}"), ("png", picture(name)), ("txt", name.encode())):
            files.append(f"{name}.{kind}")
            (tmp_path / files[-1]).write_bytes(data)
    with (tmp_path / sparse).open("r+b") as file:
        file.truncate(10**7)  # far past the tar's end
    command = ["tar", f"--format={form}", "-cSf", "0.tar", *files]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert (tmp_path / "0.tar").stat().st_size < 10**5
    found, [problem] = read_tar(tmp_path / "0.tar")
    assert found == [(f"0/{name}", name, name) for name in kept.split()]
    assert "p1" in problem[0] and f"{sparse} is a sparse member (tar -S)" in problem[1]


def test_how_many_records_are_thought_to_be_lost(tmp_path):
    """As many as the other shards have in the mean, good and bad ones, less those that were found."""
    for number in (1, 2, 4):
        members = tar_of_all(tmp_path / f"{number}.tar")
    for shard, damage, member in (("2", flip_header, "p2.png"), ("4", cut_inside, "p1.txt")):
        data = bytearray((tmp_path / f"{shard}.tar").read_bytes())
        damage(data, members[member])
        (tmp_path / f"{shard}.tar").write_bytes(data)
    (tmp_path / "3.tar").write_bytes(b"not a tar at all" * 99)
    spec = {"type": "webdataset", "paths": str(tmp_path / "{0..4}.tar")}
    source = build_source(spec)
    assert len(source) == 6 + 5 + 1 and source.index.problem_count == 4
    assert [(p.key, p.records) for p in source.problems()] == [
        (f"{tmp_path}/0.tar", 6),
        ("2/p2", 1),
        (f"{tmp_path}/3.tar before its end", 6),
        ("4/p1", 5),
    ]
    entry = {"name": "a", "tasks": ["T2I"], **spec}
    with pytest.raises(ValueError, match=r"'a': 18 of 30 records cannot be read"):
        build_feeds([entry], bad_share=0.5)
    ledger = Ledger(tmp_path / "ledger.jsonl", share=0.5)
    assert ledger.note_indexed(build_feeds([entry], bad_share=0.6)) == 18
    held_out = build_feeds([{**entry, "paths": str(tmp_path / "4.tar")}], bad_share=1.0)
    assert held_out[0].name == "a"
    both = Ledger(tmp_path / "both.jsonl", share=0.5)
    assert both.note_indexed([*build_feeds([entry], bad_share=0.6), *held_out]) == 18 + 1
    renewed = build_source(spec, renewal=Renewal.CHANGED)
    assert renewed.problems() == source.problems()
    alone = build_source({**spec, "paths": str(tmp_path / "4.tar")})
    assert alone.index.left_out == 1, "nobody knows"


def png(image, **options):
    out = io.BytesIO()
    image.save(out, options.pop("format", "PNG"), **options)
    return out.getvalue()


def bomb():
    """A PNG header of 60,000 x 60,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    small = png(Image.new("RGB", (1, 1)))
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


def odd_pictures():
    """Name -> (file, size it has, colour that it shows or None: it must not be read)."""
    grey = np.full((20, 30), 40 * 257, np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    whole, photo = (png(Image.fromarray(noise), format=format) for format in ("PNG", "JPEG"))
    alpha = Image.new("RGBA", (30, 20), (0, 0, 255, 0))
    palette = Image.new("P", (30, 20), 1)
    palette.putpalette([0, 0, 0, 200, 10, 10])
    return {
        "cmyk": (png(Image.new("CMYK", (30, 20)), format="JPEG"), (20, 30), (255, 255, 255)),
        "sixteen": (png(Image.fromarray(grey)), (20, 30), (40, 40, 40)),
        "palette": (png(palette), (20, 30), (200, 10, 10)),
        "alpha": (png(alpha), (20, 30), (255, 255, 255)),
        "turned": (png(Image.new("RGB", (30, 20)), format="JPEG", exif=exif), (30, 20), (0, 0, 0)),
        "dot": (png(Image.new("RGB", (1, 1), (9, 8, 7))), (1, 1), (9, 8, 7)),
        "thread": (png(Image.new("RGB", (3000, 10), (9, 8, 7))), (10, 3000), (9, 8, 7)),
        "cut": (photo[: len(photo) // 2], (64, 64), None),
        "half": (whole[: len(whole) // 2], None, None),
        "empty": (b"", None, None),
        "text": (b"<html>not found</html>", None, None),
        "bomb": (bomb(), None, None),
    }


def encode(example, bucket, length):
    return {"target": example.target.load(bucket.height, bucket.width), "cut": np.int32(0)}


def length(example):
    return len(example.text) // 4


def test_odd_pictures_and_captions_from_tar_to_ledger(tmp_path):
    odd = odd_pictures()
    texts = {
        "long": "word " * 20_000,
        "special": "<|im_end|><|vision_start|> {caption}",
        "nothing": "",
        "space": " \n ",
    }
    samples = {name: (image, name) for name, (image, _, _) in odd.items()}
    samples |= {name: (picture("p0"), text) for name, text in texts.items()}
    write_tar(tmp_path / "0.tar", samples)
    with tarfile.open(tmp_path / "0.tar", "a") as tar:
        for name, data in (("latin.png", picture("p0")), ("latin.txt", b"caf\xe9")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    entry = {"name": "odd", "tasks": ["T2I"], "type": "webdataset"}
    feeds = build_feeds([{**entry, "paths": str(tmp_path / "0.tar")}])
    source = feeds[0].source
    found = {source[number].key: source[number] for number in range(len(source))}
    problems = {problem.key: problem.reason for problem in source.problems()}
    assert len(found) + len(problems) == len(samples) + 1 and not found.keys() & problems.keys()
    for name, (_, size, colour) in odd.items():
        if size is None:
            assert f"0/{name}" in problems
            continue
        target = found[f"0/{name}"].target
        assert (target.height, target.width) == size
        if colour is not None:
            assert np.abs(target.load(16, 32).astype(int) - colour).max() <= 2, name
    assert "limit" in problems["0/bomb"] and "empty" in problems["0/empty"]
    assert "empty" in problems["0/nothing"] and "empty" in problems["0/space"]
    assert "UTF-8" in problems["0/latin"]
    assert found["0/special"].text == texts["special"]
    assert found["0/long"].text == texts["long"].strip()

    made = MicroBatches(
        feeds=feeds,
        mixture={Task.T2I: 1},
        buckets=make_buckets(64, multiple=32, count=1),
        rows=5,
        seed=0,
        encode_row=encode,
        text_length=length,
    )
    ledger = Ledger(tmp_path / "ledger.jsonl", share=0.5)
    ledger.note_indexed(feeds)
    drawn = set()
    for number in range(4):
        ledger.note(made[number])
        drawn |= {key.removeprefix("odd/") for key in made[number].keys}
    assert drawn == found.keys() - {"0/cut"}
    written = (tmp_path / "ledger.jsonl").read_text().splitlines()
    assert len(written) == len(problems) + 1 and '"0/cut"' in written[-1]
