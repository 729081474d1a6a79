"""Scenes, their splits, their pictures, and the record sources that draw them."""

import dataclasses
import itertools
import pickle
import time

import numpy as np
import pytest

from wemmu_jax.miniworld import scene as world
from wemmu_jax.miniworld.renderer import RADIUS, place_middle, render
from wemmu_jax.miniworld.scene import Object, Scene, random_scene
from wemmu_jax.miniworld.sources import KINDS, SHARES, MiniworldSource


def _pictures(record):
    return [p for p in (*record.sources, record.target) if p is not None]


def _scenes(record):
    return [picture.load.args[0] for picture in _pictures(record)]


def test_there_are_more_than_200_000_scenes():
    """12.8 billion, as the README says: some of the places, and for each a shape and a colour."""
    kinds = len(world.SHAPES) * len(world.COLOURS)
    layouts = (
        kinds ** len(places)
        for count in range(1, world.MAX_OBJECTS + 1)
        for places in itertools.combinations(world.PLACES, count)
    )
    assert round(len(world.BACKGROUNDS) * sum(layouts) / 1e9, 1) == 12.8
    alone = {
        Scene(background, (Object(*names),)).canonical
        for background, *names in itertools.product(
            world.BACKGROUNDS, world.SHAPES, world.COLOURS, world.PLACES
        )
    }
    assert len(alone) == 6 * 8 * 8 * 9


def test_canonical_form_forgets_order_and_offsets():
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = random_scene(rng)
        moved = tuple(dataclasses.replace(o, offset=(0.01, -0.01)) for o in scene.objects[::-1])
        other = Scene(scene.background, moved)
        assert other.canonical == scene.canonical and other.split == scene.split


def test_splits_share_no_scene_whatever_the_seed():
    sizes = {
        ("caption", "train"): 6000,
        ("edit", "train"): 2000,
        ("composition", "train"): 300,
        ("conversation", "train"): 300,
        ("caption", "held_out"): 1000,
        ("edit", "held_out"): 150,
        ("composition", "held_out"): 40,
        ("conversation", "held_out"): 40,
    }
    drawn = {"train": [], "held_out": []}
    for (kind, split), seed in itertools.product(sizes, (0, 11)):
        size = sizes[kind, split]
        source = MiniworldSource(kind, seed=seed, size=size, split=split)
        drawn[split] += [s.canonical for i in range(size) for s in _scenes(source[i])]
    assert sum(map(len, drawn.values())) >= 20_000
    assert len(set(drawn["held_out"])) > 1000
    assert not set(drawn["train"]) & set(drawn["held_out"])


def test_one_scene_in_ten_is_held_out():
    rng = np.random.default_rng(5)
    share = np.mean([random_scene(rng).split == "held_out" for _ in range(5000)])
    assert 0.08 < share < 0.12


@pytest.mark.parametrize("kind", KINDS)
def test_records_are_a_pure_function_of_their_number(kind):
    source = MiniworldSource(kind, seed=3, size=1000, split="train")
    again = pickle.loads(pickle.dumps(source))
    assert len(again) == 1000
    np.testing.assert_array_equal(source.sizes(), again.sizes())
    assert (source.sizes()[:, 0] == source.sizes()[:, 1]).mean() == pytest.approx(
        SHARES[0], abs=0.05
    )
    for i in (0, 17, 999):
        record, same = source[i], again[i]
        assert record.key == same.key == f"miniworld/{kind}/train/3/{i}"
        assert (record.text, record.turns) == (same.text, same.turns)
        pictures = {"edit": 1, "composition": 2, "conversation": 1}.get(kind, 0)
        assert len(record.sources) == pictures
        talks = kind == "conversation"
        assert (record.target is None) == bool(record.turns) == talks == source.conversations()[i]
        for a, b in zip(_pictures(record), _pictures(same), strict=True):
            assert a.height is a.width is None
            a = pickle.loads(pickle.dumps(a))
            assert a.load(64, 96).shape == (64, 96, 3)
            np.testing.assert_array_equal(a.load(64, 96), b.load(64, 96))
    said = (f"{source[i].text} {source[i].turns} {_scenes(source[i])[-1]}" for i in range(200))
    assert len(set(said)) > 195
    other = MiniworldSource(kind, seed=4, size=1000, split="train")
    assert _scenes(other[0]) != _scenes(source[0])


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"kind.*caption.*'video'"):
        MiniworldSource("video", seed=0, size=1, split="train")
    with pytest.raises(ValueError, match=r"split.*held_out.*'test'"):
        MiniworldSource("caption", seed=0, size=1, split="test")
    with pytest.raises(IndexError, match="record 1 of a miniworld source of 1"):
        MiniworldSource("caption", seed=0, size=1, split="train")[1]
    with pytest.raises(ValueError, match=r"colour.*red.*'mauve'"):
        Object("circle", "mauve", "centre")
    with pytest.raises(ValueError, match=r"background.*white.*'red'"):
        Scene("red", (Object("circle", "red", "centre"),))
    with pytest.raises(ValueError, match="two objects at one place"):
        Scene("white", (Object("circle", "red", "centre"), Object("star", "red", "centre")))
    with pytest.raises(ValueError, match="1 to 4 objects, found 0"):
        Scene("white", ())


@pytest.mark.parametrize(
    ("height", "width"), [(64, 64), (64, 96), (128, 64), (64, 128), (224, 448)]
)
def test_a_picture_is_drawn_at_its_places_and_not_stretched(height, width):
    for shape, place in itertools.product(world.SHAPES, world.PLACES):
        picture = render(Scene("black", (Object(shape, "yellow", place),)), height, width)
        assert picture.dtype == np.uint8 and picture.shape == (height, width, 3)
        rows, columns = np.nonzero(picture[..., 0] > 137)
        x, y = place_middle(place)
        radius = RADIUS * min(height, width)
        assert abs((columns.min() + columns.max() + 1) / 2 - x * width) < 1
        assert abs((rows.min() + rows.max() + 1) / 2 - y * height) < 0.15 * radius + 1
        tall, wide = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert 1.5 * radius < min(tall, wide) and max(tall, wide) < 2.2 * radius + 1
        assert 0.8 < tall / wide < 1.25


def test_edges_are_antialiased_and_colours_exact():
    picture = render(Scene("white", (Object("circle", "blue", "centre"),)), 64, 64)
    assert tuple(picture[32, 32]) == world.COLOURS["blue"]
    assert tuple(picture[0, 0]) == world.BACKGROUNDS["white"]
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) - 2 + 30 > 30
    share = (245.0 - picture[..., 0]).sum() / 200 / (np.pi * (0.92 * RADIUS * 64) ** 2)
    assert abs(share - 1) < 0.01


def test_rendering_takes_less_than_two_milliseconds():
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng) for _ in range(50)]
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for scene in scenes:
            render(scene, 64, 64)
        times.append((time.perf_counter() - start) / len(scenes))
    assert min(times) < 2e-3
