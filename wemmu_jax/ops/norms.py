"""Norms, computed in float32 whatever the compute type. D model width."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a learned scale [D] and, if asked for, a bias [D]."""

    eps: float
    use_bias: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> [..., D] in `dtype`."""
        width = x.shape[-1]
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        x = x * self.param("scale", nn.initializers.ones_init(), (width,)).astype(jnp.float32)
        if self.use_bias:
            x = x + self.param("bias", nn.initializers.zeros_init(), (width,)).astype(jnp.float32)
        return x.astype(self.dtype)


def layer_norm(x: jax.Array, *, eps: float) -> jax.Array:
    """Layer norm over the last axis without parameters, [..., D] -> float32 [..., D]."""
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
