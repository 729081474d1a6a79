"""Where arrays lie on the mesh."""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

SMALL = 2**16  # values; below this a leaf is copied to every device


def parameter_spec(path: str, shape: tuple[int, ...], *, fsdp: int) -> PartitionSpec:
    """A leaf is cut along its longest axis that `fsdp` divides, never along the layers of a scanned stack.

    Args:
      path: the leaf's path; kernels of stacks have one axis more than those of single layers.
      shape: its shape.
      fsdp: size of the mesh axis.
    """
    size = 1
    for side in shape:
        size *= side
    stacked = "layers/" in path or "blocks/" in path
    axes = [a for a in range(int(stacked), len(shape)) if shape[a] % fsdp == 0]
    if fsdp == 1 or size < SMALL or not axes:
        return PartitionSpec()
    longest = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*[None] * longest, "fsdp")


def parameter_shardings(tree, mesh: Mesh):
    """A NamedSharding for every leaf of a tree of parameters, optimizer state or their abstract values."""

    def one(path, leaf) -> NamedSharding:
        names = "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path)
        return NamedSharding(mesh, parameter_spec(names, leaf.shape, fsdp=mesh.shape["fsdp"]))

    return jax.tree_util.tree_map_with_path(one, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def rows_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Rows of a batch over all devices; they lie along `axis`."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, ("data", "fsdp")))
