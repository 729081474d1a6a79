"""Training on two real processes, beside the same on one."""

import functools
import json
import re
import signal
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image

from tests.training.members import ended, metrics, start, train_words, wait_for
from wemmu_jax.sharding.mesh import make_mesh
from wemmu_jax.training import loop, run
from wemmu_jax.training.checkpoints import Checkpoints

STEPS = 16  # a SIGTERM takes a second to be noticed
# One program instead of many: text to picture alone.
ONE_ARITY = {"data.mixture.Rec": 0.0, "data.mixture.Uncond": 0.0, "batch.micro_batches": 1}
TOGETHER = ("loss", "gradient_norm", "texts_cut", "loss_T2I", "loss_Rec", "loss_Uncond")


def alone(config, workdir, *, devices: int) -> dict[int, dict[str, float]]:
    """The metrics of the same run on one process."""
    mesh = functools.partial(make_mesh, devices=jax.devices()[:devices])
    with mock.patch.object(run, "make_mesh", mesh):
        loop.train(config, workdir)
    return metrics(workdir)


def assert_same(found: dict, expected: dict, *, steps: int) -> None:
    """Two runs had the same losses, of all tasks, to rounding."""
    assert sorted(found) == sorted(expected) and max(found) == steps
    for step, row in expected.items():
        names = [name for name in row if name.split("/")[-1] in TOGETHER or "validation" in name]
        assert set(row) == set(found[step]) and len(names) >= 3
        for name in names:
            np.testing.assert_allclose(found[step][name], row[name], rtol=1e-5, err_msg=name)


def test_two_processes_are_stopped_and_go_on_as_one_would(config_of, tmp_path):
    """SIGTERM reaches one of them; both stop after the same step, and the same command goes on."""
    config = config_of("stage1", **ONE_ARITY, **{"optimizer.steps": STEPS})
    words = [train_words(config, tmp_path / "two")] * 2
    members = start(words, devices=1)
    wait_for(tmp_path / "two/run_description.json", members)
    members[1].send_signal(signal.SIGTERM)
    (code, out, error), (other_code, other_out, other_error) = ended(members)
    assert (code, other_code) == (75, 75), error + other_error
    [stopped] = re.findall(rf"stopped at step (\d+)/{STEPS}; the same command goes on", error)
    assert f"stopped at step {stopped}/{STEPS}" in other_error and 1 <= int(stopped) < STEPS
    # The second says nothing else.
    assert f"step      1/{STEPS}  loss" in out and other_out == ""
    assert Checkpoints(tmp_path / "two").latest == int(stopped)

    for code, _, error in ended(start(words, devices=1)):
        assert code == 0, error
    expected = alone(config, tmp_path / "one", devices=2)
    assert_same(metrics(tmp_path / "two"), expected, steps=STEPS)
    a, b = (Checkpoints(tmp_path / name).params(STEPS) for name in ("one", "two"))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_two_processes_of_four_devices_are_one_of_eight(config_of, tmp_path):
    """All tasks, with validation and sample pictures, which all draw and the first one writes."""
    changes = {"optimizer.steps": 3, "every.validate": 3, "every.sample": 3, "mesh.fsdp": 2}
    config = config_of("stage1", **changes)
    for code, _, error in ended(start([train_words(config, tmp_path / "two")] * 2, devices=4)):
        assert code == 0, error
    assert_same(metrics(tmp_path / "two"), alone(config, tmp_path / "one", devices=8), steps=3)
    for name in ("000000.png", "000003.png"):
        two, one = (
            np.asarray(Image.open(tmp_path / run / "samples" / name)).astype(int)
            for run in ("two", "one")
        )
        assert two.shape == one.shape and np.abs(two - one).max() <= 1
    described = json.loads((tmp_path / "two/run_description.json").read_text())
    assert described["devices"].startswith("8 x cpu, 2 processes")
    assert len(list((tmp_path / "two/tensorboard").iterdir())) == 1


@pytest.mark.slow
def test_processes_that_were_given_different_things(config_of, tmp_path):
    config = config_of("stage1", **ONE_ARITY)
    own, other = tmp_path / "own", tmp_path / "other"
    words = train_words(config, own)
    members = start([words, [*words, "--config.optimizer.learning_rate=0.5"]], devices=1)
    for code, _, error in ended(members):
        assert (
            code == 2 and "process 0 (there) and process 1 (here) have different configs" in error
        )
        rate = config.optimizer.learning_rate
        assert f"optimizer.learning_rate: {rate} there, 0.5 here" in error
    assert not own.exists()
    # A workdir that is not on shared storage.
    for code, _, error in ended(start([words, train_words(config, other)], devices=1)):
        assert code == 2 and "of process 0 is not that of 1" in error
    assert not (own / "checkpoints").exists() and not other.exists()
    assert not list(own.glob(".seen*"))


def test_the_sample_to_blame_may_be_of_another_process(monkeypatch):
    theirs = [[12, "set/b", float("nan")], [13, "set/c", 0.5]]
    monkeypatch.setattr(loop, "exchange", lambda mine: [json.loads(json.dumps(mine)), theirs])
    plain = jax.numpy.array([0.5, 0.25, np.nan, 0.5])
    part = loop._Part(
        keys=("set/x", "set/a"),
        numbers=np.array([10, 11], np.uint32),
        first=10,
        tasks=plain,
        cut=plain,
        replaced=plain,
        tokens=plain,
        teraflops=plain,
        losses=plain,
        plain=plain,
    )
    text = loop._blame(loop._Outcome(3, [part], plain[0]), 1.0)
    assert text.startswith("step 3:") and text.endswith("To blame:\n  sample 12, set/b: loss nan")
