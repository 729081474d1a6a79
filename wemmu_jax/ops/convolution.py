"""Depthwise convolution as shifted multiply-adds. B batch, h w height and width, C channels."""

from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp

from wemmu_jax.ops.axes import current_platform


def depthwise_conv(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """A convolution of each channel with its own filter, stride 1, zeros around, same size out.

    XLA's grouped convolution is ten times slower on a CPU. On a TPU it takes by XLA's estimate 1.8 times as long for a
    gated network of Sana's width at 1024 px; at 512 px it is as fast, but the partitioner has every device compute it
    for the whole batch. The sum of shifted products fuses into one loop. It is kept in float32.

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
    total = _shifted_sum(x, kernel[:, :, 0])
    if bias is not None:
        total = total + bias.astype(jnp.float32)
    return total.astype(x.dtype)


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
    if current_platform() == "tpu":
        # In memory, or the product behind it computes it anew for each of its blocks: a seventh of the DiT's time.
        to_x = jax.lax.optimization_barrier(to_x)
    wide = narrow.astype(jnp.float32)
    sums = [jnp.sum(shifted * wide, axis=(0, 1, 2)) for _, _, shifted in _shifts(x, kernel)]
    return to_x, jnp.stack(sums).reshape(kernel.shape).astype(kernel.dtype)


_shifted_sum.defvjp(_forward, _backward)


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
