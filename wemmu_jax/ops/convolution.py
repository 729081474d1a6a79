"""Depthwise convolution as shifted multiply-adds. B batch, h w height and width, C channels, k kernel size."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def depthwise_conv(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """A convolution of each channel with its own filter, stride 1, zeros around, same size out.

    XLA's grouped convolution is ten times slower on a CPU and loses on a TPU at 1024 px too; the sum of
    shifted products fuses into one loop. The sum is kept in float32.

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
    height, width = x.shape[1:3]
    top, left = kernel_height // 2, kernel_width // 2
    padded = _computed_once(jnp.pad(x, ((0, 0), (top, top), (left, left), (0, 0))))
    total = jnp.float32(0) if bias is None else bias.astype(jnp.float32)
    for row in range(kernel_height):
        for column in range(kernel_width):
            shifted = padded[:, row : row + height, column : column + width]
            total = total + shifted.astype(jnp.float32) * kernel[row, column, 0].astype(jnp.float32)
    return total.astype(x.dtype)


def _computed_once(x: jax.Array) -> jax.Array:
    """`x`, in memory: on a CPU the loop over the shifts would compute what `x` is made of anew for each of them."""
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


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
