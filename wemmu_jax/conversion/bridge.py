"""What WeMMU adds to its backbones, as one safetensors file. Its keys are our own leaf paths; README.md lists them."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from wemmu_jax.conversion.export import load_tensors, save_tensors
from wemmu_jax.conversion.memory import nest
from wemmu_jax.models.wemmu.config import BridgeConfig

BRIDGE_FILE = "bridge.safetensors"
FORMAT = "wemmu-bridge-1"

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Bridge:
    """What WeMMU adds to its backbones.

    Attributes:
      params: `expert`, `position_mlp` and, depending on `config`, `vae_branch` and `queries`.
      config: the switches that it was trained with.
      fingerprint: of the converted backbones that its training started from.
    """

    params: dict
    config: BridgeConfig
    fingerprint: str


def save_bridge(
    file: str | Path, leaves: Mapping[str, Array], config: BridgeConfig, fingerprint: str
) -> None:
    """Writes a bridge's leaves, by path, as one safetensors file that explains itself in its metadata."""
    metadata = {
        "format": FORMAT,
        "bridge": json.dumps(config.to_dict()),
        "backbones": fingerprint,
    }
    save_tensors(file, dict(sorted(leaves.items())), metadata)


def load_bridge(file: str | Path) -> Bridge:
    """Reads what `save_bridge` wrote.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it is no bridge, or damaged.
    """
    leaves, metadata = load_tensors(file)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{file}: expected format {FORMAT!r}, found {metadata.get('format')!r}")
    config = BridgeConfig.from_dict(json.loads(metadata["bridge"]))
    return Bridge(nest(leaves), config, metadata["backbones"])
