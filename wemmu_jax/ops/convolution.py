"""Convolutions: depthwise as shifted multiply-adds, and of a picture at twice its size.

B batch, h w height and width, C channels, F features.
"""

import functools
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from wemmu_jax.ops.axes import HEADS, ROWS, TOKENS, current_mesh, current_platform, dividing
from wemmu_jax.ops.depthwise_kernel import block_channels, depthwise


def depthwise_conv(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """A convolution of each channel with its own filter, stride 1, zeros around, same size out.

    XLA's grouped convolution is ten times slower on a CPU, where a sum of shifted products fuses into one loop. On a
    TPU it takes by XLA's estimate 1.8 times as long as that sum for a gated network of Sana's width at 1024 px, and the
    partitioner has every device compute it for the whole batch; a kernel of our own takes the sum's place where each
    device has whole pictures that fit its working memory. The sum is float32.

    Args:
      x: [B, h, w, C].
      kernel: [kh, kw, 1, C], both sizes odd, the layout of `nn.Conv(feature_group_count=C)`.
      bias: [C] or None.

    Returns:
      [B, h, w, C] in the dtype of `x`.

    Raises:
      ValueError: the kernel does not fit the channels, or a size is even.
    """
    kernel_height, kernel_width, *rest = kernel.shape
    if rest != [1, x.shape[-1]] or kernel_height % 2 == 0 or kernel_width % 2 == 0:
        raise ValueError(
            f"a depthwise kernel of {x.shape[-1]} channels is [odd, odd, 1, {x.shape[-1]}], "
            f"found {list(kernel.shape)}"
        )
    kernel = kernel[:, :, 0]
    if (
        current_platform() == "tpu"
        and _whole_pictures()
        and block_channels(x.shape, x.dtype.itemsize)
    ):
        return _by_kernel(x, kernel, jnp.zeros(x.shape[-1:]) if bias is None else bias, False)
    total = _shifted_sum(x, kernel)
    if bias is not None:
        total = total + bias.astype(jnp.float32)
    return total.astype(x.dtype)


def _whole_pictures() -> bool:
    """Whether each device has all channels and places of its own pictures."""
    mesh = current_mesh()
    return mesh is None or mesh.shape[TOKENS] == mesh.shape[HEADS] == 1


def _shifts(x: jax.Array, kernel: jax.Array) -> Iterator[tuple[int, int, jax.Array]]:
    """Each place of the kernel, and float32[B, h, w, C] of what lies there from every pixel."""
    (kernel_height, kernel_width), (height, width) = kernel.shape[:2], x.shape[1:3]
    top, left = kernel_height // 2, kernel_width // 2
    padded = jnp.pad(x, ((0, 0), (top, top), (left, left), (0, 0)))
    if current_platform() == "cpu":
        # In memory, or the loop over the shifts would compute what `x` is made of anew for each of them.
        padded = jax.lax.optimization_barrier(padded)
    for row in range(kernel_height):
        for column in range(kernel_width):
            shifted = padded[:, row : row + height, column : column + width]
            yield row, column, shifted.astype(jnp.float32)


@jax.custom_vjp
def _shifted_sum(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [B, h, w, C], kernel [kh, kw, C] -> float32[B, h, w, C].

    Its gradient is its own: that of a sum of slices would be a sum of nine padded arrays, where the same sum with the
    kernel turned round reads the cotangent once. 14% of the layer on a v5p at 1024 px, by XLA's estimate.
    """
    kernel = kernel.astype(jnp.float32)
    return sum(shifted * kernel[row, column] for row, column, shifted in _shifts(x, kernel))


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _shifted_sum(x, kernel), (x, kernel)


def _backward(saved: tuple[jax.Array, jax.Array], cotangent: jax.Array):
    x, kernel = saved
    # Of a result in the type of `x` it holds no more than that type does.
    narrow = cotangent.astype(x.dtype)
    to_x = _shifted_sum(narrow, kernel[::-1, ::-1]).astype(x.dtype)
    return to_x, _to_kernel(x, kernel, narrow)


def _to_kernel(x: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> jax.Array:
    wide = cotangent.astype(jnp.float32)
    sums = [jnp.sum(shifted * wide, axis=(0, 1, 2)) for _, _, shifted in _shifts(x, kernel)]
    return jnp.stack(sums).reshape(kernel.shape).astype(kernel.dtype)


_shifted_sum.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _by_kernel(x: jax.Array, kernel: jax.Array, bias: jax.Array, interpret: bool) -> jax.Array:
    """x [B, h, w, C], kernel [kh, kw, C], bias [C] -> [B, h, w, C] in the dtype of `x`; each device does its rows."""

    def local(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        weights = kernel.astype(jnp.float32), bias.astype(jnp.float32)[None]
        return depthwise(x, *weights, interpret=interpret)

    if (mesh := current_mesh()) is None:
        return local(x, kernel, bias)
    rows, whole = PartitionSpec(dividing(mesh, x.shape[0], ROWS)), PartitionSpec()
    # Pallas calls do not say along which axes their results differ.
    spread = jax.shard_map(local, in_specs=(rows, whole, whole), out_specs=rows, check_vma=False)
    return spread(x, kernel, bias)


def _forward_by_kernel(x: jax.Array, kernel: jax.Array, bias: jax.Array, interpret: bool):
    return _by_kernel(x, kernel, bias, interpret), (x, kernel, bias)


def _backward_by_kernel(interpret: bool, saved: tuple[jax.Array, ...], cotangent: jax.Array):
    x, kernel, bias = saved
    to_x = _by_kernel(cotangent, kernel[::-1, ::-1], jnp.zeros_like(bias), interpret)
    to_bias = jnp.sum(cotangent, axis=(0, 1, 2), dtype=jnp.float32).astype(bias.dtype)
    return to_x, _to_kernel(x, kernel, cotangent), to_bias


_by_kernel.defvjp(_forward_by_kernel, _backward_by_kernel)


class DepthwiseConv(nn.Module):
    """`depthwise_conv` with its parameters: `kernel` [k, k, 1, C] and, if asked for, `bias` [C]."""

    kernel_size: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, h, w, C] -> [B, h, w, C] in `dtype`."""
        shape = (self.kernel_size, self.kernel_size, 1, x.shape[-1])
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = (
            self.param("bias", nn.initializers.zeros_init(), shape[-1:]) if self.use_bias else None
        )
        return depthwise_conv(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            None if bias is None else bias.astype(self.dtype),
        )


def doubled_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 3x3 convolution, zeros around, of `x` at twice its size (nearest pixel), which is never made.

    Of the three rows that the kernel sees two are the same row of `x`, and so are two of its columns. With their
    weights added, each pixel of a square of four is a 2x2 convolution of `x` of its own: 4 products in place of 9.

    Args:
      x: [B, h, w, C].
      kernel: [3, 3, C, F]; its sums are rounded to the dtype of `x` once.

    Returns:
      [B, 2h, 2w, F] in the dtype of `x`.

    Raises:
      ValueError: the kernel does not fit.
    """
    batch, height, width, channels = x.shape
    if kernel.shape[:3] != (3, 3, channels):
        raise ValueError(
            f"a kernel over {channels} channels is [3, 3, {channels}, F], found {list(kernel.shape)}"
        )

    def place(row: int, column: int) -> jax.Array:
        merged = _merged(_merged(kernel.astype(jnp.float32), row, axis=0), column, axis=1)
        borders = [(1 - row, row), (1 - column, column)]
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, merged.astype(x.dtype), (1, 1), borders, dimension_numbers=dims
        )

    squares = [jnp.stack([place(row, 0), place(row, 1)], axis=3) for row in (0, 1)]
    return jnp.stack(squares, axis=2).reshape(batch, 2 * height, 2 * width, -1)


def _merged(kernel: jax.Array, place: int, *, axis: int) -> jax.Array:
    """The three weights along `axis` as two: the first (`place` 0) or the second of two equal pixels sees the pixel
    before, itself and itself, or itself, itself and the next."""
    first, middle, last = jnp.split(kernel, 3, axis)
    pair = (first, middle + last) if place == 0 else (first + middle, last)
    return jnp.concatenate(pair, axis)
