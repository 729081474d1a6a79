"""convert, export and train: what is written, and what weights and workdirs are refused."""

import itertools
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.tiny import STEPS
from tests.cli.conftest import STEP
from wemmu_jax import WeMMU
from wemmu_jax.cli.main import main
from wemmu_jax.conversion.bridge import load_bridge, save_bridge
from wemmu_jax.conversion.convert import convert
from wemmu_jax.conversion.export import export_backbones
from wemmu_jax.conversion.memory import flatten
from wemmu_jax.conversion.weights import Weights
from wemmu_jax.diffusion.guidance import Scales
from wemmu_jax.models.wemmu.config import BridgeConfig, Connector, QueryKind, WeMMUConfig
from wemmu_jax.models.wemmu.modeling import WeMMUModel
from wemmu_jax.training.origin import Origin

README = pathlib.Path("wemmu_jax/conversion/README.md")
CONFIG = ("--config", "configs/tiny.py:stage2")


def draw(checkpoint, out) -> tuple[object, ...]:
    return ("generate", "x", "--checkpoint", checkpoint, "--out", out)


# -- convert and export


def test_convert_refuses_a_taken_folder(refused, backbones, converted):
    words = ["--vlm", backbones / "vlm", "--sana", backbones / "sana", "--out", converted]
    assert "exists already" in refused("convert", *words)


def test_convert_names_what_is_not_there(refused, backbones, tmp_path):
    words = ["--vlm", tmp_path / "no", "--sana", backbones / "sana", "--out", tmp_path / "out"]
    assert f"{tmp_path / 'no'}: no such folder" in refused("convert", *words)
    assert not list(tmp_path.iterdir())


def test_the_solver_takes_the_shift_of_the_scheduler(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "copy")
    file = tmp_path / "copy/sana/scheduler/scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "flow_shift": 2.5}))
    assert WeMMU.without_weights(tmp_path / "copy").shift == 2.5
    del config["flow_shift"]
    file.write_text(json.dumps(config))
    assert WeMMU.without_weights(tmp_path / "copy").shift == 3.0
    file.write_text(json.dumps({**config, "flow_shift": "six"}))
    with pytest.raises(ValueError, match=r"scheduler_config\.json: flow_shift: .* found 'six'"):
        WeMMU.without_weights(tmp_path / "copy")


