"""Turns of questions and answers: read from the files that people have, indexed, packed, checked, used by one task."""

import json
import pickle

import numpy as np
import pytest

from tests.data.conftest import picture, shown, write_json
from wemmu_jax.data.buckets import make_buckets
from wemmu_jax.data.checking import check
from wemmu_jax.data.packing import pack
from wemmu_jax.data.pools import gather_pools
from wemmu_jax.data.records import Record, Turn
from wemmu_jax.data.sources import build_feeds, build_source
from wemmu_jax.data.tasks import Task, make_example

BUCKETS = make_buckets(64, multiple=32)


def said(*values):
    speakers = ("human", "gpt") * len(values)
    return [{"from": who, "value": value} for who, value in zip(speakers, values, strict=False)]


LLAVA = [
    # As LLaVA and BAGEL's example have it: the placeholder first, or last, of one picture.
    {"id": "a", "image": "p0.png", "conversations": said("<image>\nWhat is it?", "A barn. ")},
    {"image": ["p1.png"], "conversations": said("Which?\nA. x\nB. y\n<image>", "A")},
    # Another picture later on, and one that asks by itself.
    {
        "image": ["p2.png", "p3.png", "p4.png"],
        "conversations": said("<image>One?", "ja", "<image> <image>", "Drei 三", "And?", "No"),
    },
    # LLaMA-Factory's name for them, and words alone.
    {"images": ["p5.png"], "conversations": said("<image>", "a sky")},
    {"conversations": said("Two and two?", "Four")},
]
TURNS = [
    (Turn("What is it?", "A barn.", 1),),
    (Turn("Which?\nA. x\nB. y", "A", 1),),
    (Turn("One?", "ja", 1), Turn("", "Drei 三", 2), Turn("And?", "No")),
    (Turn("", "a sky", 1),),
    (Turn("Two and two?", "Four"),),
]
SHOWN = [["p0"], ["p1"], ["p2", "p3", "p4"], ["p5"], []]


def talks(source):
    """(turns, pictures) of every record."""
    found = [source[number] for number in range(len(source))]
    assert all(record.target is None and record.text == "" for record in found)
    return [record.turns for record in found], [[*map(shown, r.sources)] for r in found]


@pytest.mark.parametrize("lines", [False, True])
def test_conversations(pictures, lines):
    spec = {"type": "conversations", "file": write_json(pictures / "a.json", LLAVA, lines=lines)}
    source = build_source(spec)
    assert talks(source) == (TURNS, SHOWN) and source.problems() == []
    assert source.conversations().tolist() == [True] * 5
    assert source.source_counts().tolist() == [1, 1, 3, 1, 0]
    assert source.sizes().tolist() == [[24, 40], [32, 40], [40, 40], [64, 40], [1, 1]]
    assert [source[n].key for n in range(5)] == ["1", "2", "3", "4", "5"]
    assert talks(pickle.loads(pickle.dumps(source))) == (TURNS, SHOWN)


def test_bagels_pictures_lie_in_a_folder_of_their_own(pictures):
    rows = [{**LLAVA[0], "image": "p3.png"}]
    file = write_json(pictures / "vlm/llava_ov_si.jsonl", rows, lines=True)
    source = build_source({"type": "conversations", "file": file, "root": str(pictures)})
    assert talks(source) == ([TURNS[0]], [["p3"]])


def test_uniworld_rows_that_end_in_words(pictures):
    drawn = {"image": ["p1.png", "p2.png"], "conversations": said("<image>blue", "<gen_image>")}
    write_json(pictures / "one.json", [LLAVA[2], drawn, LLAVA[0]])
    (pictures / "data.txt").write_text(f"{pictures},one.json,true\n")
    source = build_source({"type": "uniworld", "file": str(pictures / "data.txt")})
    assert source.conversations().tolist() == [True, False, True]
    assert source.source_counts().tolist() == [3, 1, 1]
    assert (source[0].turns, source[2].turns) == (TURNS[2], TURNS[0])
    assert (source[1].text, shown(source[1].target), source[1].turns) == ("blue", "p2", ())


