"""The blocks of DC-AE (arXiv 2410.10733).

B batch, h w height and width, S = h*w places, C channels, N heads, H head width. Every block maps [B, h, w, C] to
[B, h, w, C] in `dtype`; `Down` and `Up` change h, w and C.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from wemmu_jax.ops.axes import current_platform
from wemmu_jax.ops.convolution import DepthwiseConv
from wemmu_jax.ops.norms import RMSNorm

NORM_EPS = 1e-5  # the same in every published DC-AE; it is in no config
_DIVISION_EPS = 1e-15
_EXPANSION = 4  # of the gated convolution
LANES = 128  # of a TPU's vectors


def average_groups(x: jax.Array, channels: int) -> jax.Array:
    """The shortcut where channels become fewer: means of neighbours, [..., n * channels] -> [..., channels]."""
    return x.reshape(*x.shape[:-1], channels, -1).mean(axis=-1)


def repeat_channels(x: jax.Array, channels: int) -> jax.Array:
    """The shortcut where channels become more: each one several times in a row, [..., C] -> [..., channels]."""
    return jnp.repeat(x, channels // x.shape[-1], axis=-1)


def space_to_depth(x: jax.Array) -> jax.Array:
    """[B, 2h, 2w, C] -> [B, h, w, 4C]; channel 4c + 2y + x holds the pixel (y, x) of each square of four."""
    batch, height, width, channels = x.shape
    squares = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return squares.transpose(0, 1, 3, 5, 2, 4).reshape(batch, height // 2, width // 2, 4 * channels)


def depth_to_space(x: jax.Array) -> jax.Array:
    """The inverse of `space_to_depth`: [B, h, w, 4C] -> [B, 2h, 2w, C]."""
    batch, height, width, channels = x.shape
    squares = x.reshape(batch, height, width, channels // 4, 2, 2)
    return squares.transpose(0, 1, 4, 2, 5, 3).reshape(batch, 2 * height, 2 * width, channels // 4)


def mean_of_squares(x: jax.Array, channels: int) -> jax.Array:
    """The shortcut of `Down`, `average_groups(space_to_depth(x), channels)`: [B, 2h, 2w, C] -> [B, h, w, channels]."""
    if current_platform() != "tpu":
        return average_groups(space_to_depth(x), channels)
    # As a convolution, because a TPU is slow where channels change places; weights of 1/n are exact.
    inputs = x.shape[-1]
    joined = np.arange(4 * inputs) // (4 * inputs // channels)  # where channel 4c + 2y + x goes
    kernel = np.zeros((inputs, 2, 2, channels))
    np.put_along_axis(kernel.reshape(4 * inputs, channels), joined[:, None], 1.0, axis=1)
    kernel = jnp.asarray(kernel.transpose(1, 2, 0, 3) * (channels / (4 * inputs)), x.dtype)
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=dims)


def linear_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention with weights q.k / sum(q.k), in time linear in S: keys and values are summed up first.

    Args:
      query, key: float32[B, S, N, H], not negative.
      value: float32[B, S, N, H].

    Returns:
      float32[B, S, N, H].
    """
    # Heads first, as products want them: XLA on a CPU would bring them there once for each product.
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    memory = jnp.einsum("bnsk,bnsv->bnkv", key, value, precision="highest")
    mixed = jnp.einsum("bnsk,bnkv->bnsv", query, memory, precision="highest")
    total = jnp.einsum("bnsk,bnk->bns", query, key.sum(axis=2), precision="highest")
    return (mixed / (total[..., None] + _DIVISION_EPS)).swapaxes(1, 2)


def quadratic_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """The same weights as `linear_attention`, formed one by one: cheaper where S <= H."""
    scores = jnp.einsum("btnh,bsnh->bnts", query, key, precision="highest")
    weights = scores / (scores.sum(axis=-1, keepdims=True) + _DIVISION_EPS)
    return jnp.einsum("bnts,bsnh->btnh", weights, value, precision="highest")


def conv3x3(
    features: int, *, stride: int = 1, use_bias: bool = True, dtype: jnp.dtype, name: str
) -> nn.Conv:
    """A 3x3 convolution with a border of zeros on every side, as PyTorch pads; `SAME` differs at stride 2."""
    return nn.Conv(
        features, (3, 3), strides=stride, padding=1, use_bias=use_bias, dtype=dtype, name=name
    )


class ResBlock(nn.Module):
    """Two 3x3 convolutions with SiLU between and a norm behind, added to the input (diffusers `ResBlock`)."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, h, w, C] -> [B, h, w, C]."""
        width = x.shape[-1]
        hidden = nn.silu(conv3x3(width, dtype=self.dtype, name="conv1")(x))
        hidden = conv3x3(width, use_bias=False, dtype=self.dtype, name="conv2")(hidden)
        return x + RMSNorm(NORM_EPS, use_bias=True, dtype=self.dtype, name="norm")(hidden)


