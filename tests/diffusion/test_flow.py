"""The path between picture and noise, and the law of its times."""

import jax
import numpy as np
import pytest

from wemmu_jax.diffusion.flow import (
    TimeLaw,
    draw_flow_noise,
    draw_sigma,
    noised,
    shifted,
    target_velocity,
)

NUMBERS = np.arange(20_000, dtype=np.uint32)


def unshifted(sigma: np.ndarray, shift: float) -> np.ndarray:
    """The inverse of s x / (1 + (s - 1) x)."""
    return sigma / (shift - (shift - 1) * sigma)


def test_path_is_equation_2():
    rng = np.random.default_rng(0)
    clean, noise = rng.standard_normal((2, 3, 2, 5, 4)).astype(np.float32)
    sigma = np.array([0.0, 0.25, 1.0], np.float32)
    x = np.asarray(noised(clean, noise, sigma))
    for row in range(3):
        expected = (1 - sigma[row]) * clean[row] + sigma[row] * noise[row]
        np.testing.assert_allclose(x[row], expected, rtol=1e-6)
    np.testing.assert_array_equal(x[0], clean[0])
    np.testing.assert_array_equal(x[2], noise[2])


def test_velocity_is_the_derivative_of_the_path():
    rng = np.random.default_rng(1)
    clean, noise = rng.standard_normal((2, 1, 2, 2, 3))
    with jax.enable_x64(True):
        at = lambda s: noised(clean, noise, np.array([s]))  # noqa: E731
        slope = (np.asarray(at(0.6)) - np.asarray(at(0.5))) / 0.1
        np.testing.assert_allclose(target_velocity(clean, noise), slope, rtol=1e-9)


@pytest.mark.parametrize(
    ("sigma", "shift", "expected"),
    [(0.5, 3.0, 0.75), (0.25, 3.0, 0.5), (0.1, 3.0, 0.25), (0.5, 1.0, 0.5), (0.2, 6.0, 0.6)]
    + [(end, 3.0, end) for end in (0.0, 1.0)],
)
def test_shift(sigma, shift, expected):
    assert float(shifted(np.float32(sigma), shift)) == pytest.approx(expected, rel=1e-6)


def test_logit_normal_times():
    sigma = np.asarray(draw_sigma(0, NUMBERS, law=TimeLaw.LOGIT_NORMAL, shift=3.0), np.float64)
    assert sigma.min() > 0 and sigma.max() < 1
    plain = unshifted(sigma, 3.0)
    logit = np.log(plain / (1 - plain))
    # Of N(0, 1): four standard errors of 20,000 draws.
    assert abs(logit.mean()) < 0.03 and abs(logit.std() - 1) < 0.02
    below = [np.mean(logit < z) for z in (-1.0, 0.0, 1.0, 2.0)]
    np.testing.assert_allclose(below, [0.15866, 0.5, 0.84134, 0.97725], atol=0.015)


def test_uniform_times():
    sigma = np.asarray(draw_sigma(0, NUMBERS, law=TimeLaw.UNIFORM, shift=3.0), np.float64)
    plain = unshifted(sigma, 3.0)
    deciles = np.quantile(plain, np.arange(0.1, 1, 0.1))
    np.testing.assert_allclose(deciles, np.arange(0.1, 1, 0.1), atol=0.015)


def test_all_that_is_drawn_depends_on_the_sample_number_alone():
    draws = {
        "time": lambda n: draw_sigma(3, n, law=TimeLaw.LOGIT_NORMAL, shift=3.0),
        "noise": lambda n: draw_flow_noise(3, n, (2, 3, 4)),
    }
    for draw in draws.values():
        draw = jax.jit(draw)
        whole = np.asarray(draw(NUMBERS[:12]))
        np.testing.assert_array_equal(draw(NUMBERS[[7, 2]]), whole[[7, 2]])
        np.testing.assert_array_equal(draw(NUMBERS[4:6]), whole[4:6])
        assert len(np.unique(whole.reshape(12, -1)[:, 0])) == 12


def test_times_and_noise_are_of_different_streams_and_seeds():
    one, other = (np.asarray(draw_flow_noise(seed, NUMBERS[:4], (50,))) for seed in (0, 1))
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.3
    sigma = np.asarray(draw_sigma(0, NUMBERS, law=TimeLaw.LOGIT_NORMAL, shift=1.0))
    noise = np.asarray(draw_flow_noise(0, NUMBERS, ()))
    assert abs(np.corrcoef(np.log(sigma / (1 - sigma)), noise)[0, 1]) < 0.03
