"""Norms, computed in float32 whatever the compute type. D model width."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a learned scale [D] and, if asked for, a bias [D].

    Attributes:
      eps: added to the mean of squares.
      use_bias: whether there is a bias.
      axes: how many of the last axes hold the D values: 2 for [N, H].
      dtype: of the result.
    """

    eps: float
    use_bias: bool = False
    axes: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> [..., D] in `dtype`."""
        own, axes = x.shape[-self.axes :], tuple(range(-self.axes, 0))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True) + self.eps)
        x = x * self._vector("scale", nn.initializers.ones_init(), own)
        if self.use_bias:
            x = x + self._vector("bias", nn.initializers.zeros_init(), own)
        return x.astype(self.dtype)

    def _vector(self, name: str, init: nn.initializers.Initializer, own: Sequence[int]):
        return self.param(name, init, (math.prod(own),)).astype(jnp.float32).reshape(own)


def layer_norm(x: jax.Array, *, eps: float) -> jax.Array:
    """Layer norm over the last axis without parameters, [..., D] -> float32 [..., D]."""
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