class GroupedDense(nn.Module):
    """A linear layer of its own for each run of `group` channels (a grouped 1x1 convolution); no bias.

    On a TPU several layers make one of 128 channels, with zeros between them: products of 32 would leave its lanes
    empty, and to bring the channels there takes longer than to multiply by zeros.
    """

    group: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, h, w, C] -> [B, h, w, C]; the kernel is [group, C], the outputs of a group side by side."""
        shape = (self.group, x.shape[-1])
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape).astype(self.dtype)
        kernel = kernel.reshape(self.group, -1, self.group)
        if current_platform() == "tpu" and x.shape[-1] % LANES == 0 and LANES % self.group == 0:
            kernel = _packed(kernel, LANES // self.group)
        groups = x.reshape(*x.shape[:-1], -1, kernel.shape[0])
        return jnp.einsum("...gi,igo->...go", groups, kernel).reshape(x.shape)


def _packed(kernel: jax.Array, count: int) -> jax.Array:
    """[i, g * count, o] -> [count * i, g, count * o], blocks on the diagonal."""
    blocks = kernel.reshape(kernel.shape[0], -1, count, kernel.shape[2])
    diagonal = jnp.eye(count, dtype=kernel.dtype)[:, None, None, :, None]
    spread = blocks.transpose(2, 0, 1, 3)[:, :, :, None, :] * diagonal  # [n, i, g, m, o]
    return spread.reshape(count * kernel.shape[0], -1, count * kernel.shape[2])


class MultiscaleAttention(nn.Module):
    """ReLU linear attention over query, key and value at several scales (EfficientViT, arXiv 2205.14756).

    Each scale beyond the first is a depthwise convolution of [query | key | value] and a linear layer inside
    each run of H channels. diffusers' `SanaMultiscaleLinearAttention` cuts heads out of the joint channels: head
    n of a scale takes channels 3nH to 3(n+1)H as its query, key and value, and so do we.
    """

    head_dim: int
    kernel_sizes: Sequence[int]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, h, w, C] -> [B, h, w, C], the input included."""
        batch, height, width, channels = x.shape
        inner = channels // self.head_dim * self.head_dim
        joint = jnp.concatenate(
            [
                nn.Dense(inner, use_bias=False, dtype=self.dtype, name=name)(x)
                for name in ("query", "key", "value")
            ],
            axis=-1,
        )
        scales = [joint]
        for i, size in enumerate(self.kernel_sizes):
            blurred = DepthwiseConv(size, False, self.dtype, name=f"scale_{i}_depthwise")(joint)
            scales.append(GroupedDense(self.head_dim, self.dtype, name=f"scale_{i}_mix")(blurred))
        attend = quadratic_attention if height * width <= self.head_dim else linear_attention
        mixed = []
        for scale in scales:
            heads = scale.reshape(batch, height * width, -1, 3, self.head_dim)
            query, key, value = (heads[..., part, :] for part in range(3))
            arrays = (x.astype(jnp.float32) for x in (nn.relu(query), nn.relu(key), value))
            mixed.append(attend(*arrays).astype(self.dtype).reshape(batch, height, width, -1))
        mixed = jnp.concatenate(mixed, axis=-1)
        out = nn.Dense(channels, use_bias=False, dtype=self.dtype, name="out")(mixed)
        return x + RMSNorm(NORM_EPS, use_bias=True, dtype=self.dtype, name="norm")(out)


class GatedConv(nn.Module):
    """Widen, 3x3 depthwise convolution, gate, narrow, norm, added to the input (diffusers `GLUMBConv`)."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, h, w, C] -> [B, h, w, C]."""
        channels = x.shape[-1]
        hidden = nn.Dense(2 * _EXPANSION * channels, dtype=self.dtype, name="expand")(x)
        hidden = DepthwiseConv(3, dtype=self.dtype, name="depthwise")(nn.silu(hidden))
        hidden, gate = jnp.split(hidden, 2, axis=-1)
        gated = hidden * nn.silu(gate)
        out = nn.Dense(channels, use_bias=False, dtype=self.dtype, name="project")(gated)
        return x + RMSNorm(NORM_EPS, use_bias=True, dtype=self.dtype, name="norm")(out)


class EfficientViTBlock(nn.Module):
    """Attention over the whole picture, then a gated convolution (diffusers `EfficientViTBlock`)."""

    head_dim: int
    kernel_sizes: Sequence[int]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, h, w, C] -> [B, h, w, C]."""
        attend = MultiscaleAttention(self.head_dim, self.kernel_sizes, self.dtype, name="attention")
        return GatedConv(self.dtype, name="feed_forward")(attend(x))


class Down(nn.Module):
    """Half the resolution: a convolution with stride 2, plus means of the pixels' channels (`DCDownBlock2d`)."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, 2h, 2w, C] -> [B, h, w, features]; 4C is a multiple of `features`."""
        shortcut = mean_of_squares(x, self.features)
        return conv3x3(self.features, stride=2, dtype=self.dtype, name="conv")(x) + shortcut


class Up(nn.Module):
    """Twice the resolution: nearest pixel, then a convolution, plus channels dealt out (`DCUpBlock2d`)."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, h, w, C] -> [B, 2h, 2w, features]; 4 x `features` is a multiple of C."""
        shortcut = depth_to_space(repeat_channels(x, 4 * self.features))
        nearest = depth_to_space(repeat_channels(x, 4 * x.shape[-1]))
        return conv3x3(self.features, dtype=self.dtype, name="conv")(nearest) + shortcut
