"""The Sana diffusion transformer (Xie et al. 2024; diffusers' `SanaTransformer2DModel`), 1.0 and 1.5.

B batch, h w latent height and width, T = h*w latent tokens, C latent channels, Q condition tokens, D model
width, N heads, H head width.

    latents -> patch_embed -> blocks -> output -> velocity
                                ^ ^
    timestep -> time_embed -----+ |
    condition -> projection, norm +

There is no position embedding: the depthwise convolution in each block is what tells the places apart.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from wemmu_jax.models.sana.config import SanaConfig
from wemmu_jax.ops.attention import Mask, attention
from wemmu_jax.ops.convolution import DepthwiseConv
from wemmu_jax.ops.heads import FromHeads, ToHeads
from wemmu_jax.ops.linear_attention import linear_attention
from wemmu_jax.ops.norms import RMSNorm, layer_norm
from wemmu_jax.ops.remat import remat, unroll

TIME_CHANNELS = 256
QK_NORM_EPS = 1e-5
CAPTION_NORM_EPS = 1e-5
OUTPUT_NORM_EPS = 1e-6


def sinusoid(timestep: jax.Array, *, channels: int, period: float = 10000.0) -> jax.Array:
    """Cosines, then sines, of the timestep at falling frequencies: float32[B] -> float32[B, channels]."""
    half = channels // 2
    # At t = 1000 an angle has a thousand times the error of its frequency: so on the host, where `exp` is exact,
    # of exponents rounded as the reference rounds them.
    exponents = np.float32(-math.log(period)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = timestep.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _table_init(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return jax.random.normal(key, shape) / shape[-1] ** 0.5


def _over_places(modulation: jax.Array) -> list[jax.Array]:
    """[B, k, D] -> k arrays [B, 1, 1, D]."""
    count = modulation.shape[1]
    return [part[:, :, None] for part in jnp.split(modulation, count, axis=1)]


def modulate(x: jax.Array, *, shift: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Layer norm, then scale and shift: x [B, h, w, D], shift and scale float32 [B, 1, 1, D] -> float32."""
    return layer_norm(x, eps=eps) * (1 + scale) + shift


