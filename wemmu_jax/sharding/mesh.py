"""The device mesh: rows of a batch lie along `data` and `fsdp`, parameters along `fsdp`."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp")


def make_mesh(*, fsdp: int = 1, devices: list | None = None) -> Mesh:
    """A data x fsdp mesh over `devices` (those of all processes by default).

    Raises:
      ValueError: `fsdp` does not divide the number of devices; names those that do.
    """
    # Rows follow the devices, and a process makes a block of them: process 0 the first, process 1 the next.
    devices = sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))
    if fsdp < 1 or len(devices) % fsdp:
        good = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        raise ValueError(
            f"mesh.fsdp={fsdp} does not divide {len(devices)} devices "
            f"({devices[0].device_kind}); possible: {good}"
        )
    # Auto axes: with Explicit ones, the default of `jax.make_mesh`, every operation would need a sharding.
    grid = np.asarray(devices).reshape(len(devices) // fsdp, fsdp)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_rows(rows: int, mesh: Mesh) -> None:
    """Raises ValueError naming the micro-batches that would work if the mesh does not divide `rows`."""
    if rows % mesh.size:
        near = sorted({max(1, rows // mesh.size) * mesh.size, (rows // mesh.size + 1) * mesh.size})
        raise ValueError(
            f"a micro-batch of {rows} rows does not divide over {mesh.size} devices "
            f"({dict(mesh.shape)}); the nearest that do: {near}"
        )
