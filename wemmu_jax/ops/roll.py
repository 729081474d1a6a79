"""Rows of a batch that change places, from device to device of the mesh. B rows."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from wemmu_jax.ops.axes import ROWS, TOKENS, current_mesh


def roll_rows(x: jax.Array, by: int | jax.Array) -> jax.Array:
    """`jnp.roll(x, -by, axis=0)` for a `by` that only the running program knows.

    On a mesh (see `sharding.rules.placed`) with n devices along the rows, which must divide B, each hands on as many
    rows as it has: ceil(log2 n) times, and if that is more than one row, once more. No device sees all of them.

    Args:
      x: [B, ...].
      by: 0..B-1; row i of the result is row (i + by) mod B.

    Returns:
      [B, ...], the same numbers on any mesh.
    """
    mesh = current_mesh()
    shards = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)
    if shards == 1:
        return jnp.roll(x, -by, axis=0)
    own = len(x) // shards  # rows of a device

    def from_device(x: jax.Array, ahead: int) -> jax.Array:
        pairs = [((to + ahead) % shards, to) for to in range(shards)]
        return jax.lax.ppermute(x, ROWS, pairs)

    def local(x: jax.Array, by: jax.Array) -> jax.Array:
        devices, rows = by // own, by % own
        # The rows of the device that is `devices` ahead, by the bits of that number.
        for bit in range((shards - 1).bit_length()):
            moved = from_device(x, 2**bit)
            x = jnp.where((devices >> bit) & 1, moved, x)
        if own == 1:
            return x
        both = jnp.concatenate([x, from_device(x, 1)])
        return jax.lax.dynamic_slice_in_dim(both, rows, own)

    # Pictures are cut as `placed` cuts what a layer makes of them.
    cut = x.ndim > 2 and x.shape[1] % mesh.shape[TOKENS] == 0
    spec = PartitionSpec(ROWS, TOKENS) if cut else PartitionSpec(ROWS)
    spread = jax.shard_map(local, in_specs=(spec, PartitionSpec()), out_specs=spec)
    return spread(x, jnp.asarray(by, jnp.int32))
