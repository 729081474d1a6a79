"""Each of the four stages, started from the one before: what learns, what stays, and what is carried over."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from tests.training.conftest import STEPS, last_state, same_bits, watched
from wemmu_jax.conversion.memory import flatten
from wemmu_jax.conversion.weights import Weights
from wemmu_jax.training import step as step_lib
from wemmu_jax.training.loop import validate
from wemmu_jax.training.metrics import Progress
from wemmu_jax.training.optimizer import merge
from wemmu_jax.training.origin import Origin
from wemmu_jax.training.run import prepare
from wemmu_jax.training.samples import draw_samples

BRIDGE = {"expert", "position_mlp", "vae_branch"}
TASKS = {
    "stage1": {"T2I", "Uncond", "Rec"},
    "stage2": {"T2I", "Uncond", "Rec"},
    "stage3": {"T2I", "Uncond", "Rec", "S-Edit"},
    "stage4": {"T2I", "Uncond", "Rec", "S-Edit", "M-Edit"},
}


@pytest.fixture(params=STEPS)
def stage(request):
    """(name, what was seen, workdir) of each stage."""
    return request.param, *request.getfixturevalue(request.param)


def test_frozen_leaves_stay_and_trainable_ones_learn(stage):
    name, seen, workdir = stage
    assert {path.split("/")[0] for path in seen.frozen} == (
        {"vlm", "dc_ae", "dit"} if name == "stage1" else {"vlm", "dc_ae"}
    )
    assert {path.split("/")[0] for path in seen.trainable} == (
        BRIDGE if name == "stage1" else BRIDGE | {"dit"}
    )
    after = {path: np.array(leaf) for path, leaf in flatten(seen.run.frozen).items()}
    moved = [path for path, leaf in after.items() if not same_bits(leaf, seen.frozen[path])]
    assert not moved
    learned = flatten(last_state(seen, workdir).params)
    assert learned.keys() == seen.trainable.keys() == seen.gradients.keys()
    still = [p for p, leaf in learned.items() if np.array_equal(leaf, seen.trainable[p])]
    assert not still
    assert not [path for path, largest in seen.gradients.items() if not 0 < largest < np.inf]


def test_every_task_of_the_mixture_is_seen(stage):
    name, seen, _ = stage
    assert set(seen.tasks) == TASKS[name]
    assert len(seen.keys) == STEPS[name] * 16


def test_stage1_starts_from_the_backbones_and_its_own_seed(stage1, converted):
    weights, (seen, _) = Weights.open(converted), stage1
    for path, leaf in seen.trainable.items():
        assert leaf.dtype == np.float32
        if path.startswith("expert/"):
            copied = weights.map(path.replace("expert/", "vlm/text/"))
            assert np.array_equal(leaf, copied.astype(np.float32))
    for path, leaf in seen.frozen.items():
        assert np.array_equal(leaf, weights.map(path).astype(np.float32))


def test_the_expert_starts_unrounded_beside_a_frozen_tree_that_is(config_of, converted):
    run = prepare(config_of("stage1", **{"model.dtype": "bfloat16"}))
    weights = Weights.open(converted)
    expert = flatten(run.trainable["expert"])
    assert len(expert) > 10
    for path, leaf in expert.items():
        np.testing.assert_array_equal(np.asarray(leaf), weights.map(f"vlm/text/{path}"), path)
    assert {leaf.dtype for leaf in flatten(run.frozen["vlm"]).values()} == {np.dtype(jnp.bfloat16)}


def test_stage2_carries_the_bridge_over(stage1, stage2, converted):
    trained = flatten(last_state(*stage1).ema)
    weights = Weights.open(converted)
    for path, leaf in stage2[0].trainable.items():
        if path.startswith("dit/"):
            assert leaf.dtype == np.float32
            assert np.array_equal(leaf, weights.map(path).astype(np.float32))
        else:
            assert same_bits(leaf, np.array(trained[path])), path


def test_stage3_carries_everything_over(stage2, stage3):
    trained = flatten(last_state(*stage2).params)
    assert stage3[0].trainable.keys() == trained.keys()
    assert all(same_bits(leaf, np.array(trained[p])) for p, leaf in stage3[0].trainable.items())


def test_optimizer_starts_afresh_in_each_stage(stage2):
    counts = optax.tree_utils.tree_get_all_with_path(last_state(*stage2).opt_state, "count")
    assert {int(count) for _, count in counts} == {STEPS["stage2"]}


def test_trained_weights_are_laid_over_the_backbones(stage1, stage2, converted):
    origin = Origin(stage2[1])
    assert origin.parent.folder == stage1[1] and origin.backbones_folder == converted
    trained, own = origin.trained(), flatten(last_state(*stage2).params)
    assert trained.keys() == own.keys()
    assert all(same_bits(np.array(trained[path]), np.array(own[path])) for path in own)
    whole = flatten(origin.load(dtype=lambda path: np.dtype(np.float32)))
    assert whole.keys() == trained.keys() | stage2[0].frozen.keys()
    first = Origin(stage1[1]).trained()
    assert {path.split("/")[0] for path in first} == BRIDGE


def test_what_is_drawn_anew(stage1, config_of):
    last = {path: np.array(leaf) for path, leaf in Origin(stage1[1]).trained().items()}
    rules = (("position_mlp/", True), (".*", False))
    common = {"trainable": rules, "seed": 9}
    kept = prepare(config_of("stage2", stage1[1], **common))
    drawn = prepare(config_of("stage2", stage1[1], redrawn=("position_mlp/",), **common))
    for path, leaf in flatten(kept.trainable).items():
        assert same_bits(np.array(leaf), last[path])
    for path, leaf in flatten(drawn.trainable).items():
        assert leaf.shape == last[path].shape and np.abs(leaf - last[path]).max() > 1e-3
    old, new = flatten(kept.frozen), flatten(drawn.frozen)
    assert old.keys() == new.keys() and "expert/norm/scale" in new
    assert all(same_bits(np.array(old[path]), np.array(new[path])) for path in old)


@pytest.mark.parametrize(
    ("redrawn", "message"),
    [(("quarries/",), "match no parameter of the bridge"), (("expert/norm",), "are frozen")],
)
def test_what_cannot_be_drawn_anew(redrawn, message, stage1, config_of, tmp_path):
    rules = (("position_mlp/", True), (".*", False))
    config = config_of("stage2", stage1[1], trainable=rules, redrawn=redrawn)
    with pytest.raises(ValueError, match=message):
        prepare(config)


def test_an_autoencoder_that_would_learn_from_nothing(stage1, config_of):
    config = config_of("stage2", stage1[1], trainable=(("vlm/", False), (".*", True)))
    with pytest.raises(ValueError, match="lets the DC-AE learn, through which no loss passes"):
        prepare(config)


# -- what a run tells


def _events(workdir):
    """Events of a run's TensorBoard files: records of a length, its checksum, the data and their checksum."""
    for file in sorted((workdir / "tensorboard").glob("events*")):
        data = file.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event()
            event.ParseFromString(data[12 : 12 + length])
            yield event
            data = data[16 + length :]


