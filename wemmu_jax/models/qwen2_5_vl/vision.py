"""The vision transformer of Qwen2.5-VL (Qwen2.5-VL report, section 2.1; `Qwen2_5_VisionTransformerPretrainedModel`).

Axes: B pictures, W slots, P patches of a slot, S merged tokens, D width, N heads, H head width. How pictures lie
in slots is told in `images.py`.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from wemmu_jax.models.qwen2_5_vl import vision_lanes
from wemmu_jax.models.qwen2_5_vl.config import VISION_RMS_NORM_EPS, VISION_ROPE_THETA, VisionConfig
from wemmu_jax.models.qwen2_5_vl.images import PackedImages
from wemmu_jax.ops.attention import Mask, attention
from wemmu_jax.ops.norms import RMSNorm
from wemmu_jax.ops.remat import remat, unroll
from wemmu_jax.ops.rotary import inverse_frequencies, rotate

Rotation = tuple[jax.Array, jax.Array]  # cos and sin of the angles


def vision_angles(positions: jax.Array, *, head_width: int) -> jax.Array:
    """Rotary angles in two dimensions: the first half of the frequencies turns by the row, the second by the column.

    Args:
      positions: int32[..., 2], row and column of each patch.
      head_width: H.

    Returns:
      float32[..., H/2].
    """
    frequencies = inverse_frequencies(head_width // 2, theta=VISION_ROPE_THETA)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return angles.reshape(*positions.shape[:-1], head_width // 2)


def vision_rotation(positions: jax.Array, config: VisionConfig) -> Rotation:
    """Of patches at int32[..., 2]: float32[..., H/2] each, or, for heads side by side, [..., N * H/2]."""
    angles = vision_angles(positions, head_width=config.head_dim)
    rotation = jnp.cos(angles), jnp.sin(angles)
    if not vision_lanes.lies_in_lanes(config):
        return rotation
    # XLA would repeat them anew in each layer, which takes a seventh of the ViT's time on a v5p, by its estimate.
    return jax.lax.optimization_barrier(tuple(jnp.tile(x, config.num_heads) for x in rotation))


def window_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array
) -> jax.Array:
    """Each patch sees its own window. Arrays [B, W, P, N, H], segments [B, W, P] -> [B, W, P, N, H]."""
    slots = (-1, *query.shape[2:])
    segments = segments.reshape(-1, segments.shape[-1])
    # Padding carries -1 and sees the other padding, so that no softmax runs over nothing.
    mask = Mask(segments, query=segments)
    out = attention(query.reshape(slots), key.reshape(slots), value.reshape(slots), mask=mask)
    return out.reshape(query.shape)


def full_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array
) -> jax.Array:
    """Each patch sees its whole picture. Arrays [B, W, P, N, H], segments [B, W, P] -> [B, W, P, N, H]."""
    pictures = (query.shape[0], -1, *query.shape[3:])
    mask = Mask((segments >= 0).reshape(query.shape[0], -1))
    out = attention(
        query.reshape(pictures), key.reshape(pictures), value.reshape(pictures), mask=mask
    )
    return out.reshape(query.shape)


class _Projection(nn.Module):
    """Kernel and bias of a linear layer, which somebody else computes."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, width: int) -> tuple[jax.Array, jax.Array]:
        init = nn.initializers
        kernel = self.param("kernel", init.lecun_normal(), (width, self.features))
        bias = self.param("bias", init.zeros, (self.features,))
        return kernel.astype(self.dtype), bias.astype(self.dtype)


