"""The VAE branch: DC-AE features of a source picture as tokens (paper, 3.2, 4.3.2 and A.2).

B batch, S source tokens, D width, C latent channels, N heads, H head width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from wemmu_jax.models.wemmu.config import Connector
from wemmu_jax.models.wemmu.position_mlp import centre_crop
from wemmu_jax.ops.attention import attention


class SimpleViTLayer(nn.Module):
    """A pre-norm transformer layer with full attention and a GELU MLP of four times the width."""

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, _=None) -> tuple[jax.Array, None]:
        """x [B, S, D] -> ([B, S, D], None), the form of a scan's body."""
        width = x.shape[-1]

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name=name)

        def dense(features: int, name: str) -> nn.Dense:
            # A bias of the keys would shift all scores of a query alike, which softmax does not feel.
            return nn.Dense(features, use_bias=name != "k_proj", dtype=self.dtype, name=name)

        h = norm("attention_norm")(x)
        q, k, v = (
            dense(width, name)(h).reshape(*h.shape[:-1], self.heads, -1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        x = x + dense(width, "o_proj")(attention(q, k, v).reshape(x.shape))
        h = nn.gelu(dense(4 * width, "up_proj")(norm("mlp_norm")(x)), approximate=False)
        return x + dense(width, "down_proj")(h), None


class VAEBranch(nn.Module):
    """One linear layer, or the Simple ViT of A.2: projection, cropped table, layers, output linear."""

    connector: Connector
    width: int
    heads: int
    max_grid: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, latents: jax.Array) -> jax.Array:
        """latents float32[B, gh, gw, C] -> tokens [B, S, D] in raster order."""
        grid = latents.shape[1:3]
        x = latents.reshape(latents.shape[0], -1, latents.shape[-1])
        x = nn.Dense(self.width, dtype=self.dtype, name="input_proj")(x)
        if self.connector is Connector.LINEAR:
            return x
        table = self.param(
            "table", nn.initializers.normal(0.02), (self.max_grid, self.max_grid, self.width)
        )
        x = (x + centre_crop(table, grid).reshape(-1, self.width)).astype(self.dtype)
        layers = nn.scan(
            SimpleViTLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.connector.depth,
        )
        x, _ = layers(self.heads, self.dtype, name="layers")(x, None)
        return nn.Dense(self.width, dtype=self.dtype, name="output_proj")(x)


def distillation_loss(tokens: jax.Array, features: jax.Array, valid: jax.Array) -> jax.Array:
    """1 - cosine between connector tokens and the ViT's features, mean over the valid tokens of each row.

    Args:
      tokens: [B, S, D].
      features: [B, S, D], of the teacher, which does not learn from it.
      valid: bool[B, S].

    Returns:
      float32[B].
    """
    tokens = tokens.astype(jnp.float32)
    features = jax.lax.stop_gradient(features).astype(jnp.float32)

    def unit(x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)

    cosine = jnp.sum(unit(tokens) * unit(features), axis=-1)
    return jnp.sum((1 - cosine) * valid, axis=1) / jnp.maximum(jnp.sum(valid, axis=1), 1)
