"""The solvers' schedules, their order of convergence and their errors. Parity with diffusers is in tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wemmu_jax.diffusion.solvers import (
    Solver,
    lean_factors,
    model_timesteps,
    sigma_schedule,
    solve,
)

both = pytest.mark.parametrize("solver", list(Solver))


def test_the_schedule_of_twenty_steps():
    sigmas = sigma_schedule(20, shift=3.0, solver=Solver.DPM_SOLVER_PP)
    assert sigmas.shape == (21,)
    np.testing.assert_allclose(
        sigmas[[0, 1, 2, 10, 18, 19, 20]],
        [0.99966645, 0.98241949, 0.96394110, 0.74962479, 0.24979164, 0.13623966, 0.0],
        atol=6e-8,  # these are diffusers', in float32
    )
    timesteps = model_timesteps(sigmas, Solver.DPM_SOLVER_PP)
    np.testing.assert_array_equal(timesteps[[0, 1, 2, 10, 18, 19]], [999, 982, 963, 749, 249, 136])


def test_euler_is_shifted_once():
    sigmas = sigma_schedule(4, shift=3.0, solver=Solver.EULER)
    np.testing.assert_allclose(sigmas, [1, 9 / 10, 3 / 4, 1 / 2, 0], rtol=1e-15)
    np.testing.assert_allclose(model_timesteps(sigmas, Solver.EULER), [1000, 900, 750, 500])


@both
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_every_schedule_falls_to_zero(solver, steps, shift):
    sigmas = sigma_schedule(steps, shift=shift, solver=solver)
    assert sigmas.shape == (steps + 1,)
    assert 0.99 < sigmas[0] <= 1
    assert sigmas[-1] == 0
    assert (np.diff(sigmas) < 0).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_the_first_and_the_last_step_are_of_first_order(steps):
    sigmas = sigma_schedule(steps, shift=3.0, solver=Solver.DPM_SOLVER_PP)
    factors = lean_factors(sigmas, Solver.DPM_SOLVER_PP)
    assert factors.shape == (steps,)
    assert factors[0] == factors[-1] == 0
    assert (factors[1:-1] > 0).all()


@both
@pytest.mark.parametrize("steps", [0, -3])
def test_too_few_steps_are_an_error(solver, steps):
    with pytest.raises(ValueError, match=f"steps: expected at least 1, found {steps}"):
        solve(lambda x, t: x, jnp.zeros((1, 2, 2, 1)), steps=steps, solver=solver)


@both
@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan")])
def test_a_shift_out_of_range_is_an_error(solver, shift):
    with pytest.raises(ValueError, match=f"shift: expected a number above 0, found {shift}"):
        solve(lambda x, t: x, jnp.zeros((1, 2, 2, 1)), steps=2, shift=shift, solver=solver)


def _order(solver: Solver, *, coarse: int, fine: int) -> float:
    """Order of convergence on dx/dsigma = 2 x, whose solution is x(sigma) = x(1) exp(2 sigma - 2)."""
    noise = jax.random.normal(jax.random.key(0), (2, 3, 2, 4))

    def error(steps: int) -> float:
        picture = solve(lambda x, t: 2 * x, noise, steps=steps, shift=1.0, solver=solver)
        start = sigma_schedule(steps, shift=1.0, solver=solver)[0]
        exact = noise * np.exp(-2 * start)
        return float(jnp.linalg.norm(picture - exact) / jnp.linalg.norm(exact))

    return np.log(error(coarse) / error(fine)) / np.log(fine / coarse)


def test_orders_of_convergence():
    """DPM-Solver++ nears 2 slowly, because its steps in log(share of picture / noise) grow towards both ends."""
    assert 0.95 < _order(Solver.EULER, coarse=64, fine=256) < 1.05
    assert 1.7 < _order(Solver.DPM_SOLVER_PP, coarse=64, fine=256) < 2.1


@both
def test_straight_paths_need_one_step(solver):
    noise = jax.random.normal(jax.random.key(0), (1, 4, 3, 2))
    slope = jnp.float32(0.75)
    sigma = sigma_schedule(1, shift=3.0, solver=solver)[0]
    picture = solve(lambda x, t: jnp.full_like(x, slope), noise, steps=1, solver=solver)
    np.testing.assert_allclose(picture, noise - sigma * slope, atol=1e-6)


@both
def test_the_velocity_is_asked_at_the_schedule(solver):
    """A velocity that counts the timesteps it is given; half precision in, float32 out."""
    noise = jnp.zeros((1, 1, 1, 1), jnp.bfloat16)
    sigmas = sigma_schedule(5, shift=3.0, solver=solver)
    seen = []

    def velocity(x, timestep):
        assert x.dtype == timestep.dtype == jnp.float32
        jax.debug.callback(lambda t: seen.append(float(t)), timestep, ordered=True)
        return x.astype(jnp.bfloat16)

    picture = solve(velocity, noise, steps=5, solver=solver)
    jax.effects_barrier()
    assert picture.dtype == jnp.float32
    np.testing.assert_allclose(seen, model_timesteps(sigmas, solver), rtol=1e-6)
