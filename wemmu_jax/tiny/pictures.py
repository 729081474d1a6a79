"""The random stream and the picture sizes that the recipes share."""

import numpy as np

from wemmu_jax.miniworld.sources import SHARES, SIZES


def batch_rng(seed: int, step: int) -> np.random.Generator:
    """All that is random in the batch of `step`."""
    return np.random.default_rng([seed, step])


def draw_size(rng: np.random.Generator) -> tuple[int, int]:
    """(height, width) of all pictures of a batch."""
    return SIZES[rng.choice(len(SIZES), p=SHARES)]
