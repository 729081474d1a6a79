"""Tasks of records, and sizes of pictures."""

import dataclasses

import numpy as np
import pytest

from wemmu_jax.data.buckets import Bucket, make_buckets, merge, nearest
from wemmu_jax.data.records import Picture, Record, source_counts, target_sizes
from wemmu_jax.data.tasks import STAGE_TASKS, Task, arity, make_example


def picture():
    return Picture(10, 20, lambda height, width: np.zeros((height, width, 3), np.uint8))


def record(sources):
    return Record("k", "the {text}", tuple(picture() for _ in range(sources)), picture())


def test_examples():
    plain, edit, both = record(0), record(1), record(3)
    example = make_example(Task.T2I, plain)
    assert (example.text, example.sources, example.key) == ("the {text}", (), "k")
    for any_record in (plain, edit, both):
        example = make_example(Task.UNCOND, any_record)
        assert (example.text, example.sources) == ("", ()) and example.target is any_record.target
        example = make_example(Task.REC, any_record)
        assert example.text == "Please reproduce this image."
        assert example.sources == (any_record.target,)
    for task, used in [(Task.S_EDIT, edit), (Task.M_EDIT, both)]:
        example = make_example(task, used)
        assert example.text == used.text
        sizes = [(picture.height, picture.width) for picture in used.sources]
        assert [(shown.height, shown.width) for shown in example.sources] == sizes
        assert (example.sources == used.sources) == (task is Task.S_EDIT), (
            "compositions are shown whole"
        )
        assert arity(task, used) == len(used.sources) and example.task is task
    for task, wrong in [
        (Task.T2I, edit),
        (Task.S_EDIT, plain),
        (Task.S_EDIT, both),
        (Task.M_EDIT, edit),
    ]:
        with pytest.raises(
            ValueError, match=f"'k' with . source picture.* cannot serve task {task.value}"
        ):
            make_example(task, wrong)
    mute = dataclasses.replace(edit, text="")
    assert make_example(Task.REC, mute).sources == (mute.target,)
    with pytest.raises(ValueError, match="'k' has no text and cannot serve task S-Edit"):
        make_example(Task.S_EDIT, mute)
    stages = ["T2I", "Uncond", "Rec", "S-Edit", "M-Edit"]
    # The order is in every seed of every pool's order, see `Pool.record`.
    assert [task.value for task in Task] == [*stages, "VQA"]
    assert [task.value for task in STAGE_TASKS] == stages


def test_optional_methods_of_a_source():
    class Bare(list):
        pass

    assert target_sizes(Bare([record(2)] * 3)) is None
    assert source_counts(Bare([record(2)] * 3)).tolist() == [2, 2, 2]
    wrong = Bare([record(0)])
    wrong.sizes = lambda: np.zeros((2, 2))
    with pytest.raises(ValueError, match="sizes"):
        target_sizes(wrong)


def test_the_buckets_of_the_design():
    large, small = make_buckets(1024, multiple=32), make_buckets(512, multiple=32)
    assert len(large) == len(small) == 9
    assert {Bucket(2048, 512), Bucket(1024, 1024), Bucket(512, 2048)} <= set(large)
    assert {Bucket(608, 416), Bucket(512, 512), Bucket(416, 608)} <= set(small)
    assert list(large) == sorted(large, key=lambda bucket: bucket.height / bucket.width)
    for base, buckets in [(1024, large), (512, small)]:
        for bucket in buckets:
            assert bucket.height % 32 == bucket.width % 32 == 0
            assert Bucket(bucket.width, bucket.height) in buckets
            assert abs(bucket.height * bucket.width / base**2 - 1) < 0.07
    assert make_buckets(512, multiple=32, count=1) == (Bucket(512, 512),)
    assert len(make_buckets(64, multiple=32)) < 9, "equal sizes are one bucket"


def test_what_buckets_cannot_be():
    with pytest.raises(ValueError, match="500 is no multiple of 32; the nearest is 512"):
        make_buckets(500, multiple=32)
    with pytest.raises(ValueError, match="odd"):
        make_buckets(512, multiple=32, count=8)
    with pytest.raises(ValueError, match="max_ratio"):
        make_buckets(512, multiple=32, max_ratio=0.5)


def test_nearest_is_by_aspect():
    buckets = make_buckets(512, multiple=32)
    assert nearest(buckets, 4000, 4100) == Bucket(512, 512)
    assert nearest(buckets, 3000, 2000) == Bucket(608, 416)
    assert nearest(buckets, 2000, 3000) == Bucket(416, 608)
    assert nearest(buckets, 20, 10_000) == Bucket(256, 1024)


def test_merging():
    assert merge(np.array([[9, 9, 9]]), np.array([5])).tolist() == [0, 1, 2]
    assert merge(np.array([[1, 9, 9]]), np.array([5])).tolist() == [1, 1, 2]
    assert merge(np.array([[9, 1, 8]]), np.array([5])).tolist() == [0, 0, 2]
    assert merge(np.array([[0, 0, 0, 9, 4]]), np.array([5])).tolist() == [3] * 5
    assert merge(np.array([[9, 9], [9, 0]]), np.array([5, 1])).tolist() == [0, 0]
    assert len(set(merge(np.array([[1, 2, 1]]), np.array([99])).tolist())) == 1
