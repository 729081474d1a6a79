"""Training on two real processes, beside the same on one."""

import functools
import re
import signal
from unittest import mock

import jax
import numpy as np

from tests.training.members import ended, metrics, start, train_words, wait_for
from wemmu_jax.sharding.mesh import make_mesh
from wemmu_jax.training import loop, run
from wemmu_jax.training.checkpoints import Checkpoints

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
    config = config_of("stage1", **ONE_ARITY, **{"optimizer.steps": 8})
    words = [train_words(config, tmp_path / "two")] * 2
    members = start(words, devices=1)
    wait_for(1, tmp_path / "two", members)
    members[1].send_signal(signal.SIGTERM)
    (code, out, error), (other_code, other_out, other_error) = ended(members)
    assert (code, other_code) == (75, 75), error + other_error
    [stopped] = re.findall(r"stopped at step (\d)/8; the same command goes on from here\n", error)
    assert f"stopped at step {stopped}/8" in other_error and 1 <= int(stopped) < 8
    # The second says nothing else.
    assert "step      1/8  loss" in out and other_out == ""
    assert Checkpoints(tmp_path / "two").latest == int(stopped)

    for code, _, error in ended(start(words, devices=1)):
        assert code == 0, error
    expected = alone(config, tmp_path / "one", devices=2)
    assert_same(metrics(tmp_path / "two"), expected, steps=8)
    a, b = (Checkpoints(tmp_path / name).params(8) for name in ("one", "two"))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)