def scalars(workdir) -> dict[str, dict[int, float]]:
    """Name -> step -> value."""
    found = {}
    for event in _events(workdir):
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_tensorboard(stage4):
    found = scalars(stage4[1])
    names = ("loss", "gradient_norm", "texts_cut", "seconds_left", "step_seconds", "data_seconds")
    speeds = ("samples_per_second", "tokens_per_second", "model_teraflops_per_second")
    for name in (*names, *speeds, "device_seconds"):
        assert sorted(found[f"train/{name}"]) == [1, 2, 3, 4, 5]
    assert "train/mfu" not in found  # nobody says what a CPU's peak is
    assert all(value > 0 for value in found["train/loss"].values())
    assert all(value == 0 for value in found["train/texts_cut"].values())
    for task in TASKS["stage4"]:
        assert sorted(found[f"validation/{task}"]) == [0, 5]
        assert f"train/loss_{task}" in found


def test_validation_is_the_same_at_two_calls(stage4):
    seen, workdir = stage4
    params = last_state(seen, workdir).params
    first = validate(seen.run, params)
    assert first.keys() == TASKS["stage4"]
    assert first == validate(seen.run, params)
    written = scalars(workdir)
    for task, loss in first.items():
        assert written[f"validation/{task}"][5] == pytest.approx(loss, rel=1e-6)
        assert written[f"validation/{task}"][0] != pytest.approx(loss, rel=1e-6)