def test_turns_of_a_folder(pictures):
    rows = [
        {"image": "p0.png", "caption": "a barn"},
        {"images": ["p1.png", "p2.png"], "turns": [["Same?", "no"], ["Sure?", "yes"]]},
        {"images": [], "turns": [["Who?", "Me"]]},
    ]
    write_json(pictures / "captions.jsonl", rows, lines=True)
    source = build_source({"type": "folder", "folder": str(pictures)})
    assert source.conversations().tolist() == [False, True, True]
    assert source[1].turns == (Turn("Same?", "no", 2), Turn("Sure?", "yes"))
    assert [shown(p) for p in source[1].sources] == ["p1", "p2"] and source[0].text == "a barn"
    assert source[2].turns == (Turn("Who?", "Me"),) and source[2].sources == ()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": said("<image>What?", "x")}, "each of the 0 images; found 1 <image>"),
        ({"image": "p0.png", "conversations": said("What?", "x")}, "the 1 images; found 0"),
        ({"image": "p0.png", "conversations": said("What?", "<image>")}, "an answer in words"),
        ({"conversations": said("What?", "x", "And?")}, "one after the other; found human, gpt, h"),
        ({"conversations": said("What?", "x")[::-1]}, "one after the other; found gpt, human"),
        ({"conversations": said("What?", " \n")}, "the text is empty"),
        ({"conversations": said(" ", "x")}, "the text is empty"),
        ({"conversations": said("What?", "\ud800")}, "no Unicode"),
        ({"conversations": []}, "and 'conversations', a list"),
        ({"conversations": [{"from": "human"}, "x"]}, "'from' and a text 'value'"),
        ({"image": {"a": 1}, "conversations": said("What?", "x")}, "'image', a path or some"),
        (
            {"image": ["p0.png"] * 5, "conversations": said("<image>" * 5, "x")},
            "at most 4 source pictures, found 5",
        ),
        ({"image": "no.png", "conversations": said("<image>", "x")}, "no such file"),
        ({"images": "p0.png", "turns": [["a", "b"]]}, "'images' must be a list"),
        ({"images": [], "turns": []}, r"'turns' must be a list of [question, answer]"),
        ({"images": [], "turns": [["a", "b", "c"]]}, r"'turns' must be a list of [question"),
        ({"images": [], "turns": [["a", " "]]}, "the text is empty"),
        ({"images": [], "turns": [["a", 3]]}, "expected a text, found int"),
    ],
)
def test_what_is_no_conversation_is_named_and_those_beside_it_are_read(pictures, row, reason):
    rows = [{"images": ["p0.png"], "turns": [["a?", "b"]]}, row, LLAVA[4]]
    kind = "folder" if "turns" in row else "conversations"
    if kind == "conversations":
        rows[0] = LLAVA[0]
        spec = {"type": kind, "file": write_json(pictures / "a.json", rows)}
    else:
        rows[2] = {"images": [], "turns": [["c?", "d"]]}
        write_json(pictures / "captions.jsonl", rows, lines=True)
        spec = {"type": kind, "folder": str(pictures)}
    source = build_source(spec)
    assert [len(source[n].sources) for n in range(len(source))] == [1, 0]
    [problem] = source.problems()
    assert reason in problem.reason and problem.key.startswith("2")


@pytest.fixture
def mixed(pictures):
    """Conversations and pictures to be drawn, of nought to two source pictures each; the last one has no picture."""
    rows = [
        {"image": "p0.png", "caption": "a barn"},
        {"images": ["p1.png"], "turns": [["What?", "a sea"]]},
        {"image": "p2.png", "instruction": "blue", "sources": ["p3.png"]},
        {"images": ["p1.png", "p5.png"], "turns": [["Same?", "no"]]},
        {"image": "p4.png", "instruction": "both", "sources": ["p3.png", "p1.png"]},
        {"images": [], "turns": [["Who?", "<image>"], ["Me?", "x" * 2000]]},
    ]
    write_json(pictures / "captions.jsonl", rows, lines=True)
    return {"type": "folder", "folder": str(pictures)}


def test_each_task_takes_its_own(mixed):
    tasks = ["T2I", "Uncond", "Rec", "S-Edit", "M-Edit", "VQA"]
    feeds = build_feeds([{"name": "a", "tasks": tasks, **mixed}])
    pools = gather_pools(feeds, list(Task), BUCKETS, 1)
    found = {(p.task.value, p.arity): sorted(np.concatenate(p.members).tolist()) for p in pools}
    assert found == {
        ("T2I", 0): [0],
        ("Uncond", 0): [0, 2, 4],
        ("Rec", 1): [0, 2, 4],
        ("S-Edit", 1): [2],
        ("M-Edit", 2): [4],
        ("VQA", 0): [5],
        ("VQA", 1): [1],
        ("VQA", 2): [3],
    }


