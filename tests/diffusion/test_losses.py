"""Flow matching against literal sums, and the negatives of the contrastive loss. B rows of h x w x C."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wemmu_jax.diffusion.losses import (
    contrastive_flow_matching,
    flow_matching,
    negatives,
    partners,
)

SHAPE = (4, 2, 3, 5)
WEIGHT = 0.05


@pytest.fixture
def three():
    """A velocity and two targets."""
    return np.random.default_rng(0).standard_normal((3, *SHAPE)).astype(np.float32)


def literal(a: np.ndarray, b: np.ndarray) -> list[float]:
    """Mean square difference of each row, by loops."""
    found = []
    for x, y in zip(a.astype(np.float64), b.astype(np.float64), strict=True):
        total = sum((p - q) ** 2 for p, q in zip(x.ravel(), y.ravel(), strict=True))
        found.append(total / x.size)
    return found


def test_flow_matching(three):
    velocity, target, _ = three
    np.testing.assert_allclose(flow_matching(velocity, target), literal(velocity, target), 1e-6)
    half = flow_matching(jnp.asarray(velocity, jnp.bfloat16), target)
    assert half.dtype == jnp.float32


def test_contrastive_flow_matching(three):
    velocity, target, negative = three
    contrasted = np.array([True, False, True, True])
    found = contrastive_flow_matching(
        velocity, target, negative, contrasted=contrasted, weight=WEIGHT
    )
    pull, push = literal(velocity, target), literal(velocity, negative)
    expected = [p - WEIGHT * q * c for p, q, c in zip(pull, push, contrasted, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert float(found[1]) == float(flow_matching(velocity, target)[1])


def test_contrastive_minimiser(three):
    """The gradient is zero at (v+ - lambda mean v-) / (1 - lambda), and nowhere near it."""
    _, target, _ = three
    others = np.random.default_rng(1).standard_normal((7, *SHAPE)).astype(np.float32)
    contrasted = np.ones(len(target), bool)

    def expected_loss(velocity):
        losses = [
            contrastive_flow_matching(velocity, target, n, contrasted=contrasted, weight=WEIGHT)
            for n in others
        ]
        return jnp.sum(jnp.stack(losses)) / len(others)

    best = (target - WEIGHT * others.mean(axis=0)) / (1 - WEIGHT)
    assert np.abs(jax.grad(expected_loss)(best)).max() < 1e-7
    assert np.abs(jax.grad(expected_loss)(target)).max() > 1e-4
    assert expected_loss(best) < expected_loss(target) < expected_loss(best + 1)


def test_partner_is_never_the_row_itself_and_each_other_row_is_drawn():
    drawn = [int(partners(0, np.uint32(number), 6)) for number in range(200)]
    assert set(drawn) == {1, 2, 3, 4, 5}
    assert int(partners(0, np.uint32(3), 6)) == drawn[3]
    assert [int(partners(1, np.uint32(number), 6)) for number in range(200)] != drawn
    assert {int(partners(0, np.uint32(number), 2)) for number in range(20)} == {1}


def test_one_row_has_no_negative():
    with pytest.raises(ValueError, match="at least 2 rows a micro-batch, found 1"):
        partners(0, np.uint32(0), 1)


@pytest.mark.parametrize("step", range(1, 6))
def test_negatives(step):
    target = np.arange(6, dtype=np.float32)[:, None, None, None] * np.ones((1, 2, 2, 3), np.float32)
    pictures = np.array([10, 11, 12, 10, 13, 11], np.uint32)
    unconditional = np.array([False, False, True, False, False, False])
    negative, contrasted = negatives(target, pictures, unconditional, step)
    for row in range(6):
        other = (row + step) % 6
        assert other != row
        np.testing.assert_array_equal(negative[row], target[other])
        expected = pictures[other] != pictures[row] and not unconditional[row]
        assert bool(contrasted[row]) == expected
