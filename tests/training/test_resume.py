"""Runs that are stopped, resumed, or stop themselves."""

import dataclasses
import json
import signal

import jax
import numpy as np
import pytest

from tests.training.conftest import last_state, stop_at, watched
from wemmu_jax.sharding import rules
from wemmu_jax.sharding.mesh import make_mesh
from wemmu_jax.training import loop
from wemmu_jax.training.checkpoints import Checkpoints
from wemmu_jax.training.origin import Origin


@pytest.fixture(scope="module")
def in_two_parts(config_of, tmp_path_factory):
    """Stage 1's six steps as three, SIGTERM, and three more."""
    workdir = tmp_path_factory.mktemp("parts") / "stage1"
    config = config_of("stage1", **{"optimizer.ema": 0.9})
    first = watched(config, workdir, at_step=stop_at(3))
    stopped_at = Checkpoints(workdir).latest
    return first, stopped_at, watched(config, workdir), workdir


def test_sigterm_saves_and_ends_the_run(in_two_parts):
    first, stopped_at, _, _ = in_two_parts
    assert first.stopped == "stopped at step 3/6; the same command goes on from here"
    assert stopped_at == 3 and sorted(first.states) == [1, 2, 3]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_three_and_three_are_six(stage1, in_two_parts):
    whole, workdir = stage1
    first, _, second, resumed = in_two_parts
    assert first.keys + second.keys == whole.keys and len(set(whole.keys)) > 60
    expected, found = last_state(whole, workdir), last_state(second, resumed)
    assert int(found.step) == 6 and found.ema is not None
    assert_same_bits(expected, found)
    # And the running mean is neither the weights nor where they began.
    ema, params = jax.tree.leaves(found.ema), jax.tree.leaves(found.params)
    assert all(not np.array_equal(a, b) for a, b in zip(ema, params, strict=True))


def assert_same_bits(a, b) -> None:
    """Two trees are equal to the bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_what_was_due_when_the_run_was_stopped_is_done_when_it_goes_on(
    stage1, config_of, tmp_path, monkeypatch
):
    """Stopped in its last step, before the validation of that step; and then all is done once and no more."""
    monkeypatch.setattr(loop, "validate", lambda run, params, moved: {"T2I": 0.5})
    config = config_of("stage1", **{"optimizer.steps": 2, "every.validate": 1})
    watched(config, tmp_path / "run", at_step=stop_at(2))
    assert validated(tmp_path / "run") == [0, 1]
    for _ in range(2):
        watched(config, tmp_path / "run")
        assert validated(tmp_path / "run") == [0, 1, 2]


def validated(workdir) -> list[int]:
    """The steps of all validation lines."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row["step"] for row in rows if "validation/T2I" in row]


def test_running_mean_is_the_literal_one(stage1):
    """With a decay of .9, and less in the first steps."""
    seen, workdir = stage1
    state = last_state(seen, workdir)
    mean = dict(seen.trainable)
    for step in range(1, 7):
        kept = min(0.9, step / (9 + step))
        for path, value in seen.states[step].items():
            mean[path] = kept * mean[path].astype(np.float64) + (1 - kept) * value
    for path, leaf in Origin(workdir).trained().items():
        np.testing.assert_allclose(leaf, mean[path], rtol=1e-5, atol=1e-7)
    assert int(state.step) == 6


def test_a_finished_run_has_nothing_left_to_do(stage1, config_of):
    seen, workdir = stage1
    before = last_state(seen, workdir)
    again = watched(config_of("stage1", **{"optimizer.ema": 0.9}), workdir)
    assert not again.keys
    assert_same_bits(before, last_state(seen, workdir))


def test_a_checkpoint_is_restored_onto_another_mesh(stage1, monkeypatch):
    seen, workdir = stage1
    monkeypatch.setattr(rules, "SMALL", 0)
    trainer = dataclasses.replace(seen.run.trainer, mesh=make_mesh(fsdp=8))
    checkpoints = Checkpoints(workdir)
    spread = checkpoints.restore(trainer.abstract_state)
    checkpoints.close()
    cut = [leaf for leaf in jax.tree.leaves(spread.params) if leaf.sharding.spec]
    assert cut and all(len(leaf.addressable_shards) == 8 for leaf in cut)
    assert_same_bits(last_state(seen, workdir), spread)


# -- a loss that is not finite


BAD_STEP, BAD_ROW = 3, 5


def poison(micro_batch, made):
    """The latents of one row of the third step's second micro-batch are not numbers."""
    if micro_batch.number != 2 * BAD_STEP - 1:
        return made
    return made.replace(target=made.target.at[BAD_ROW].set(np.nan))


def test_stops_at_a_loss_that_is_not_finite(stage1, config_of, tmp_path):
    whole, _ = stage1
    config = config_of("stage1", **{"optimizer.ema": 0.9, "every.checkpoint": 2})
    bad = (2 * BAD_STEP - 1) * 8 + BAD_ROW
    with pytest.raises(FloatingPointError) as stopped:
        watched(config, tmp_path / "run", at_batch=poison)
    text = str(stopped.value)
    assert f"step {BAD_STEP}:" in text and f"sample {bad}, {whole.keys[bad]}" in text
    # Of a contrastive loss a row with a good picture may have the bad one as its negative; it is not to blame.
    assert text.count("sample ") == 1
    # The weights, the moments and the running mean are those after step 2.
    good = watched(config, tmp_path / "good", at_step=stop_at(BAD_STEP - 1))
    assert Checkpoints(tmp_path / "run").latest == BAD_STEP - 1
    assert_same_bits(last_state(good, tmp_path / "good"), last_state(good, tmp_path / "run"))
    assert Origin(tmp_path / "run").trained()


def test_update_keeps_a_state_that_must_not_change(stage1):
    seen, workdir = stage1
    trainer, state = seen.run.trainer, last_state(*stage1)
    update = type(trainer).update.func(trainer)
    ones, good = jax.tree.map(np.ones_like, state.params), np.ones(8, np.float32)
    for gradients, losses, step in (
        (jax.tree.map(lambda x: x * np.nan, ones), [good, good], 7),
        (ones, [good, good * np.inf], 7),
        (ones, [good, good], 8),  # dispatched after a step that came to nothing
    ):
        kept, _ = update(last_state(seen, workdir), gradients, losses, np.int32(step))
        assert_same_bits(kept, state)
    changed, norm = update(last_state(seen, workdir), ones, [good, good], np.int32(7))
    assert int(changed.step) == 7 and float(norm) > 1
