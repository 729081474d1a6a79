"""Latents that were computed beforehand train as those of the DC-AE do."""

import json
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.training.conftest import watched
from wemmu_jax.data.features import Features, feature_key
from wemmu_jax.data.pipeline import MicroBatches
from wemmu_jax.data.tasks import Task
from wemmu_jax.tiny.backbones import DC_AE_CONFIG
from wemmu_jax.training import features
from wemmu_jax.training.run import prepare


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A data set of 24 captions and 12 edits; one picture is cut."""
    folder = tmp_path_factory.mktemp("photos")
    rng, lines = np.random.default_rng(0), []
    for number in range(36):
        pixels = rng.integers(0, 256, (40, 56, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
        line = {"image": f"{number}.jpg", "caption": "a star"}
        if number % 3 == 2:
            line = {"image": f"{number}.jpg", "instruction": "x", "sources": [f"{number - 1}.jpg"]}
        lines.append(line)
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cut = (folder / "3.jpg").read_bytes()
    (folder / "3.jpg").write_bytes(cut[: len(cut) // 2])
    tasks = ("T2I", "Uncond", "Rec", "S-Edit")
    return ({"name": "photos", "tasks": tasks, "type": "folder", "folder": str(folder)},)


@pytest.fixture(scope="module")
def config(config_of, photos):
    return config_of("stage3", **{"data.sources": photos, "data.held_out": (), "data.threads": 0})


def encode(config, folder, shard=0, shards=1):
    told = []
    done = features.encode_features(
        config,
        folder,
        shard=shard,
        shards=shards,
        batch=5,
        threads=1,
        progress=lambda done, total: told.append((done, total)),
    )
    return *done, told


@pytest.fixture(scope="module")
def encoded(config, tmp_path_factory):
    """The latents, made by two hosts; and what was said meanwhile."""
    folder = tmp_path_factory.mktemp("features")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "PART", 10)
        first = encode(config, folder, 1, 2)
        with pytest.raises(ValueError, match=r"\d of \d+ parts are there"):
            Features(folder)
        times = {file: file.stat().st_mtime_ns for file in (folder / "parts").iterdir()}
        second = encode(config, folder)
    kept = {file: file.stat().st_mtime_ns for file in times}
    assert kept == times, "what the other host made stays"
    return folder, first, second


def test_two_hosts_share_the_work_and_one_goes_on(encoded):
    folder, (unread, whole, told), (more, done, told_again) = encoded
    assert not whole and done and told[0] == (0, told[-1][1])
    parts = len(list((folder / "parts").glob("*.npy")))
    assert told[-1] == (parts // 2, parts // 2) and told_again[0] == (parts // 2, parts)
    assert unread + more == 1, "the cut picture"


def test_they_are_the_autoencoders_own(encoded, config):
    cached = prepare(with_features(config, encoded[0]))
    plain = prepare(config)
    arities = set()
    for number in range(4):
        a, b = plain.data[number], cached.data[number]
        arities.add(a.arity)
        assert a.keys == b.keys and len(a.bad) == len(b.bad)
        assert b.arrays["target"].dtype == np.float16
        assert not any(
            array.dtype == np.uint8 for name, array in b.arrays.items() if name != "vit_pixels"
        )
        x, y = plain.batch(a), cached.batch(b)
        near = {"rtol": 2e-3, "atol": 2e-3}
        np.testing.assert_allclose(x.target, y.target, **near)
        for own, other in zip(x.source_latents, y.source_latents, strict=True):
            np.testing.assert_allclose(own, other, **near)
        if a.arity:
            np.testing.assert_array_equal(x.images.patches, y.images.patches)
    assert arities == {0, 1}


def with_features(config, folder):
    config = config.copy_and_resolve_references()
    config.data.features = str(folder)
    return config


def test_a_picture_that_changed_finds_none(encoded, config, photos):
    data: MicroBatches = prepare(with_features(config, encoded[0])).data
    source = data.feeds[0].source
    found = pickle.loads(pickle.dumps(Features(encoded[0])))
    target = source[0].target
    assert feature_key(target, 32, 32) in found
    assert found.latents(target, 32, 32).shape == (2, 2, DC_AE_CONFIG["latent_channels"])
    with pytest.raises(ValueError, match="no latents of this picture at 64 x 64"):
        found.latents(target, 64, 64)
    changed = type(target)(40, 56, target.load, (target.identity[0] ^ 1, target.identity[1]))
    with pytest.raises(ValueError, match="no latents of this picture at 32 x 32"):
        found.latents(changed, 32, 32)


def test_latents_of_other_weights_are_refused(encoded, config, tmp_path):
    meta = json.loads((encoded[0] / "meta.json").read_text())
    for name in ("keys.npy", "places.npy"):
        (tmp_path / name).write_bytes((encoded[0] / name).read_bytes())
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"model": "0" * 64}))
    with pytest.raises(ValueError, match="latents of the weights 000000000000"):
        prepare(with_features(config, tmp_path))
    with pytest.raises(ValueError, match="choose another folder"):
        encode(config, tmp_path)


def test_a_set_that_changed_is_refused(encoded, config, photos, tmp_path, monkeypatch):
    """A picture in the place of another: as many parts as before, none of which has it."""
    monkeypatch.setattr(features, "PART", 10)
    shutil.copytree(photos[0]["folder"], tmp_path / "photos")
    Image.new("RGB", (56, 40)).save(tmp_path / "photos/0.jpg")
    other = config.copy_and_resolve_references()
    other.data.sources = ({**photos[0], "folder": str(tmp_path / "photos")},)
    before = sorted(encoded[0].rglob("*"))
    with pytest.raises(ValueError, match=r"parts/\*\.npy were made from something else") as raised:
        encode(other, encoded[0])
    assert "choose another folder" in str(raised.value)
    assert "sets: there ['photos: 36 records, " in str(raised.value)
    assert "parts: there" not in str(raised.value) and sorted(encoded[0].rglob("*")) == before
    larger = config.copy_and_resolve_references()
    larger.data.resolution *= 2
    with pytest.raises(ValueError, match="\n  pictures and sizes: there ") as raised:
        encode(larger, encoded[0])
    assert "sets: there" not in str(raised.value)
    lines = (tmp_path / "photos/captions.jsonl").read_text().replace("a star", "a circle")
    (tmp_path / "photos/captions.jsonl").write_text(lines)
    shutil.copy(f"{photos[0]['folder']}/0.jpg", tmp_path / "photos/0.jpg")
    assert encode(other, encoded[0])[1], "other words, the same pictures"


def test_validation_finds_those_of_a_task_alone(config_of, photos, tmp_path):
    """Tall pictures are enough for reconstruction by itself, and merge with others where edits have none."""
    lines = []
    for number in range(22):
        height, width = (60, 20) if number < 8 else (40, 40)
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        line = {"image": f"{number}.png", "caption": "a star"}
        if number >= 16:
            line = {"image": f"{number}.png", "instruction": "x", "sources": ["9.png"]}
        lines.append(json.dumps(line) + "\n")
    (tmp_path / "captions.jsonl").write_text("".join(lines))
    held_out = (
        {**photos[0], "tasks": ("T2I", "Uncond")},
        {**photos[0], "name": "few", "folder": str(tmp_path), "tasks": ("Rec", "S-Edit")},
    )
    changes = {"data.sources": photos, "data.held_out": held_out, "data.threads": 0}
    config = config_of("stage3", **changes, **{"data.buckets": 3, "validation_rows": 4})
    assert encode(config, tmp_path / "features")[1]
    run = prepare(with_features(config, tmp_path / "features"))
    made = run.held_out.fixed_batches(Task.REC, 6)
    assert len({batch.bucket for batch in made}) == 2 and not any(batch.bad for batch in made)
    assert len({bucket for arity, bucket in run.held_out.shares if arity == 1}) == 1


def test_what_is_drawn_has_none(config_of, tmp_path):
    with pytest.raises(ValueError, match="its pictures are drawn, not stored"):
        encode(config_of("stage3"), tmp_path)


def test_a_run_on_them_with_workers_keeps_a_ledger(encoded, config, tmp_path):
    config = with_features(config, encoded[0])
    config.data.workers, config.data.bad_share, config.optimizer.steps = 2, 0.1, 2
    seen = watched(config, tmp_path)
    alone = [seen.run.data[number] for number in range(4)]
    assert seen.keys == [key for batch in alone for key in batch.keys]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    replaced = sum(row.get("train/records_replaced", 0) for row in rows)
    assert replaced == sum(len(batch.bad) for batch in alone) > 0
    [line] = (tmp_path / "ledger/00000.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert (found["data_set"], found["key"]) == ("photos", "4:3.jpg")
    assert "no latents" in found["reason"] or "cannot be decoded" in found["reason"]
