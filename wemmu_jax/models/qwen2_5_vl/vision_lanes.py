"""The vision transformer's attention with its heads side by side in a TPU's lanes.

A head has 80 channels, so that one in a place of its own leaves 48 of 128 lanes empty, and its halves, which rotary
positions turn, begin in the middle of a vector. Here the first halves of all heads lie together and then the second
ones, by an order of the projection's channels: 640 lanes each. A head is told from the others by zeros. The products
that multiply by them are few, because windows are small; to bring each head to its place takes longer.

Axes: B pictures, W slots, P patches of a slot, D width, N heads, H head width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from wemmu_jax.models.qwen2_5_vl.config import VisionConfig
from wemmu_jax.ops.axes import LANES, current_platform, heads_are_cut
from wemmu_jax.ops.rotary import turn


class Halves(NamedTuple):
    """What is turned: the first halves of all heads and the second ones, [B, W, P, N * H / 2] each."""

    first: jax.Array
    second: jax.Array

    def by_heads(self, heads: int) -> jax.Array:
        """[B, W, P, N, H]."""
        split = [half.reshape(*half.shape[:-1], heads, -1) for half in self]
        return jnp.concatenate(split, axis=-1)


def lies_in_lanes(config: VisionConfig) -> bool:
    """Whether the current platform gains by it, and the halves fill whole vectors."""
    halves = config.hidden_size // 2
    return current_platform() == "tpu" and halves % LANES == 0 and not heads_are_cut()


def project(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, rotation: Sequence[jax.Array], heads: int
) -> tuple[Halves, Halves, jax.Array]:
    """Queries and keys, turned, and values.

    Args:
      x: [B, W, P, D].
      kernel, bias: [D, 3 * D] and [3 * D], in the order of the reference.
      rotation: cos and sin, float32[B, W, P, N * H / 2] each.
      heads: N.

    Returns:
      Queries, keys, and values [B, W, P, D], in the dtype of `x`.
    """
    width = x.shape[-1]
    # The values by a product of their own: cut out of one of all three, they would be copied.
    joint = x @ _in_order(kernel[:, : 2 * width], heads) + _in_order(bias[: 2 * width], heads)
    value = x @ kernel[:, 2 * width :] + bias[2 * width :]
    # Cut, and then in float32: the other way round the whole would be written in float32.
    cut = [half.astype(jnp.float32) for half in jnp.split(joint, 4, axis=-1)]
    query, key = (
        Halves(*(half.astype(x.dtype) for half in turn(*cut[i : i + 2], *rotation))) for i in (0, 2)
    )
    return query, key, value


def window_attention(
    query: Halves, key: Halves, value: jax.Array, segments: jax.Array, heads: int
) -> jax.Array:
    """Each patch sees its own window. Values [B, W, P, D], segments int32[B, W, P] -> [B, W, P, D]."""
    width = value.shape[-1]
    exact = {"preferred_element_type": jnp.float32}
    scores = sum(
        jnp.einsum("bwtc,bwnsc->bwtns", own, _each(other, heads), **exact)
        for own, other in zip(query, key, strict=True)
    )
    seen = segments[:, :, :, None, None] == segments[:, :, None, None, :]
    scores = jnp.where(seen, scores * (width // heads) ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("bwtns,bwnsc->bwtc", weights, _each(value, heads), **exact)
    return checkpoint_name(mixed.astype(value.dtype), "attended")


def _in_order(projection: jax.Array, heads: int) -> jax.Array:
    """[..., 2 * N * H], heads of queries and keys as halves: [..., 2 * (N * H/2 + N * H/2)]."""
    split = projection.reshape(*projection.shape[:-1], 2, heads, 2, -1)
    return split.swapaxes(-3, -2).reshape(projection.shape)


def _each(x: jax.Array, heads: int) -> jax.Array:
    """[B, W, P, C] -> [B, W, N, P, C], all but a head's own channels zero."""
    own = np.repeat(np.eye(heads), x.shape[-1] // heads, axis=-1)
    return x[:, :, None] * jnp.asarray(own[:, None], x.dtype)