class TimeEmbedding(nn.Module):
    """AdaLN-single (PixArt-alpha, section 2.3; diffusers' `AdaLayerNormSingle`). All in float32."""

    width: int

    @nn.compact
    def __call__(self, timestep: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Embeds the time once for all blocks.

        Args:
          timestep: float32[B], 0 to 1000, continuous.

        Returns:
          modulation: float32[B, 6, D], shift, scale and gate of the attention, then of the feed-forward network.
          embedded: float32[B, D], what the output layer is modulated with.
        """
        dense = functools.partial(nn.Dense, dtype=jnp.float32, precision="highest")
        x = sinusoid(timestep, channels=TIME_CHANNELS)
        x = nn.silu(dense(self.width, name="linear_1")(x))
        embedded = dense(self.width, name="linear_2")(x)
        modulation = dense(6 * self.width, name="modulation")(nn.silu(embedded))
        return modulation.reshape(-1, 6, self.width), embedded


class CaptionProjection(nn.Module):
    """Linear, tanh GELU, linear (diffusers' `PixArtAlphaTextProjection`)."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, condition: jax.Array) -> jax.Array:
        """condition [B, Q, caption width] -> [B, Q, D]."""
        x = nn.Dense(self.width, dtype=self.dtype, name="linear_1")(condition)
        return nn.Dense(self.width, dtype=self.dtype, name="linear_2")(nn.gelu(x, approximate=True))


def _project(config: SanaConfig, name: str, x: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    """The linear layer `{name}_proj` and, for queries and keys of Sana 1.5, the norm `{name}_norm` over all heads."""
    x = nn.Dense(config.width, use_bias=False, dtype=dtype, name=f"{name}_proj")(x)
    if config.qk_norm and name != "v":
        x = RMSNorm(eps=QK_NORM_EPS, dtype=dtype, name=f"{name}_norm")(x)
    return checkpoint_name(x, name)


class LinearAttention(nn.Module):
    """ReLU linear self-attention (Sana, section 2.2; diffusers' `SanaLinearAttnProcessor2_0`).

    softmax(q k^T) v becomes relu(q) (relu(k)^T v) / (relu(q) relu(k)^T 1). Projections run in `dtype`.
    """

    config: SanaConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, h, w, D] -> [B, h, w, D] in `dtype`."""
        config = self.config
        query, key, value = (
            _project(config, name, x, dtype=self.dtype).reshape(x.shape[0], -1, config.width)
            for name in "qkv"
        )
        width = config.attention_head_dim
        mixed = linear_attention(nn.relu(query), nn.relu(key), value, width)
        mixed = checkpoint_name(mixed.astype(self.dtype), "attended")
        out = nn.Dense(config.width, dtype=self.dtype, name="o_proj")
        return checkpoint_name(out(mixed.reshape(x.shape)), "out")


class CrossAttention(nn.Module):
    """Softmax attention of the latents over the condition (diffusers' `SanaAttnProcessor2_0`)."""

    config: SanaConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array, mask: Mask) -> jax.Array:
        """x [B, h, w, D], condition [B / n, Q, D], mask over Q keys -> [B, h, w, D] in `dtype`."""
        places = x.reshape(condition.shape[0], -1, x.shape[-1])
        query, key, value = (
            self._heads(name, source)
            for name, source in (("q", places), ("k", condition), ("v", condition))
        )
        mixed = attention(query, key, value, mask=mask)
        out = FromHeads(self.config.width, use_bias=True, dtype=self.dtype, name="o_proj")(mixed)
        return checkpoint_name(out.reshape(x.shape), "out")

    def _heads(self, name: str, source: jax.Array) -> jax.Array:
        """[B, S, D] -> [B, S, N, H], the norm of `_project` over all heads."""
        config = self.config
        sizes = (config.num_cross_attention_heads, config.cross_attention_head_dim)
        x = ToHeads(*sizes, dtype=self.dtype, name=f"{name}_proj")(source)
        if config.qk_norm and name != "v":
            x = RMSNorm(eps=QK_NORM_EPS, axes=2, dtype=self.dtype, name=f"{name}_norm")(x)
        return checkpoint_name(x, name)


class MixFFN(nn.Module):
    """Gated feed-forward network around a depthwise 3x3 convolution (Sana, section 2.2; diffusers' `GLUMBConv`)."""

    config: SanaConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, h, w, D] -> [B, h, w, D] in `dtype`."""
        width, hidden = self.config.width, self.config.ffn_width
        x = nn.Dense(2 * hidden, dtype=self.dtype, name="expand")(x)
        x = nn.silu(checkpoint_name(x, "up"))
        x = DepthwiseConv(kernel_size=3, use_bias=True, dtype=self.dtype, name="depthwise")(x)
        x, gate = jnp.split(x, 2, axis=-1)
        x = x * nn.silu(gate)
        return nn.Dense(width, use_bias=False, dtype=self.dtype, name="contract")(x)


class Block(nn.Module):
    """One layer: gated self-attention, plain cross-attention, gated feed-forward network.

    The cross-attention is neither normed nor modulated (diffusers' `SanaTransformerBlock`).
    """

    config: SanaConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, condition: jax.Array, mask: Mask, modulation: jax.Array
    ) -> tuple[jax.Array, None]:
        """One step of the scan over layers.

        Args:
          x: [B, h, w, D].
          condition: [B / n, Q, D], projected and normed.
          mask: over the Q condition tokens; hides padding.
          modulation: float32[B, 6, D] of `TimeEmbedding`.

        Returns:
          [B, h, w, D] in `dtype`, and None, because the scan collects nothing.
        """
        config, dtype = self.config, self.dtype
        x = checkpoint_name(x, "input")
        table = self.param("modulation_table", _table_init, (6, config.width))
        shift_attention, scale_attention, gate_attention, shift_ffn, scale_ffn, gate_ffn = (
            _over_places(modulation + table)
        )
        y = modulate(x, shift=shift_attention, scale=scale_attention, eps=config.norm_eps)
        y = LinearAttention(config, dtype, name="self_attention")(y.astype(dtype))
        x = (x + gate_attention * y).astype(dtype)
        x = x + CrossAttention(config, dtype, name="cross_attention")(x, condition, mask)
        y = modulate(x, shift=shift_ffn, scale=scale_ffn, eps=config.norm_eps)
        y = MixFFN(config, dtype, name="ffn")(y.astype(dtype))
        return (x + gate_ffn * y).astype(dtype), None


class OutputLayer(nn.Module):
    """Modulated norm and the projection to C channels (diffusers' `SanaModulatedNorm` and `proj_out`).

    In float32: it costs next to nothing, and its result goes to the loss or the solver, which are float32.
    """

    channels: int

    @nn.compact
    def __call__(self, x: jax.Array, embedded_time: jax.Array) -> jax.Array:
        """x [B, h, w, D], embedded_time float32[B, D] -> float32[B, h, w, C]."""
        table = self.param("modulation_table", _table_init, (2, x.shape[-1]))
        shift, scale = _over_places(embedded_time[:, None] + table)
        x = modulate(x, shift=shift, scale=scale, eps=OUTPUT_NORM_EPS)
        return nn.Dense(self.channels, dtype=jnp.float32, precision="highest", name="projection")(x)


class SanaTransformer(nn.Module):
    """The whole transformer (diffusers' `SanaTransformer2DModel`).

    Attributes:
      config: sizes and version.
      dtype: compute type of the projections and of the stream between the blocks.
      remat: policy of recomputation in the backward pass, a name in `ops.remat`.
    """

    config: SanaConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        latents: jax.Array,
        timestep: jax.Array,
        condition: jax.Array,
        condition_valid: jax.Array,
    ) -> jax.Array:
        """Velocity of the flow, noise minus picture.

        Args:
          latents: [B, h, w, C], noisy.
          timestep: float32[B], 1000 sigma, 0 to 1000, continuous.
          condition: [B / n, Q, caption width]; each row is of n pictures side by side, as when several draws of noise
            are made of one sample.
          condition_valid: bool[B / n, Q], False where the condition is padding.

        Returns:
          float32[B, h, w, C].
        """
        config, dtype = self.config, self.dtype
        modulation, embedded_time = TimeEmbedding(config.width, name="time_embed")(timestep)
        condition = CaptionProjection(config.width, dtype, name="caption_projection")(condition)
        condition = RMSNorm(CAPTION_NORM_EPS, dtype=dtype, name="caption_norm")(condition)
        mask = Mask(condition_valid)

        x = nn.Dense(config.width, dtype=dtype, name="patch_embed")(latents)
        blocks = nn.scan(
            remat(Block, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=config.num_layers,
            unroll=unroll(self.remat, config.num_layers),
        )
        x, _ = blocks(config, dtype, name="blocks")(x, condition, mask, modulation)
        return OutputLayer(config.out_channels, name="output")(x, embedded_time)
