"""Linear attention, in time linear in the number of places. B batch, S places, N heads, H head width, C = N * H."""

import jax
import jax.numpy as jnp
import numpy as np

from wemmu_jax.ops.axes import LANES, current_platform, heads_are_cut

_EPS = 1e-15


def linear_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, head_dim: int
) -> jax.Array:
    """Attention with weights q.k / (sum of q.k): keys and values are summed up before a query meets them.

    diffusers' `SanaLinearAttnProcessor2_0` and `SanaMultiscaleLinearAttention.apply_linear_attention`. Products are
    float32: they are sums over all places.

    Args:
      query, key: [B, S, C], not negative; the heads side by side.
      value: [B, S, C].
      head_dim: H.

    Returns:
      float32[B, S, C].
    """
    if current_platform() == "tpu" and LANES % head_dim == 0 and not heads_are_cut():
        cuts = np.arange(LANES, query.shape[-1], LANES)
        cut = (jnp.split(x, cuts, axis=-1) for x in (query, key, value))
        mixed = [_in_lanes(*run, head_dim) for run in zip(*cut, strict=True)]
        return jnp.concatenate(mixed, axis=-1)
    query, key, value = (_heads_first(x, head_dim) for x in (query, key, value))
    memory = jnp.einsum("bnsk,bnsv->bnkv", key, value, precision="highest")
    mixed = jnp.einsum("bnsk,bnkv->bnsv", query, memory, precision="highest")
    total = jnp.einsum("bnsk,bnk->bns", query, key.sum(axis=2), precision="highest")
    return _heads_last(mixed / (total[..., None] + _EPS))


def quadratic_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, head_dim: int
) -> jax.Array:
    """The same weights as `linear_attention`, formed one by one: cheaper where S <= H."""
    query, key, value = (_heads_first(x, head_dim) for x in (query, key, value))
    scores = jnp.einsum("bnth,bnsh->bnts", query, key, precision="highest")
    weights = scores / (scores.sum(axis=-1, keepdims=True) + _EPS)
    return _heads_last(jnp.einsum("bnts,bnsh->bnth", weights, value, precision="highest"))


def _in_lanes(query: jax.Array, key: jax.Array, value: jax.Array, head_dim: int) -> jax.Array:
    """The same for so few heads that a TPU's vectors hold them side by side: to multiply what one head says of another
    by zero takes less time than to bring each to a place of its own."""
    count = query.shape[-1] // head_dim
    same = np.kron(np.eye(count), np.ones((head_dim, head_dim))).astype(np.float32)
    exact = {"precision": "highest", "preferred_element_type": jnp.float32}
    memory = same * jnp.einsum("bsk,bsv->bkv", key, value, **exact)
    keys = same * jnp.sum(key, axis=1, dtype=jnp.float32)[..., None]
    query = query.astype(jnp.float32)
    both = jnp.einsum("bsk,bkv->bsv", query, jnp.concatenate([memory, keys], axis=-1), **exact)
    mixed, total = jnp.split(both, 2, axis=-1)
    return mixed / (total + _EPS)


def _heads_first(x: jax.Array, head_dim: int) -> jax.Array:
    """[B, S, N * H] -> float32[B, N, S, H], as products want them: XLA on a CPU would bring them there for each."""
    return x.astype(jnp.float32).reshape(*x.shape[:2], -1, head_dim).swapaxes(1, 2)


def _heads_last(x: jax.Array) -> jax.Array:
    """[B, N, S, H] -> [B, S, N * H]."""
    x = x.swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1)