class VisionAttention(nn.Module):
    """Attention inside windows or over the picture, chosen at run time, so that one scan holds both kinds."""

    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, is_full: jax.Array, rotation: Rotation, segments: jax.Array
    ) -> jax.Array:
        """x [B, W, P, D], is_full bool[], rotation of `vision_rotation`, segments int32[B, W, P] -> [B, W, P, D]."""
        attend = self._in_lanes if vision_lanes.lies_in_lanes(self.config) else self._by_heads
        mixed = attend(x, is_full, rotation, segments)
        return nn.Dense(self.config.hidden_size, dtype=self.dtype, name="proj")(mixed)

    def _by_heads(self, x, is_full, rotation: Rotation, segments) -> jax.Array:
        qkv = nn.Dense(3 * x.shape[-1], dtype=self.dtype, name="qkv")(x)
        qkv = qkv.reshape(*x.shape[:-1], 3, self.config.num_heads, self.config.head_dim)
        query, key, value = (qkv[..., i, :, :] for i in range(3))
        query, key = rotate(query, *rotation), rotate(key, *rotation)
        arrays = (query, key, value, segments)
        return jax.lax.cond(is_full, full_attention, window_attention, *arrays).reshape(x.shape)

    def _in_lanes(self, x, is_full, rotation: Rotation, segments) -> jax.Array:
        heads, width = self.config.num_heads, x.shape[-1]
        kernel, bias = _Projection(3 * width, self.dtype, name="qkv")(width)
        arrays = vision_lanes.project(x.astype(self.dtype), kernel, bias, rotation, heads)

        def full(query, key, value, segments) -> jax.Array:
            value = value.reshape(*x.shape[:-1], heads, -1)
            query, key = query.by_heads(heads), key.by_heads(heads)
            return full_attention(query, key, value, segments).reshape(x.shape)

        windows = functools.partial(vision_lanes.window_attention, heads=heads)
        return jax.lax.cond(is_full, full, windows, *arrays, segments)


class VisionMLP(nn.Module):
    """SwiGLU with biases, [..., D] -> [..., D]."""

    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = self.config.intermediate_size
        gate = nn.silu(nn.Dense(hidden, dtype=self.dtype, name="gate_proj")(x))
        up = nn.Dense(hidden, dtype=self.dtype, name="up_proj")(x)
        return nn.Dense(self.config.hidden_size, dtype=self.dtype, name="down_proj")(gate * up)


class VisionLayer(nn.Module):
    """One pre-norm layer; the body of the scan (`Qwen2_5_VLVisionBlock`)."""

    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, is_full: jax.Array, rotation: Rotation, segments: jax.Array
    ) -> tuple[jax.Array, None]:
        """x [B, W, P, D] -> ([B, W, P, D], None); the other arguments as in `VisionAttention`."""
        normed = RMSNorm(VISION_RMS_NORM_EPS, dtype=self.dtype, name="norm1")(x)
        attend = VisionAttention(self.config, self.dtype, name="attention")
        x = x + attend(normed, is_full, rotation, segments)
        normed = RMSNorm(VISION_RMS_NORM_EPS, dtype=self.dtype, name="norm2")(x)
        return x + VisionMLP(self.config, self.dtype, name="mlp")(normed), None


class PatchMerger(nn.Module):
    """Joins each block of merge x merge patches into one token (`Qwen2_5_VLPatchMerger`)."""

    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, W, P, D] -> [B, W * P / merge**2, out_hidden_size]."""
        merged = self.config.spatial_merge_size**2 * self.config.hidden_size
        x = RMSNorm(VISION_RMS_NORM_EPS, dtype=self.dtype, name="norm")(x)
        x = x.reshape(x.shape[0], -1, merged)
        x = nn.gelu(nn.Dense(merged, dtype=self.dtype, name="hidden")(x), approximate=False)
        return nn.Dense(self.config.out_hidden_size, dtype=self.dtype, name="out")(x)


class VisionTransformer(nn.Module):
    """Pictures to the tokens that the language model reads.

    Attributes:
      config: sizes.
      dtype: compute type.
      remat: name of a policy of `ops.remat`, for the layers.
    """

    config: VisionConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, images: PackedImages) -> jax.Array:
        """Returns [B, S, out_hidden_size] in `dtype`: merged tokens in raster order. Rows past a picture's own
        tokens are finite and mean nothing."""
        config = self.config
        x = nn.Dense(config.hidden_size, use_bias=False, dtype=self.dtype, name="patch_embed")(
            images.patches
        )
        rotation = vision_rotation(images.positions, config)
        is_full = jnp.isin(jnp.arange(config.depth), jnp.array(config.fullatt_block_indexes, int))
        layers = nn.scan(
            remat(VisionLayer, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=config.depth,
            unroll=unroll(self.remat, config.depth),
        )
        x, _ = layers(config, self.dtype, name="layers")(x, is_full, rotation, images.segments)
        tokens = PatchMerger(config, self.dtype, name="merger")(x)
        return jnp.take_along_axis(tokens, images.order[..., None], axis=1)
