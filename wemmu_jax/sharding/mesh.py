"""The device mesh: data x fsdp x sequence x tensor. What lies along which axis is told in `rules.py`."""

import collections
import math

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from wemmu_jax.models.wemmu.config import WeMMUConfig
from wemmu_jax.ops.axes import AXES, HEADS, ROWS, TOKENS


def make_mesh(
    *,
    data: int = 0,
    fsdp: int = 1,
    sequence: int = 1,
    tensor: int = 1,
    devices: list | None = None,
) -> Mesh:
    """A mesh over `devices`, those of all processes by default.

    `data` is the outermost axis: it alone goes from slice to slice of a multi-slice TPU (over DCN), where there is
    one sum of gradients a micro-batch and no weight is gathered.

    Args:
      data, fsdp, sequence, tensor: sizes; `data` 0 is what the others leave.

    Raises:
      ValueError: the sizes do not multiply to the devices, a slice or a process has not whole groups; says what would
        work.
    """
    # Rows follow the devices, and a process makes a block of them: process 0 the first, process 1 the next.
    devices = sorted(devices or jax.devices(), key=lambda d: (_slice(d), d.process_index, d.id))
    sizes = {"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
    group = sequence * tensor
    _check_sizes(sizes, len(devices), devices[0].device_kind)
    for what, of, inside in (("slice", _slice, fsdp * group), ("process", _process, group)):
        [*counts] = collections.Counter(map(of, devices)).values()
        if len(counts) > 1 and any(count % inside for count in counts):
            axes = "fsdp x sequence x tensor" if what == "slice" else "sequence x tensor"
            raise ValueError(
                f"mesh {axes} = {inside} must lie inside a {what}, but does not divide its {min(counts)} devices; "
                f"possible: {_divisors(math.gcd(*counts))}"
            )
    sizes["data"] = len(devices) // (fsdp * group)
    # Auto axes: with Explicit ones, the default of `jax.make_mesh`, every operation would need a sharding.
    grid = np.asarray(devices).reshape([sizes[axis] for axis in AXES])
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slice(device: jax.Device) -> int:
    # A GPU has one too: that of its host, beyond which weights may well be cut.
    is_tpu = device.platform == "tpu"
    return (getattr(device, "slice_index", None) or 0) if is_tpu else 0


def _process(device: jax.Device) -> int:
    return device.process_index


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _check_sizes(sizes: dict[str, int], count: int, kind: str) -> None:
    left, taken = count, ""
    for axis in (HEADS, TOKENS, "fsdp"):
        if sizes[axis] < 1 or left % sizes[axis]:
            what = f"the {left} that{taken} leaves of " if taken else ""
            raise ValueError(
                f"mesh.{axis}={sizes[axis]} does not divide {what}{count} devices ({kind}); "
                f"possible: {_divisors(left)}"
            )
        left //= sizes[axis]
        taken += f" {axis}={sizes[axis]}" * (sizes[axis] > 1)
    if sizes["data"] not in (0, left):
        said = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise ValueError(
            f"a mesh of {said} is not {count} devices ({kind}); possible: mesh.data={left}, or 0, which stands for "
            "what the other axes leave"
        )


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """How many parts the rows of a batch are cut into."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def check_rows(rows: int, mesh: Mesh, *, key: str) -> None:
    """Raises ValueError naming `key` of the config, and what would work, if the mesh does not divide `rows`."""
    parts = row_shards(mesh)
    if rows % parts:
        near = sorted({max(1, rows // parts) * parts, (rows // parts + 1) * parts})
        said = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in ROWS)
        raise ValueError(
            f"{key}={rows} does not divide over {parts} devices (mesh {said}); the nearest that do: {near}"
        )


def check_heads(config: WeMMUConfig, mesh: Mesh) -> None:
    """Raises ValueError naming what would work if `tensor` does not divide the heads of every attention."""
    heads = {
        "of the ViT": config.vlm.vision.num_heads,
        "for keys of the LLM": config.vlm.text.num_key_value_heads,
        "of the DiT's cross-attention": config.dit.num_cross_attention_heads,
    }
    if config.bridge.connector.depth:
        heads["of the connector"] = config.bridge.connector_heads
    for whose, count in heads.items():
        if count % mesh.shape[HEADS]:
            raise ValueError(
                f"mesh.{HEADS}={mesh.shape[HEADS]} does not divide the {count} heads {whose}; "
                f"possible: {_divisors(math.gcd(*heads.values()))}"
            )