def test_a_model_may_have_scales_of_its_own(backbones, tmp_path):
    shutil.copytree(backbones / "sana", tmp_path / "sana")
    file = tmp_path / "sana/guidance.json"
    file.write_text('{"generate": 1.5, "edit": 5}')
    convert(backbones / "vlm", tmp_path / "sana", tmp_path / "out")
    export_backbones(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back/sana/guidance.json").read_text() == file.read_text()
    assert WeMMU.without_weights(tmp_path / "out").scales == Scales(generate=1.5, edit=5.0)
    copy = tmp_path / "out/sana/guidance.json"
    copy.unlink()
    assert WeMMU.without_weights(tmp_path / "out").scales == Scales(4.0, 2.0, 3.0, 3.0, 2.0)
    for text, message in (
        (
            '{"generated": 2}',
            r"guidance\.json: unknown keys \['generated'\]; known: \['generate', ",
        ),
        ('{"edit": true}', r"guidance\.json: edit: expected a finite number, found True"),
        ('{"edit": NaN}', r"guidance\.json: edit: expected a finite number, found nan"),
    ):
        copy.write_text(text)
        with pytest.raises(ValueError, match=message):
            WeMMU.without_weights(tmp_path / "out")


def test_export_of_converted_weights(wemmu, converted, tmp_path, backbones):
    result = wemmu("export", "--checkpoint", converted, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert "no bridge.safetensors" in result.out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["sana", "vlm"]
    file = "sana/transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (backbones / file).read_bytes()


def _parts(folder):
    return ["--vlm", folder / "vlm", "--sana", folder / "sana"]


def test_export_of_a_trained_model_comes_back(wemmu, converted, workdir, tmp_path):
    """Exported and converted again, the model is the one that was trained, without its workdirs."""
    out, again = tmp_path / "out", tmp_path / "again"
    result = wemmu("export", "--checkpoint", workdir, "--out", out)
    assert result.code == 0, result.err
    words = [*_parts(out), "--bridge", out / "bridge.safetensors", "--out", again]
    assert wemmu("convert", *words).code == 0

    origin, found = Origin(workdir), Origin(again)
    bridge = load_bridge(again / "bridge.safetensors")
    assert bridge.fingerprint == Weights.open(converted).fingerprint
    assert bridge.config == BridgeConfig.from_dict(origin.bridge)
    assert found.bridge == origin.bridge
    assert {path.split("/")[0] for path in origin.trained().keys() - found.trained().keys()} == {
        "dit"
    }
    whole = flatten(WeMMU.load(workdir, dtype=jnp.float32).params)
    joined = flatten(WeMMU.load(again, dtype=jnp.float32).params)
    assert whole.keys() == joined.keys()
    for path, leaf in whole.items():
        assert np.array_equal(leaf, joined[path]), path

    # The bridge belongs to the weights: a run that starts here notices another one.
    before = found.fingerprint
    assert before != Weights.open(again).fingerprint
    leaves = {path: leaf + 1 for path, leaf in flatten(bridge.params).items()}
    save_bridge(again / "bridge.safetensors", leaves, bridge.config, bridge.fingerprint)
    assert Origin(again).fingerprint != before


def test_export_leaves_the_accelerator_alone(wemmu, workdir, tmp_path, monkeypatch):
    """Its trained leaves would be the largest thing that a first device ever held."""
    devices, trained, places = jax.local_devices, Origin.trained, set()

    def local_devices(*, backend=None):
        return devices()[3:] if backend == "cpu" else devices()

    def spied(self, *arguments, **options):
        leaves = trained(self, *arguments, **options)
        places.update(device for leaf in leaves.values() for device in leaf.devices())
        return leaves

    monkeypatch.setattr(jax, "local_devices", local_devices)
    monkeypatch.setattr(Origin, "trained", spied)
    assert wemmu("export", "--checkpoint", workdir, "--out", tmp_path / "out").code == 0
    assert places == {devices()[3]}


def test_which_weights_drew_a_picture(workdir, converted, copy_of):
    """Pictures and answers carry it, so that `batch` does not take those of an earlier step for its own."""
    latest, earlier = Origin(workdir).identity, Origin(workdir, step=0).identity
    assert latest.startswith(f"step {STEP}, ") and earlier.startswith("step 0, ")
    assert latest.split()[-1] != earlier.split()[-1] != Origin(converted).identity
    assert Origin(copy_of(workdir)).identity == latest


def test_a_bridge_of_other_backbones_is_refused(refused, wemmu, workdir, tmp_path):
    out = tmp_path / "out"
    assert wemmu("export", "--checkpoint", workdir, "--out", out).code == 0
    bridge = load_bridge(out / "bridge.safetensors")
    leaves = flatten(bridge.params)
    leaves["expert/norm/scale"] = leaves["expert/norm/scale"][:-1]
    leaves["queries/scale"] = leaves["expert/norm/scale"]
    save_bridge(out / "other.safetensors", leaves, bridge.config, bridge.fingerprint)
    words = [*_parts(out), "--out", tmp_path / "again"]
    error = refused("convert", *words, "--bridge", out / "other.safetensors")
    assert "expert/norm/scale: the backbones imply (128,), found (127,)" in error
    assert "queries/scale: the backbones imply None, found (127,)" in error
    error = refused("convert", *words, "--bridge", out / "none.safetensors")
    assert "none.safetensors" in error
    file = out / "sana/vae/diffusion_pytorch_model.safetensors"
    assert "expected format 'wemmu-bridge-1'" in refused("convert", *words, "--bridge", file)
    assert not (tmp_path / "again").exists()


def test_the_key_table_names_every_leaf(converted):
    """All kinds of queries and connectors; `{a,b}` in the README stands for a and b."""
    rows = re.findall(r"^\| `([^`]*/[^`]*)` \|", README.read_text(), re.MULTILINE)
    parts = [[p.split(",") for p in re.split(r"[{}]", row)[1::2]] for row in rows]
    frames = [re.sub(r"{[^}]*}", "{}", row) for row in rows]
    documented = {
        frame.format(*choice)
        for frame, part in zip(frames, parts, strict=True)
        for choice in itertools.product(*part)
    }
    kinds = [(kind, Connector.LINEAR) for kind in QueryKind]
    kinds.append((QueryKind.NOISY, Connector.VIT_2))
    found = set()
    text = jax.eval_shape(lambda: Weights.open(converted).load("vlm/text"))
    for queries, connector in kinds:
        bridge = BridgeConfig(queries=queries, connector=connector, fixed_grid=2, max_grid=4)
        model = WeMMUModel(WeMMUConfig.from_folder(converted, bridge))
        found |= flatten(jax.eval_shape(model.init_bridge, jax.random.key(0), text)).keys()
    assert found == documented


def test_export_leaves_nothing_after_an_error(refused, tmp_path, copy_of, converted):
    half = copy_of(converted)
    next(half.glob("weights/*.safetensors")).unlink()
    assert "missing" in refused("export", "--checkpoint", half, "--out", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


# -- weights that are not there, or not whole


@pytest.mark.parametrize("command", ["generate", "export", "train"])
def test_no_weights(refused, tmp_path, command):
    (tmp_path / "empty").mkdir()
    for where in ("nowhere", "empty"):
        folder, out = tmp_path / where, tmp_path / "out"
        words = {
            "generate": draw(folder, out)[1:],
            "export": ("--checkpoint", folder, "--out", out),
            "train": (*CONFIG, "--init", folder, "--workdir", out),
        }[command]
        assert "no weights: " in refused(command, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


CONVERTED_FILES = (
    "wemmu.json",
    "weights/index.json",
    "weights/weights-00001-of-00001.safetensors",
    "vlm/config.json",
    "vlm/tokenizer.json",
    "vlm/preprocessor_config.json",
    "sana/transformer/config.json",
    "sana/vae/config.json",
)


@pytest.mark.parametrize("name", CONVERTED_FILES)
def test_half_a_converted_folder(refused, copy_of, converted, tmp_path, name):
    half = copy_of(converted)
    (half / name).unlink()
    message = refused(*draw(half, tmp_path / "out"))
    assert str(half) in message
    assert name.split("/")[-1] in message
    assert not (tmp_path / "out").exists()


def test_cut_weights(refused, copy_of, converted, tmp_path):
    half = copy_of(converted)
    file = next(half.glob("weights/*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file}: " in refused(*draw(half, tmp_path / "out"))


@pytest.mark.parametrize(
    "name",
    ["params", "params/_METADATA", "params/manifest.ocdbt", "params/d", "params/ocdbt.process_0"],
)
def test_half_a_workdir(refused, copy_of, workdir, tmp_path, name):
    half = copy_of(workdir)
    gone = half / "checkpoints/3" / name
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    message = refused(*draw(half, tmp_path / "out"))
    assert f"checkpoint {half}/checkpoints/3 is not whole: params lacks" in message
    assert not (tmp_path / "out").exists()


def test_a_workdir_without_checkpoints(refused, copy_of, workdir, tmp_path):
    half = copy_of(workdir)
    shutil.rmtree(half / "checkpoints")
    assert "has no finished checkpoint" in refused(*draw(half, tmp_path / "out"))


def test_backbones_of_another_run(refused, copy_of, workdir, tmp_path):
    half = copy_of(workdir)
    run = json.loads((half / "run.json").read_text())
    (half / "run.json").write_text(json.dumps({**run, "fingerprint": "0" * 64}))
    assert "was trained on weights 000000000000" in refused(*draw(half, tmp_path / "out"))


# -- train


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.optimizer.step=3"], 'did you mean "steps" instead of "step"?'),
        (["--config.optimizer.steps=many"], "optimizer.steps='many' does not fit"),
        (["--config.optimizer.steps", "2.5"], "expected int, found float"),
        (["--config.optimizer.steps=0"], "warm-up of 100 steps does not fit in 0 steps"),
        (["--config.loss.kind=mse"], "loss.kind='mse'; expected one of"),
        (["--config.model.bridge.queries=noise"], "queries='noise'; expected one of"),
    ],
)
def test_configs_that_make_no_sense(refused, converted, tmp_path, words, message):
    words = [*CONFIG, "--init", converted, "--workdir", tmp_path / "run", *words]
    assert message.lower() in refused("train", *words).lower()
    assert not (tmp_path / "run").exists()


def test_no_such_config(refused, tmp_path):
    words = ["--workdir", tmp_path / "run", "--init", tmp_path]
    assert "no config file nowhere.py" in refused("train", "--config", "nowhere.py:stage1", *words)
    assert "no stage 'stage9'" in refused("train", "--config", "configs/tiny.py:stage9", *words)


def test_a_run_never_starts_from_nothing(refused, tmp_path):
    message = refused("train", *CONFIG, "--workdir", tmp_path / "run")
    assert "no weights to start from: give --init" in message
    assert not (tmp_path / "run").exists()


def test_a_workdir_belongs_to_its_config(refused, workdir):
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    # Without --init: the workdir knows what its run started from.
    message = refused("train", *CONFIG, "--workdir", workdir, "--config.optimizer.steps=61")
    assert f"{workdir} belongs to another config" in message
    assert f"optimizer.steps: {STEPS['stage2']} there, 61 here" in message
    assert "init" not in message
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}


def test_a_folder_that_is_no_workdir(refused, converted, tmp_path):
    (tmp_path / "thesis.txt").touch()
    message = refused("train", *CONFIG, "--init", converted, "--workdir", tmp_path)
    assert f"{tmp_path} is not empty and is no workdir" in message


@pytest.mark.slow
def test_train_then_generate(converted, tmp_path):
    run, keys = tmp_path / "run", ("optimizer.steps=2", "optimizer.warmup=1", "batch.rows=8")
    words = ["train", *CONFIG, "--init", converted, "--workdir", run]
    words += [f"--config.{key}" for key in (*keys, "data.held_out=[]")]
    assert main([str(word) for word in words]) == 0
    assert main([str(word) for word in draw(run, tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").exists()
