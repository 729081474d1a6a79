"""Conditional and contrastive flow matching (paper, Eq. 3 and 4). B batch, C channels."""

import jax
import jax.numpy as jnp

from wemmu_jax.ops.roll import roll_rows
from wemmu_jax.rng import Stream, stream_key


def _mean_square(x: jax.Array) -> jax.Array:
    """Mean over all axes but the first, in float32."""
    return jnp.mean(jnp.square(x.astype(jnp.float32)), axis=tuple(range(1, x.ndim)))


def flow_matching(velocity: jax.Array, target: jax.Array) -> jax.Array:
    """Eq. 3 for each row: velocity and target [B, h, w, C] -> float32[B]."""
    return _mean_square(velocity - target)


def contrastive_flow_matching(
    velocity: jax.Array,
    target: jax.Array,
    negative: jax.Array,
    *,
    contrasted: jax.Array,
    weight: float,
) -> jax.Array:
    """Eq. 4 for each row: ||v - v+||^2 - lambda ||v - v-||^2.

    Its minimiser is (v+ - lambda mean v-) / (1 - lambda): samples of stage 1 carry that bias.

    Args:
      velocity: [B, h, w, C].
      target: v+ of each row.
      negative: v- of each row, whole targets of other rows.
      contrasted: bool[B]; rows where it is False take plain flow matching.
      weight: lambda.

    Returns:
      float32[B].
    """
    repulsion = jnp.where(contrasted, _mean_square(velocity - negative), 0.0)
    return _mean_square(velocity - target) - weight * repulsion


def partners(seed: int | jax.Array, micro_batch: jax.Array, rows: int) -> jax.Array:
    """int32[]: s in 1..B-1; row i takes its negative from row (i + s) mod B, so never from itself.

    Raises:
      ValueError: a micro-batch of one row has no negatives.
    """
    if rows < 2:
        raise ValueError(
            f"contrastive flow matching needs at least 2 rows a micro-batch, found {rows}"
        )
    key = jax.random.fold_in(stream_key(seed, Stream.NEGATIVES), micro_batch)
    return jax.random.randint(key, (), 1, rows)


def negatives(
    target: jax.Array, picture_ids: jax.Array, unconditional: jax.Array, step: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The negative of each row, and which rows have one.

    Args:
      target: v+ [B, h, w, C] of the micro-batch over all devices.
      picture_ids: uint32[B], equal where two rows draw the same picture.
      unconditional: bool[B], rows that take plain flow matching.
      step: s of `partners`.

    Returns:
      v- [B, h, w, C] and `contrasted` bool[B].
    """
    other = roll_rows(picture_ids, step)
    return roll_rows(target, step), (picture_ids != other) & ~unconditional
