"""Where arrays lie on the mesh: rows of a batch over all devices, large parameters over the axis `fsdp`.

A device works on its own rows alone, so every layer's weights are gathered as the layer runs, and its gradients
are scattered again. XLA has to be told so: see `rows_stay`.
"""

import contextlib

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wemmu_jax.ops.convolution import DepthwiseConv
from wemmu_jax.ops.norms import RMSNorm

# The layers whose first axis is that of the rows, in and out; all others are made of them.
_LAYERS = (nn.Dense, nn.Conv, nn.Embed, RMSNorm, DepthwiseConv)
SMALL = 2**16  # values; below this a leaf is copied to every device


def parameter_spec(path: str, shape: tuple[int, ...], *, fsdp: int) -> PartitionSpec:
    """A leaf is cut along its longest axis that `fsdp` divides, never along the layers of a scanned stack.

    Small leaves and the words' embedding, which is frozen and 0.6 GB, are on every device.

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
    # A lookup in a table that is cut would run over the whole batch on every device.
    if fsdp == 1 or size < SMALL or not axes or path.endswith("/embedding"):
        return PartitionSpec()
    longest = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*[None] * longest, "fsdp")


def parameter_shardings(tree, mesh: Mesh):
    """A NamedSharding for every leaf of a tree of parameters, optimizer state or their abstract values."""

    def one(path, leaf) -> NamedSharding:
        names = "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path)
        return NamedSharding(mesh, parameter_spec(names, leaf.shape, fsdp=mesh.shape["fsdp"]))

    return jax.tree_util.tree_map_with_path(one, tree)


def rows_stay(mesh: Mesh) -> contextlib.AbstractContextManager:
    """While it is open, what goes into and comes out of every layer is pinned to the devices of its rows.

    Left to itself, XLA's partitioner finds weights and rows cut along the same mesh axis, and now and then moves
    the activations of the whole batch to the weights instead of a layer's weights to the rows. The pins hold for
    the gradients of the activations too. Numbers do not change.
    """
    place = rows_sharding(mesh)

    def pin(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, place)

    def interceptor(call, args: tuple, kwargs: dict, context: nn.module.InterceptorContext):
        if context.method_name != "__call__" or not isinstance(context.module, _LAYERS):
            return call(*args, **kwargs)
        return pin(call(*map(pin, args), **kwargs))

    return nn.intercept_methods(interceptor)


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def rows_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Rows of a batch over all devices; they lie along `axis`."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, ("data", "fsdp")))