def test_validation_is_flow_matching_at_times_evenly_spread(stage4):
    """Row i of 8 at (i + 1/2) / 8, whatever law the stage draws its times by, with one noise for ever."""
    seen, workdir = stage4
    run, seed = seen.run, seen.run.stage.seed
    params = last_state(seen, workdir).params
    batch = run.batch(run.validation_batches["S-Edit"])
    noise = np.asarray(step_lib.draw_flow_noise(seed, batch.sample_numbers, batch.target.shape[1:]))
    clean, sigma = np.asarray(batch.target), (np.arange(8, dtype=np.float32) + 0.5) / 8
    share = sigma[:, None, None, None]
    velocity, _ = jax.jit(
        lambda tree, batch, noisy: step_lib.predicted_velocity(
            run.trainer.model, tree, batch, noisy=noisy, sigma=sigma, seed=seed
        )
    )(merge(params, run.frozen), batch, (1 - share) * clean + share * noise)
    wanted = np.mean((np.asarray(velocity) - (noise - clean)) ** 2)
    assert validate(run, params)["S-Edit"] == pytest.approx(wanted, rel=1e-5)


def test_what_is_said_before_the_first_step(stage4):
    said = json.loads((stage4[1] / "run_description.json").read_text())
    assert said["bridge"] == "trained"
    assert sum(said["mixture"].values()) == pytest.approx(1, abs=1e-3)
    assert said["mixture"]["S-Edit"] == pytest.approx(35 / 110, abs=1e-4)
    assert said["batch"].startswith("2 micro-batches x 8 rows = 16")
    trainable = sum(leaf.size for leaf in stage4[0].trainable.values())
    frozen = sum(leaf.size for leaf in stage4[0].frozen.values())
    assert (said["trainable"], said["frozen"]) == (trainable, frozen)
    assert sum(n for part in said["parameters"].values() for n in part.values()) == (
        trainable + frozen
    )
    config = json.loads((stage4[1] / "config.json").read_text())
    assert config["name"] == "tiny stage4" and config["init"].endswith("stage3")


def test_progress_line(tmp_path, capsys):
    progress = Progress(tmp_path, steps=100, batch=16, start=0, writes=True)
    progress.step(1, {"loss": 1.25, "gradient_norm": 0.5}, line=True)
    progress.step(2, {"loss": 1.25, "gradient_norm": 0.5}, line=False)
    progress.close()
    line = capsys.readouterr().out
    assert re.fullmatch(
        r"step +1/100  loss 1\.2500  grad norm 0\.500  [\d.]+ samples/s  \d+:\d\d:\d\d left\n", line
    )


@pytest.mark.slow
def test_sample_pictures(stage3, config_of, tmp_path):
    """A line for each request: sources, what was meant, what was drawn; in a PNG and in TensorBoard."""
    changes = {"optimizer.steps": 2, "every.sample": 2}
    seen = watched(config_of("stage4", stage3[1], **changes), tmp_path / "run")
    names = [file.name for file in sorted((tmp_path / "run/samples").iterdir())]
    assert names == ["000000.png", "000002.png"]
    first, last = (np.asarray(Image.open(tmp_path / f"run/samples/{name}")) for name in names)
    # Four lines, of 32 pixels and a gap, for each of T2I, Rec, S-Edit and M-Edit; in a line at most two sources, the
    # target and what was drawn. T2I comes first, with target and drawn.
    assert first.shape == last.shape == (4 * 4 * 36, 4 * 32, 3)
    for line in range(4):
        rows = slice(36 * line, 36 * line + 32)
        assert (first[rows, :32] == last[rows, :32]).all()
        assert (first[rows, 32:64] != last[rows, 32:64]).any()
    pictures = [v for e in _events(tmp_path / "run") for v in e.summary.value if v.tag == "samples"]
    assert len(pictures) == 2 and len(seen.keys) == 32


def test_no_sample_pictures_where_every_text_is_too_long(config_of, tmp_path, monkeypatch):
    """Trained on, such texts are cut; a request cannot be."""
    run = prepare(config_of("stage1"))
    real = run.held_out.examples

    def told(*asked):
        return [dataclasses.replace(example, text="a star " * 300) for example in real(*asked)]

    monkeypatch.setattr(run.held_out, "examples", told)
    assert draw_samples(run, run.trainable, tmp_path / "samples/0.png") is None
    assert not list(tmp_path.iterdir())
