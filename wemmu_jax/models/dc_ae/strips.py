"""Pictures cut into strips, so that a TPU convolves a few large ones as many narrow ones.

A TPU's vectors hold eight rows of a batch beside 128 channels. With fewer rows XLA leaves the rest empty, or cuts the
pictures before every convolution anew and copies them together behind it. Here they are cut once, as pixels. Strips lie
side by side in the batch, each with a column more on either side, its margin, which is its neighbour's or zero at the
picture's edge. A convolution that pads the strip leaves nonsense there; `refresh` puts it right.

B batch, H W height and width, C channels, n strips of a picture.
"""

import math

import jax
import jax.numpy as jnp

from wemmu_jax.ops.axes import ROWS, current_mesh, current_platform, dividing

_SUBLANES = 8


def count_strips(shape: tuple[int, ...], ratio: int) -> int:
    """n for pictures [B, H, W, C] that become smaller by `ratio`: so many that a device has a multiple of eight in its
    batch. 1 on other platforms, and where strips would not be equal."""
    if current_platform() != "tpu":
        return 1
    rows, mesh = shape[0], current_mesh()
    if mesh is not None and dividing(mesh, rows, ROWS):
        rows //= math.prod(mesh.shape[axis] for axis in ROWS)
    count = _SUBLANES // math.gcd(rows, _SUBLANES)
    return count if shape[2] % (count * ratio) == 0 else 1


def cut(x: jax.Array, count: int) -> jax.Array:
    """[B, H, W, C] -> strips [B * n, H, W / n + 2, C]; one strip a picture is the picture."""
    if count == 1:
        return x
    batch, height, width, channels = x.shape
    own = width // count
    padded = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))
    strips = [padded[:, :, i * own : (i + 1) * own + 2] for i in range(count)]
    return jnp.stack(strips, axis=1).reshape(batch * count, height, own + 2, channels)


def joined(strips: jax.Array, count: int) -> jax.Array:
    """The inverse of `cut`."""
    if count == 1:
        return strips
    _, height, width, channels = strips.shape
    own = strips[:, :, 1:-1].reshape(-1, count, height, width - 2, channels)
    return own.swapaxes(1, 2).reshape(-1, height, count * (width - 2), channels)


def refresh(strips: jax.Array, count: int) -> jax.Array:
    """The strips, their margins what the neighbours have there, zero at the picture's edges."""
    if count == 1:
        return strips
    first, last = (
        strips[:, :, column : column + 1].reshape(-1, count, strips.shape[1], 1, strips.shape[3])
        for column in (1, strips.shape[2] - 2)
    )
    none = ((0, 0),) * 3
    left = jnp.pad(last[:, :-1], ((0, 0), (1, 0), *none)).reshape(-1, *first.shape[2:])
    right = jnp.pad(first[:, 1:], ((0, 0), (0, 1), *none)).reshape(-1, *first.shape[2:])
    strips = jax.lax.dynamic_update_slice_in_dim(strips, left, 0, axis=2)
    return jax.lax.dynamic_update_slice_in_dim(strips, right, strips.shape[2] - 1, axis=2)
