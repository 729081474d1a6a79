"""A tiny model on disk, converted once for all tests of the command line, and a way to call `wemmu`."""

import dataclasses
import pathlib
import shutil

import jax
import jax.numpy as jnp
import pytest

from tests.conftest import unoptimised
from wemmu_jax.cli.main import main

CONFIG = "configs/tiny.py:stage2"
STEP = 3


@dataclasses.dataclass(frozen=True)
class Result:
    """What a call of `wemmu` left behind."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True, scope="package")
def _unoptimised():
    with unoptimised():
        yield


@pytest.fixture
def wemmu(capsys):
    """Calls the command line in this process."""

    def call(*words: object) -> Result:
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def refused(wemmu):
    """Calls the command line, expects one error of the user's and returns it."""

    def call(command: str, *words: object) -> str:
        result = wemmu(command, *words)
        assert result.code == 2, result
        assert "Traceback" not in result.err
        assert f"wemmu {command}: " in result.err
        return result.err

    return call


@pytest.fixture(scope="package")
def backbones(tmp_path_factory) -> pathlib.Path:
    """The tiny backbones as Hugging Face folders."""
    from tests.backbones import write_backbones
    from wemmu_jax.miniworld.sources import MiniworldSource

    source = MiniworldSource("caption", seed=0, size=500, split="train")
    root = tmp_path_factory.mktemp("backbones")
    write_backbones(root, [source[i].text for i in range(500)], seed=0)
    return root


@pytest.fixture(scope="package")
def converted(backbones, tmp_path_factory) -> pathlib.Path:
    """What `wemmu convert` makes of them."""
    out = tmp_path_factory.mktemp("converted") / "tiny"
    words = ["convert", "--vlm", backbones / "vlm", "--sana", backbones / "sana", "--out", out]
    assert main([str(word) for word in words]) == 0
    return out


@pytest.fixture(scope="package")
def workdir(converted, tmp_path_factory) -> pathlib.Path:
    """A workdir as training leaves it, with a checkpoint at step 0 and one at `STEP`; nothing was compiled."""
    from wemmu_jax.models.wemmu.config import WeMMUConfig
    from wemmu_jax.models.wemmu.modeling import WeMMUModel
    from wemmu_jax.training.checkpoints import Checkpoints, claim_workdir
    from wemmu_jax.training.curriculum import Stage, load_config
    from wemmu_jax.training.optimizer import make_optimizer
    from wemmu_jax.training.origin import Origin
    from wemmu_jax.training.state import TrainState

    folder = tmp_path_factory.mktemp("runs") / "stage2"
    config = load_config(CONFIG)
    config.init = str(converted)
    stage, origin = Stage.from_config(config), Origin(converted)
    params = origin.load(dtype=lambda path: jnp.float32)
    model = WeMMUModel(WeMMUConfig.from_folder(converted, stage.bridge))
    bridge = model.init_bridge(jax.random.key(7), params["vlm"]["text"])
    trained = {**bridge, "dit": jax.tree.map(lambda leaf: 1.5 * leaf, params["dit"])}
    state = TrainState.create(trained, make_optimizer(stage.optimizer), ema=False)
    claim_workdir(folder, config, origin.described() | {"bridge": stage.bridge.to_dict()})
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save(state)
    checkpoints.save(state.replace(step=state.step + STEP))
    checkpoints.close()
    return folder


@pytest.fixture
def copy_of(tmp_path):
    """Copies a folder, to be damaged."""

    def copy(folder: pathlib.Path) -> pathlib.Path:
        return pathlib.Path(shutil.copytree(folder, tmp_path / "copy"))

    return copy
