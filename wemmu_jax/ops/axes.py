"""Names of the device mesh's axes, and the mesh that a program is traced for. What lies along which axis is told in
`sharding.rules`."""

import math

import jax
from jax.sharding import AbstractMesh

ROWS = ("data", "fsdp")  # rows of a batch lie along both
TOKENS = "sequence"
HEADS = "tensor"
LANES = 128  # of a TPU's vectors
AXES = (*ROWS, TOKENS, HEADS)  # from the slowest links to the fastest


def current_mesh() -> AbstractMesh | None:
    """The mesh of `sharding.rules.placed` or `jax.set_mesh`; None outside them, or if it has other axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if set(mesh.axis_names) == set(AXES) else None


def dividing(
    mesh: AbstractMesh, size: int, axes: str | tuple[str, ...]
) -> str | tuple[str, ...] | None:
    """`axes`, if so many rows, tokens or heads can be dealt out along them; None if all devices have them whole."""
    names = (axes,) if isinstance(axes, str) else axes
    return axes if size % math.prod(mesh.shape[name] for name in names) == 0 else None


def heads_are_cut() -> bool:
    """Whether devices share the heads, so that a run of lanes may lie on two."""
    mesh = current_mesh()
    return mesh is not None and mesh.shape[HEADS] > 1


def current_device_kind() -> str:
    """As "TPU v5": of the devices that `current_platform` speaks of."""
    mesh = current_mesh()
    return jax.devices()[0].device_kind if mesh is None else mesh.abstract_device.device_kind


def current_platform() -> str:
    """ "cpu", "gpu" or "tpu": that of the current mesh, which may be of devices that are not there, or the default."""
    mesh = current_mesh()
    return jax.default_backend() if mesh is None else mesh.abstract_device.platform
