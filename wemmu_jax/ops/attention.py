"""The one attention function of the project. B batch, T own tokens, S keys, N heads, K key heads, H head width."""

import enum

import jax
import jax.numpy as jnp

from wemmu_jax.ops.xla_attention import xla_attention


class AttentionBackend(enum.Enum):
    """Which kernel computes attention. All give the same numbers up to rounding."""

    XLA = "xla"


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    scale: float | None = None,
    backend: AttentionBackend = AttentionBackend.XLA,
) -> jax.Array:
    """Scaled dot-product attention with grouped heads; softmax in float32.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H] with N a multiple of K; head n reads key head n // (N // K).
      value: [B, S, K, H].
      mask: bool, broadcastable to [B, N, T, S]; False hides a key. A query that sees no key gets
        finite values that mean nothing (padding).
      scale: factor on the scores, 1/sqrt(H) by default.
      backend: which kernel.

    Returns:
      [B, T, N, H] in the dtype of `query`.
    """
    del backend  # one kernel so far
    return xla_attention(query, key, value, mask=mask, scale=scale)


def prefix_causal_mask(valid: jax.Array, *, own: int) -> jax.Array:
    """Mask of `own` causal tokens that follow a prefix which all of them see.

    Args:
      valid: bool[B, S], False where a key is padding; the last `own` of the S keys are the queries' own.
      own: T, the number of queries.

    Returns:
      bool[B, 1, T, S].
    """
    prefix = valid.shape[1] - own
    key_place = jnp.arange(valid.shape[1])
    sees = key_place[None, :] <= prefix + jnp.arange(own)[:, None]
    return sees[None, None] & valid[:, None, None, :]
