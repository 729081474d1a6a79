"""What the reading of an instruction has to tell, and how it is asked for it."""

import jax.numpy as jnp
import numpy as np
import pytest

from wemmu_jax.miniworld.scene import PLACES
from wemmu_jax.tiny.grounding import LAYERS, PICTURES, UNKNOWN, place_losses


def test_places_are_asked_of_the_last_layers_where_they_are_known():
    """Against the same sums in NumPy; what an earlier layer holds, and tokens without a place, do not count."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(LAYERS + 1, 3, 5, 2, 4)).astype(np.float32)
    kernel = rng.normal(size=(LAYERS, 8, PICTURES * len(PLACES))).astype(np.float32)
    bias = rng.normal(size=(LAYERS, PICTURES * len(PLACES))).astype(np.float32)
    labels = rng.integers(UNKNOWN, len(PLACES), (3, 5, PICTURES)).astype(np.int32)
    losses, right = [], []
    for layer in range(LAYERS):
        for row, token, picture in zip(*np.nonzero(labels != UNKNOWN), strict=True):
            told = values[1 + layer, row, token].reshape(-1) @ kernel[layer] + bias[layer]
            told = told.reshape(PICTURES, -1)[picture]
            label = labels[row, token, picture]
            losses.append(np.log(np.exp(told).sum()) - told[label])
            right += [told.argmax() == label] * (layer == LAYERS - 1)
    places = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
    loss, share = place_losses(places, jnp.asarray(values), jnp.asarray(labels))
    assert loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert share == pytest.approx(np.mean(right), rel=1e-6) and 0 < share < 1
    nothing = jnp.full(labels.shape, UNKNOWN)
    assert [float(x) for x in place_losses(places, jnp.asarray(values), nothing)] == [0.0, 0.0]
