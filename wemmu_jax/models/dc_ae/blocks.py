"""The blocks of DC-AE (arXiv 2410.10733).

B batch, h w height and width, C channels, N heads, H head width. Every block maps [B, h, w, C] to
[B, h, w, C] in `dtype`; `Down` and `Up` change h, w and C.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from wemmu_jax.models.dc_ae.strips import refresh
from wemmu_jax.ops.axes import LANES, current_platform
from wemmu_jax.ops.convolution import DepthwiseConv, depthwise_conv, doubled_conv
from wemmu_jax.ops.linear_attention import linear_attention, quadratic_attention
from wemmu_jax.ops.norms import RMSNorm

NORM_EPS = 1e-5  # the same in every published DC-AE; it is in no config
_EXPANSION = 4  # of the gated convolution


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
    def __call__(self, x: jax.Array, strips: int = 1) -> jax.Array:
        """x [B, h, w, C] -> [B, h, w, C]; of several `strips` a picture, margins included."""
        width = x.shape[-1]
        hidden = nn.silu(conv3x3(width, dtype=self.dtype, name="conv1")(x))
        hidden = refresh(hidden, strips)
        hidden = conv3x3(width, use_bias=False, dtype=self.dtype, name="conv2")(hidden)
        normed = RMSNorm(NORM_EPS, use_bias=True, dtype=self.dtype, name="norm")(hidden)
        return refresh(x + normed, strips)


def grouped_dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A linear layer of its own for each run of G channels (a grouped 1x1 convolution).

    On a TPU and a CPU several layers make one of 128 channels, with zeros between them: products of 32 would leave a
    TPU's lanes empty, and to bring the channels there takes longer than to multiply by zeros. On a CPU XLA would bring
    each group's channels together where it computes `x`, which took 0.11 s of 2.9 in the encoder (docs/performance.md).

    Args:
      x: [..., C].
      kernel: [G, C], the outputs of a group side by side.

    Returns:
      [..., C].
    """
    group, channels = kernel.shape
    kernel = kernel.reshape(group, -1, group)
    if current_platform() != "gpu" and channels % LANES == 0 and LANES % group == 0:
        kernel = _packed(kernel, LANES // group)
        runs = jnp.split(x, kernel.shape[1], axis=-1)
        return jnp.concatenate([run @ kernel[:, i] for i, run in enumerate(runs)], axis=-1)
    groups = x.reshape(*x.shape[:-1], -1, group)
    return jnp.einsum("...gi,igo->...go", groups, kernel).reshape(x.shape)


def _packed(kernel: jax.Array, count: int) -> jax.Array:
    """[i, g * count, o] -> [count * i, g, count * o], blocks on the diagonal."""
    blocks = kernel.reshape(kernel.shape[0], -1, count, kernel.shape[2])
    diagonal = jnp.eye(count, dtype=kernel.dtype)[:, None, None, :, None]
    spread = blocks.transpose(2, 0, 1, 3)[:, :, :, None, :] * diagonal  # [n, i, g, m, o]
    return spread.reshape(count * kernel.shape[0], -1, count * kernel.shape[2])


class _Kernel(nn.Module):
    """The kernel of a layer, which somebody else computes."""

    shape: Sequence[int]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("kernel", nn.initializers.lecun_normal(), self.shape).astype(self.dtype)


class MultiscaleAttention(nn.Module):
    """ReLU linear attention over query, key and value at several scales (EfficientViT, arXiv 2205.14756).

    Each scale beyond the first is a depthwise convolution of [query | key | value] and a linear layer inside
    each run of H channels. diffusers' `SanaMultiscaleLinearAttention` cuts heads out of the joint channels: head
    n of a scale takes channels 3nH to 3(n+1)H as its query, key and value. So do we, with the channels of all kernels
    in an order in which the queries of all heads come first, then the keys, then the values.
    """

    head_dim: int
    kernel_sizes: Sequence[int]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, h, w, C] -> [B, h, w, C], the input included."""
        channels = x.shape[-1]
        inner = channels // self.head_dim * self.head_dim
        parts = [self._kernel(name, channels, inner) for name in ("query", "key", "value")]
        joint = x.astype(self.dtype) @ self._in_order(jnp.concatenate(parts, axis=-1))
        scales = [joint]
        for i, size in enumerate(self.kernel_sizes):
            depthwise = self._kernel(f"scale_{i}_depthwise", size, size, 1, 3 * inner)
            mix = self._kernel(f"scale_{i}_mix", self.head_dim, 3 * inner)
            blurred = depthwise_conv(joint, self._in_order(depthwise))
            scales.append(grouped_dense(blurred, self._in_order(mix)))
        mixed = jnp.concatenate([self._attend(scale) for scale in scales], axis=-1)
        out = nn.Dense(channels, use_bias=False, dtype=self.dtype, name="out")(mixed)
        return x + RMSNorm(NORM_EPS, use_bias=True, dtype=self.dtype, name="norm")(out)

    def _kernel(self, name: str, *shape: int) -> jax.Array:
        return _Kernel(shape, self.dtype, name=name)()

    def _in_order(self, kernel: jax.Array) -> jax.Array:
        """[..., N * 3 * H] -> [..., 3 * N * H]."""
        heads = kernel.reshape(*kernel.shape[:-1], -1, 3, self.head_dim)
        return heads.swapaxes(-3, -2).reshape(kernel.shape)

    def _attend(self, scale: jax.Array) -> jax.Array:
        """[B, h, w, 3 * N * H] -> [B, h, w, N * H]."""
        batch, height, width, _ = scale.shape
        query, key, value = jnp.split(scale.reshape(batch, height * width, -1), 3, axis=-1)
        attend = quadratic_attention if height * width <= self.head_dim else linear_attention
        mixed = attend(nn.relu(query), nn.relu(key), value, self.head_dim)
        return mixed.astype(self.dtype).reshape(batch, height, width, -1)


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
    def __call__(self, x: jax.Array, strips: int = 1) -> jax.Array:
        """x [B, 2h, 2w, C] -> [B, h, w, features]; 4C is a multiple of `features`. Several `strips` a picture have a
        margin of one column before and behind."""
        if (
            strips > 1
        ):  # one column becomes two, which are halved to one, and squares begin where the picture's do
            x = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))
        shortcut = mean_of_squares(x, self.features)
        halved = conv3x3(self.features, stride=2, dtype=self.dtype, name="conv")(x)
        return refresh(halved + shortcut, strips)


class DoubledConv(nn.Module):
    """`doubled_conv` with the parameters of `conv3x3`."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, h, w, C] -> [B, 2h, 2w, features] in `dtype`."""
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), shape[-1:])
        return doubled_conv(x.astype(self.dtype), kernel) + bias.astype(self.dtype)


class Up(nn.Module):
    """Twice the resolution: nearest pixel, then a convolution, plus channels dealt out (`DCUpBlock2d`)."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, h, w, C] -> [B, 2h, 2w, features]; 4 x `features` is a multiple of C."""
        shortcut = depth_to_space(repeat_channels(x, 4 * self.features))
        return DoubledConv(self.features, self.dtype, name="conv")(x) + shortcut