def test_an_example_is_a_pure_function_of_its_record(mixed):
    source = build_source(mixed)
    record = source[3]
    example = make_example(Task.VQA, record)
    assert (example.text, example.target, example.turns) == ("", None, record.turns)
    assert example.texts == ("Same?", "no") and make_example(Task.REC, source[0]).texts[0]
    # Whole, on white: covering a square would crop away a part of either.
    wide = example.sources[0].load(48, 96)
    assert wide.shape == (48, 96, 3) and (wide[:, 0] == 255).all() and (wide[:, 48] != 255).any()
    np.testing.assert_array_equal(wide, make_example(Task.VQA, source[3]).sources[0].load(48, 96))
    for task in (Task.T2I, Task.UNCOND, Task.REC, Task.S_EDIT, Task.M_EDIT):
        with pytest.raises(ValueError, match=f"'4:p1|.* is a conversation .* task {task.value}"):
            make_example(task, record)
    with pytest.raises(ValueError, match="has no turns and cannot serve task VQA"):
        make_example(Task.VQA, source[2])
    with pytest.raises(ValueError, match="'k': expected either a target or turns"):
        Record("k", "text", (), None)
    with pytest.raises(ValueError, match="'k': its turns show 1 pictures, found 2"):
        Record("k", "", record.sources, None, (Turn("a", "b", 1),))


def test_packed_and_checked(mixed, tmp_path):
    source = build_source(mixed)
    how = {"shard_size": 4, "processes": 0, "progress": lambda done, total: None}
    assert pack(source, tmp_path / "packed", name="a", **how) == []
    packed = build_source({"type": "array-record", "paths": f"{tmp_path}/packed/a-*"})
    assert len(packed) == 6
    for number in range(6):
        old, new = source[number], packed[number]
        assert (old.key, old.text, old.turns) == (new.key, new.text, new.turns)
        assert [*map(shown, old.sources)] == [*map(shown, new.sources)]
    for one in (source, packed):
        report = check(one, BUCKETS, processes=0, progress=how["progress"])
        assert (report.records, report.conversations, report.turns) == (6, 3, 4)
        assert (report.placeholders, report.long, report.same_pictures) == (1, 1, 0)
        assert report.sources == {0: 2, 1: 2, 2: 2} and report.pictures == 9
        assert report.heights == (24, 32, 56), "1 x 1 stands for no picture"
        assert "conversations                 3   turns: 4" in report.lines()


def test_a_set_of_words_alone_is_checked(pictures):
    rows = [{"images": [], "turns": [["Who?", "Me"]]}] * 3
    write_json(pictures / "captions.jsonl", rows, lines=True)
    source = build_source({"type": "folder", "folder": str(pictures)})
    report = check(source, BUCKETS, processes=0, progress=lambda done, total: None)
    assert report.heights == (0, 0, 0) and report.same_pictures == 0
    assert report.buckets[BUCKETS[len(BUCKETS) // 2]] == 3


def test_a_changed_picture_of_a_conversation_is_noticed(mixed, pictures):
    source = build_source(mixed)
    (pictures / "p5.png").write_bytes(picture("p4")[:-1] + b"x")
    with pytest.raises(ValueError, match=r"p5\.png"):
        source[3].sources[1].load(8, 8)
    report = check(source, BUCKETS, processes=0, progress=lambda done, total: None)
    assert [problem.key[0] for problem in report.problems] == ["4"] and report.records == 5


def test_sidecars_leave_conversations_alone(mixed, pictures):
    keys = [build_source(mixed)[n].key for n in (0, 2, 4)]
    rows = [{"key": key, "caption": "new"} for key in keys]
    sidecar = write_json(pictures / "new.jsonl", rows, lines=True)
    source = build_source({**mixed, "captions": sidecar})
    assert [source[n].text for n in range(6)] == ["new", "", "new", "", "new", ""]
    assert source[1].turns == (Turn("What?", "a sea", 1),) and not source.problems()


def test_an_index_of_before_is_not_read(mixed):
    folder = build_source(mixed).index.folder
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "version": 1}))
    with pytest.raises(ValueError, match="an index of version 1, expected 4: delete it"):
        build_source(mixed)
