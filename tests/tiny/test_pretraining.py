"""The loop that trains tiny backbones, on a problem of four numbers, and one step of each real recipe."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.backbones import write_backbones
from wemmu_jax.cli.main import main
from wemmu_jax.conversion.backbones import DC_AE, DIT, VLM
from wemmu_jax.conversion.convert import convert
from wemmu_jax.conversion.memory import flatten
from wemmu_jax.conversion.weights import Weights
from wemmu_jax.rng import Stream, stream_key
from wemmu_jax.tiny import loop, sana
from wemmu_jax.tiny.backbones import load_backbone, write_configs
from wemmu_jax.tiny.card import describe
from wemmu_jax.tiny.loop import Recipe, pretrain
from wemmu_jax.training.optimizer import OptimizerConfig

TRUTH = np.float32([1.0, -2.0, 3.0, 0.5])


def line(*, steps=6, seed=0, on_batch=lambda step: None, broken_at=None):
    def batch(step):
        on_batch(step)
        x = np.random.default_rng([seed, step]).standard_normal((8, 4), np.float32)
        return {"x": x, "y": x @ TRUTH * (np.nan if step == broken_at else 1)}

    def loss(params, frozen, batch, key):
        noise = 0.01 * jax.random.normal(key, batch["y"].shape)
        error = batch["x"] @ params["w"] - batch["y"] + frozen["bias"] + noise
        return jnp.mean(error**2), {"largest": jnp.max(jnp.abs(error))}

    return Recipe(
        name="line",
        seed=seed,
        rows=8,
        optimizer=OptimizerConfig(learning_rate=0.3, warmup=1, steps=steps),
        ema=0.9,
        init=lambda key: {"w": jax.random.normal(key, (4,))},
        frozen={"bias": jnp.float32(0.25)},
        batch=batch,
        loss=loss,
        evaluate=lambda params: {"error": float(jnp.abs(params["w"] - TRUTH).max())},
    )


def test_it_learns_and_the_same_seed_gives_the_same_weights(tmp_path):
    first = pretrain(line(steps=200), tmp_path / "a")
    again = pretrain(line(steps=200), tmp_path / "b")
    other = pretrain(line(steps=200, seed=1), tmp_path / "c")
    assert np.abs(first["w"] - TRUTH).max() < 0.3
    np.testing.assert_array_equal(first["w"], again["w"])
    assert (first["w"] != other["w"]).all()


def test_stopped_and_resumed_is_the_same_as_never_stopped(tmp_path, monkeypatch):
    whole = pretrain(line(), tmp_path / "whole")
    monkeypatch.setattr(loop, "AHEAD", 1)
    monkeypatch.setattr(loop, "THREADS", 1)

    def stop_at_4(step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedError, match="the same command goes on"):
        pretrain(line(on_batch=stop_at_4), tmp_path / "parts")
    resumed = pretrain(line(), tmp_path / "parts")
    np.testing.assert_array_equal(whole["w"], resumed["w"])


def test_the_result_is_the_running_mean(tmp_path, monkeypatch):
    """With a decay of .9, and less in the first steps, of weights that do not depend on it."""
    saved = []

    class Saving(loop.Checkpoints):
        def save(self, state):
            saved.append(jax.device_get(state.params["w"]))
            super().save(state)

    monkeypatch.setattr(loop, "Checkpoints", Saving)
    monkeypatch.setattr(loop, "EVERY_CHECKPOINT", 1)
    plain = pretrain(dataclasses.replace(line(), ema=0.0), tmp_path / "plain")["w"]
    np.testing.assert_array_equal(plain, saved[-1])
    mean = jax.jit(line().init)(stream_key(0, Stream.INIT))["w"]
    for step, weights in enumerate(saved):
        decay = min(0.9, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * weights
    averaged = pretrain(line(), tmp_path / "averaged")["w"]
    assert len(saved) == 12
    np.testing.assert_array_equal(saved[6:], saved[:6])
    np.testing.assert_allclose(averaged, mean, rtol=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "EVERY_LINE", 1)
    with pytest.raises(FloatingPointError, match="line, step 3"):
        pretrain(line(broken_at=3), tmp_path)


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    """Neither after a loss between two lines of the log, nor after one that does not show it."""
    with pytest.raises(FloatingPointError, match="line, step 6: loss nan"):
        pretrain(line(broken_at=6), tmp_path / "late")
    monkeypatch.setattr(loop, "EVERY_CHECKPOINT", 1)
    with pytest.raises(FloatingPointError, match="line, step 1: weights are not finite"):
        pretrain(dataclasses.replace(line(), loss=steep), tmp_path / "steep")
    assert not list(tmp_path.glob("*/checkpoints/[0-9]*"))


def steep(params, frozen, batch, key):
    """Finite, and its gradient is not."""
    return jnp.sum(jnp.sqrt(0 * params["w"])), {}


def test_a_workdir_of_another_recipe_is_refused(tmp_path):
    pretrain(line(), tmp_path)
    with pytest.raises(ValueError, match=r"seed: 0 there, 1 here"):
        pretrain(line(seed=1), tmp_path)


def test_a_card_names_the_code_that_a_training_began_with(tmp_path, monkeypatch):
    recipe = line()
    monkeypatch.setattr(loop, "code_version", lambda: "0.1.0 at began")
    pretrain(recipe, tmp_path)
    monkeypatch.setattr(loop, "code_version", lambda: "0.1.0 at ended")
    pretrain(recipe, tmp_path)
    card = describe(recipe, tmp_path, "a command", parameters=4, scores={})
    assert card["version"] == "0.1.0 at began" and card["command"] == "a command"


def test_rows_that_the_devices_do_not_divide_are_refused(tmp_path):
    with pytest.raises(ValueError, match="8 devices do not divide the 6 rows"):
        pretrain(dataclasses.replace(line(), rows=6), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_saved_backbones_are_read_back_bit_for_bit(tmp_path):
    write_backbones(tmp_path, ["a red circle"] * 10, seed=3)
    convert(str(tmp_path / "vlm"), str(tmp_path / "sana"), str(tmp_path / "converted"))
    weights = Weights.open(tmp_path / "converted")
    for backbone in (VLM, DIT, DC_AE):
        for path, leaf in flatten(load_backbone(backbone, tmp_path)).items():
            stored = weights.load_leaf(f"{backbone.prefix}/{path}", dtype=jnp.float32)
            np.testing.assert_array_equal(leaf, np.asarray(stored))


def test_a_config_that_is_there_stays_and_latents_of_a_wrong_size_are_refused(tmp_path):
    """A DC-AE's weights that were put beside a fresh config were once trained on, an eighth of their size."""
    write_backbones(tmp_path, ["a red circle"] * 10, seed=3)
    sana.recipe(tmp_path, seed=0, steps=10)  # as they are, they are accepted
    path = tmp_path / DC_AE.folder / "config.json"
    path.write_text(path.read_text().replace('"scaling_factor": 0.2', '"scaling_factor": 0.025'))
    (tmp_path / "vlm/config.json").unlink()
    write_configs(tmp_path, ["a red circle"] * 10)
    assert json.loads(path.read_text())["scaling_factor"] == 0.025
    assert (tmp_path / "vlm/config.json").exists()
    with pytest.raises(ValueError, match="scaling_factor: expected latents"):
        sana.recipe(tmp_path, seed=0, steps=10)


@pytest.mark.slow
def test_each_backbone_takes_two_steps_and_is_written(tmp_path, monkeypatch, capsys):
    for module in ("vlm", "dc_ae", "sana"):
        monkeypatch.setattr(f"wemmu_jax.tiny.{module}.HELD_OUT", 2)
    root = tmp_path / "backbones"
    words = ["--out", str(root), "--steps", "2"]
    assert main(["miniworld", "pretrain", "sana", *words, "--workdir", str(tmp_path / "no")]) == 2
    assert "missing; run `wemmu miniworld pretrain dc-ae` first" in capsys.readouterr().err
    for name in ("vlm", "dc-ae", "sana"):
        workdir = ["--workdir", str(tmp_path / name)]
        assert main(["miniworld", "pretrain", name, *words, *workdir]) == 0
        printed = capsys.readouterr().out
        told = json.loads(printed[printed.index("{") :])
        assert told["backbone"] == name and told["scores"] and told["samples"] > 0
    card = (root / "README.md").read_text()
    assert all(
        f"wemmu miniworld pretrain {name} --seed 0" in card for name in ("vlm", "dc-ae", "sana")
    )
    convert(str(root / "vlm"), str(root / "sana"), str(tmp_path / "converted"))
