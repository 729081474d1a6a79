"""The queries that the generation expert starts from. B batch, Q query tokens, D width."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from wemmu_jax.models.wemmu.config import QueryKind
from wemmu_jax.models.wemmu.position_mlp import centre_crop
from wemmu_jax.rng import Stream, per_sample, stream_key


def draw_noise(
    seed: int | jax.Array, numbers: jax.Array, *, grid: tuple[int, int], width: int
) -> jax.Array:
    """Noisy query tokens, Q ~ N(0, I) (paper, 3.2), drawn afresh for each sample number.

    Args:
      seed: the run's seed or root key.
      numbers: uint32[B], global sample numbers.
      grid: rows and columns; the draw is of the true grid, so padding cannot change it.
      width: D.

    Returns:
      float32[B, rows * columns, D].
    """
    shape = (grid[0] * grid[1], width)
    key = stream_key(seed, Stream.QUERY_NOISE)
    return per_sample(key, numbers, lambda k: jax.random.normal(k, shape, jnp.float32))


class Queries(nn.Module):
    """Turns noise, or learned tables, into the expert's input (paper, 4.3.1)."""

    kind: QueryKind
    width: int
    fixed_grid: int
    max_grid: int
    noise_scale: float = 1.0

    @nn.compact
    def __call__(self, noise: jax.Array, *, grid: tuple[int, int]) -> jax.Array:
        """noise float32[B, Q, D] -> queries float32[B, Q, D]; learnable kinds use only its batch size."""
        table = nn.initializers.normal(0.02)
        noise = self.noise_scale * noise
        if self.kind is QueryKind.NOISY:
            return noise
        if self.kind is QueryKind.NOISY_SCALED:
            return noise * self.param("scale", nn.initializers.ones_init(), (self.width,))
        if self.kind is QueryKind.LEARNABLE_FIXED:
            side = self.fixed_grid
            learned = self.param("table", table, (side, side, self.width))
        else:
            side = self.max_grid
            learned = self.param("table", table, (side, side, self.width))
            learned = centre_crop(learned, grid)
        return jnp.broadcast_to(learned.reshape(-1, self.width), noise.shape)
