"""Rotary positions, in float32 throughout: bfloat16 rounds position 257 to 256. H head width."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def inverse_frequencies(width: int, *, theta: float) -> jax.Array:
    """float32[width / 2]: theta ** (-2 i / width)."""
    return theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)


def multimodal_angles(
    position_ids: jax.Array, *, head_width: int, sections: Sequence[int], theta: float
) -> jax.Array:
    """M-RoPE angles (Qwen2-VL, section 2.1): each frequency turns by one of three coordinates.

    Args:
      position_ids: int32[3, B, T]: time, row and column of each token.
      head_width: H.
      sections: how many of the H/2 frequencies follow time, row and column; they add up to H/2.
      theta: rotary base.

    Returns:
      float32[B, T, H/2].
    """
    if sum(sections) != head_width // 2:
        raise ValueError(f"M-RoPE sections {tuple(sections)} must add up to {head_width // 2}")
    angles = position_ids[..., None].astype(jnp.float32) * inverse_frequencies(
        head_width, theta=theta
    )
    starts = [0]
    for section in sections:
        starts.append(starts[-1] + section)
    return jnp.concatenate(
        [angles[axis, ..., starts[axis] : starts[axis + 1]] for axis in range(3)], axis=-1
    )


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (i, i + H/2) of each head.

    Args:
      x: [..., N, H].
      cos, sin: float32[..., H/2], of the angles.

    Returns:
      [..., N, H] in the dtype of `x`.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = turn(first, second, cos[..., None, :], sin[..., None, :])
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def turn(
    first: jax.Array, second: jax.Array, cos: jax.Array, sin: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The two halves of what is turned; all float32."""
    return first * cos - second * sin, second * cos + first * sin
