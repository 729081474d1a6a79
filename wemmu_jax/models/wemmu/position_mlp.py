"""The Position MLP (paper, A.1): 2-D places from a learned table, then a gated MLP into Sana's caption width.

B batch, Q query tokens, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


def centre_crop(table: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """The centre rows and columns of table [N, N, D]; the crop starts at (N - n) // 2. Returns [gh, gw, D].

    Raises:
      ValueError: the grid is larger than the table.
    """
    size = table.shape[0]
    if max(grid) > size:
        raise ValueError(
            f"a grid of {grid[0]} x {grid[1]} passes the learned {size} x {size} table"
        )
    top, left = ((size - side) // 2 for side in grid)
    return table[top : top + grid[0], left : left + grid[1]]


def pad_tokens(x: jax.Array, length: int) -> jax.Array:
    """Zeros behind x [..., T, D] up to [..., length, D]."""
    spare = length - x.shape[-2]
    if spare < 0:
        raise ValueError(f"{x.shape[-2]} tokens do not fit in {length}")
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, spare), (0, 0)])


class PositionMLP(nn.Module):
    """Adds the cropped table, then down(silu(gate(x)) * up(x)); no biases (Eq. 1 to 3 of A.1)."""

    max_grid: int
    hidden: int
    out: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, grid: tuple[int, int]) -> jax.Array:
        """x [B, Q, D], the first rows * columns tokens are the grid in raster order -> [B, Q, out]."""
        width = x.shape[-1]
        table = self.param(
            "table", nn.initializers.normal(0.02), (self.max_grid, self.max_grid, width)
        )
        places = centre_crop(table, grid).reshape(-1, width)
        x = (x + pad_tokens(places, x.shape[1])).astype(self.dtype)

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, use_bias=False, dtype=self.dtype, name=name)

        gate = nn.silu(dense(self.hidden, "gate_proj")(x))
        return dense(self.out, "down_proj")(gate * dense(self.hidden, "up_proj")(x))
