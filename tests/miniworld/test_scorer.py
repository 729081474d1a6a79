"""The scorer's own score: right on truth, also blurred and noisy, and not taken in by anything nearly right.

Blur is sigma 1 px and noise 30 dB, both at once, on the tiny preset's own size, a wide and a larger one.
"""

import itertools
import time

import numpy as np
import pytest

from tests.miniworld.trials import TRIALS, shares_of
from wemmu_jax.miniworld import compositions, edits
from wemmu_jax.miniworld.compositions import draw_composition
from wemmu_jax.miniworld.edits import draw_edit
from wemmu_jax.miniworld.reader import label, read
from wemmu_jax.miniworld.renderer import render
from wemmu_jax.miniworld.scene import BACKGROUNDS, COLOURS, Object, Scene, random_scene
from wemmu_jax.miniworld.scorer import (
    score_composition,
    score_edit,
    score_reconstruction,
)


@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("trial", TRIALS)
def test_truth_passes_also_spoiled_and_near_misses_fail(trial, count):
    shares = shares_of(TRIALS[trial], count)
    assert shares.clean >= 0.995
    assert shares.spoiled >= 0.99
    assert shares.taken_in <= 0.005


@pytest.mark.parametrize("kind", edits.KINDS)
def test_a_copy_of_the_source_is_no_edit(kind):
    rng = np.random.default_rng(7)
    for _ in range(40):
        edit = draw_edit(rng, "train", kind)
        grade = score_edit(render(edit.source, 64, 64), edit)
        assert (grade.correct, grade.changed, grade.kept, grade.copied) == (
            False,
            False,
            True,
            True,
        )
        grade = score_edit(render(edit.target, 64, 64), edit)
        assert (grade.correct, grade.changed, grade.kept, grade.copied) == (True, True, True, False)
        assert grade.reason == "right"


@pytest.mark.parametrize("kind", compositions.KINDS)
def test_a_copy_of_a_source_is_no_composition(kind):
    rng = np.random.default_rng(8)
    for _ in range(40):
        made = draw_composition(rng, "train", kind)
        grade = score_composition(render(made.sources[0], 64, 64), made)
        assert grade.copied and grade.kept and not grade.changed and not grade.correct
        if made.sources[1].canonical != made.target.canonical:
            assert not score_composition(render(made.sources[1], 64, 64), made).correct


def test_change_and_keeping_are_graded_apart():
    circle, star = Object("circle", "red", "top left"), Object("star", "blue", "centre")
    source = Scene("white", (circle, star))
    wanted = Object("circle", "green", "top left")
    target = Scene("white", (wanted, star))
    edit = edits.Edit("recolour", "make the circle green", "", source, target, (None,))

    def grade(background, *objects):
        return score_edit(render(Scene(background, objects), 64, 64), edit)

    overdone = grade("black", wanted, star)
    assert overdone.changed and not overdone.kept and not overdone.correct
    assert overdone.reason == "not kept: background colour is black, not white"
    assert overdone.facts == 4 / 5  # the background's, and two of either object
    lost = grade("white", wanted)
    assert lost.changed and not lost.kept and lost.facts == 3 / 5
    other_shape = grade("white", Object("ring", "green", "top left"), star)
    assert other_shape.changed and not other_shape.kept
    missed = grade("white", Object("circle", "cyan", "top left"), star)
    assert missed.kept and not missed.changed and not missed.copied
    assert missed.reason == "not changed: top left colour is cyan, not green"
    added = grade("white", wanted, star, Object("ring", "blue", "top right"))
    assert added.changed and not added.kept and added.facts == 5 / 7
    assert grade("white", wanted, star).facts == 1.0


def test_blank_and_noise_are_never_right():
    rng = np.random.default_rng(9)
    pictures = [np.full((64, 64, 3), rgb, np.uint8) for rgb in BACKGROUNDS.values()]
    pictures += [rng.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(6)]
    coarse = rng.integers(0, 256, (6, 8, 8, 3), np.uint8)
    pictures += [np.repeat(np.repeat(blocks, 8, 0), 8, 1) for blocks in coarse]
    for picture in pictures:
        assert read(picture).scene is None
        for draw in TRIALS.values():
            for _ in range(5):
                assert not draw(rng).score(picture).correct


