"""Backbones that have learned nothing, in the form of the tiny preset."""

import json
import pathlib
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from wemmu_jax.conversion.backbones import DC_AE, DIT, VLM
from wemmu_jax.models.wemmu.config import BridgeConfig, WeMMUConfig
from wemmu_jax.models.wemmu.modeling import WeMMUModel
from wemmu_jax.rng import Stream, stream_key
from wemmu_jax.tiny.backbones import BRIDGE, save_backbone, write_configs


def write_backbones(root: pathlib.Path, texts: Iterable[str], *, seed: int) -> None:
    """`write_configs`, and random weights that have learned nothing."""
    write_configs(root, texts)
    model = WeMMUModel(WeMMUConfig.from_folder(root, BridgeConfig(**BRIDGE)), dtype=jnp.float32)
    params = jax.jit(model.init_backbones)(stream_key(seed, Stream.INIT))
    for backbone in (VLM, DIT, DC_AE):
        config = json.loads((root / backbone.folder / "config.json").read_text())
        save_backbone(backbone, root, config, params[backbone.prefix])
