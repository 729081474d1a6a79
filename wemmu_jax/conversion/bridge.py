"""What WeMMU adds to its backbones, as one safetensors file. Its keys are our own leaf paths; README.md lists them."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from wemmu_jax.conversion.memory import flatten, nest
from wemmu_jax.conversion.safetensors_io import Header, read_header, save_tensors
from wemmu_jax.conversion.weights import ShardingRule, load_stored
from wemmu_jax.models.wemmu.config import BridgeConfig
from wemmu_jax.models.wemmu.modeling import WeMMUModel

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
    header = _header(file)
    leaves = {path: stored.read() for path, stored in header.tensors.items()}
    return Bridge(nest(leaves), _config(header), header.metadata["backbones"])


def read_bridge_config(file: str | Path) -> BridgeConfig:
    """The switches alone; raises as `load_bridge`."""
    return _config(_header(file))


def load_bridge_leaves(
    file: str | Path, sharding: ShardingRule | None = None
) -> dict[str, jax.Array]:
    """Path -> leaf on the devices; raises as `load_bridge`.

    Args:
      file: what `save_bridge` wrote.
      sharding: as in `Weights.load`; each host reads only the slices of its own devices.
    """
    tensors = _header(file).tensors
    return {path: load_stored(path, stored, None, sharding) for path, stored in tensors.items()}


def bridge_misfits(file: str | Path, model: WeMMUModel, text: Mapping) -> list[str]:
    """A line for each leaf that the file lacks, has too many, or has in another shape than `model` wants.

    Args:
      file: what `save_bridge` wrote.
      model: around the backbones that the bridge is to stand on.
      text: shapes of the language model's tree (`vlm/text`).
    """
    fresh = jax.eval_shape(model.init_bridge, jax.random.key(0), text)
    wanted = {path: leaf.shape for path, leaf in flatten(fresh).items()}
    found = {path: stored.shape for path, stored in _header(file).tensors.items()}
    return [
        f"{file}: {path}: the backbones imply {wanted.get(path)}, found {found.get(path)}"
        for path in sorted(wanted.keys() | found.keys())
        if wanted.get(path) != found.get(path)
    ]


def _header(file: str | Path) -> Header:
    header = read_header(Path(file))
    if header.metadata.get("format") != FORMAT:
        found = header.metadata.get("format")
        raise ValueError(f"{file}: expected format {FORMAT!r}, found {found!r}")
    if missing := {"bridge", "backbones"} - header.metadata.keys():
        raise ValueError(f"{file}: damaged: its metadata lack {', '.join(sorted(missing))}")
    return header


def _config(header: Header) -> BridgeConfig:
    return BridgeConfig.from_dict(json.loads(header.metadata["bridge"]))