def test_what_has_no_name_is_not_given_one():
    scene = Scene("white", (Object("circle", "red", "top left"), Object("star", "blue", "centre")))
    picture = render(scene, 64, 64)
    assert read(picture).scene.canonical == scene.canonical and read(picture).confidence > 0.95
    grey = picture.copy()
    grey[45:61, 45:61] = 60
    smeared = picture.copy()
    smeared[2:20, 24:62] = (45, 80, 230)
    off = np.clip(picture.astype(int) - [90, 90, 0], 0, 255).astype(np.uint8)
    for spoiled in (grey, smeared, off):
        assert read(spoiled).scene is None and read(spoiled).confidence == 0
        assert not score_reconstruction(spoiled, scene).correct
    assert len(read(grey).objects) == 3
    speck = picture.copy()
    speck[60, 60] = 0
    assert score_reconstruction(speck, scene).correct


def test_touching_objects_of_two_colours_are_told_apart():
    picture = render(Scene("black", (Object("square", "red", "centre"),)), 64, 64)
    square = picture[25:39, 25:39].copy()
    picture[25:39, 39:53] = np.where(square == square[7, 7], (45, 80, 230), square)
    assert {(o.shape, o.colour) for o in read(picture).objects} == {
        ("square", "red"),
        ("square", "blue"),
    }


def test_two_objects_at_one_place_are_not_one():
    picture = render(Scene("black", (Object("ring", "red", "centre"),)), 64, 64)
    small = render(Scene("black", (Object("ring", "red", "centre"),)), 40, 40)[14:26, 14:26]
    crowded = np.zeros_like(picture)
    crowded[:] = BACKGROUNDS["black"]
    crowded[22:34, 22:34], crowded[34:46, 34:46] = small, small
    reading = read(crowded)
    assert len(reading.objects) == 2 and reading.scene is None
    assert reading.attributes()["centre", "shape"] is None


@pytest.mark.parametrize(
    ("height", "width"), [(128, 64), (64, 128), (224, 224), (150, 210), (512, 512)]
)
def test_any_size_is_read(height, width):
    rng = np.random.default_rng(10)
    for _ in range(30):
        scene = random_scene(rng)
        assert score_reconstruction(render(scene, height, width), scene).correct


def test_components_are_those_of_a_flood_fill():
    rng = np.random.default_rng(11)
    for density in (0.2, 0.5, 0.6, 0.8):
        mask = rng.random((23, 31)) < density
        labels, count = label(mask)
        reference = np.zeros(mask.shape, int)
        number = 0
        for seed in zip(*np.nonzero(mask), strict=True):
            if reference[seed]:
                continue
            number += 1
            stack = [seed]
            while stack:
                y, x = stack.pop()
                if 0 <= y < 23 and 0 <= x < 31 and mask[y, x] and not reference[y, x]:
                    reference[y, x] = number
                    stack += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        assert count == number
        assert len({*zip(labels.ravel(), reference.ravel(), strict=True)}) == number + (
            0 in reference
        )
    assert label(np.zeros((4, 4), bool))[1] == 0


def test_bad_pictures_are_named():
    for bad in (
        np.zeros((64, 64), np.uint8),
        np.zeros((64, 64, 4), np.uint8),
        np.zeros((64, 64, 3)),
    ):
        with pytest.raises(ValueError, match=r"expected uint8\[H, W, 3\], found"):
            read(bad)


def test_reading_takes_less_than_ten_milliseconds():
    rng = np.random.default_rng(12)
    pictures = [render(random_scene(rng), 64, 64) for _ in range(40)]
    times = []
    for _ in range(5):
        start = time.process_time()
        for picture in pictures:
            read(picture)
        times.append((time.process_time() - start) / len(pictures))
    assert min(times) < 10e-3


@pytest.mark.parametrize("side", [48, 96])
def test_a_ninth_of_another_background_is_no_background(side):
    """Some backgrounds lie between another and an object's colour, as navy between black and blue."""
    item = (Object("circle", "red", "centre"),)
    for old, new in itertools.permutations(BACKGROUNDS, 2):
        picture, before = (render(Scene(name, item), side, side).copy() for name in (new, old))
        picture[: side // 3, : side // 3] = before[: side // 3, : side // 3]
        assert read(picture).scene is None


def test_what_still_shines_through_is_not_removed():
    for colour, background in itertools.product(COLOURS, BACKGROUNDS):
        kept = Object("circle", "blue" if colour == "red" else "red", "centre")
        gone = Object("square", colour, "top left")
        full, clean = (
            render(Scene(background, items), 48, 48).astype(np.float32)
            for items in ((kept, gone), (kept,))
        )
        ghost = np.uint8(np.round(clean + 0.4 * (full - clean)))
        assert read(ghost).scene is None and read(np.uint8(clean)).scene is not None
