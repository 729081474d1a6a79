"""Solvers of the flow's ODE, from noise (sigma 1) to a picture (sigma 0). B batch, C channels, h w latent size.

Convention: x_sigma = (1 - sigma) x_0 + sigma noise, velocity = noise - x_0. So at every sigma the velocity
predicts the picture, x_0 = x - sigma * velocity, and both solvers take steps of one form:

    x' = keep * x + (1 - keep) * (x_0 + lean * (x_0 - x_0 of the step before)),    keep = sigma' / sigma

With lean = 0 this is Euler's step, which is DPM-Solver++ of first order too. The second order leans on the
step before.
"""

import enum
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from wemmu_jax.diffusion.flow import TIMESTEPS, shifted


class Solver(enum.StrEnum):
    """Which solver, with its own schedule."""

    DPM_SOLVER_PP = (
        "dpm-solver++"  # 2M, midpoint; diffusers' `DPMSolverMultistepScheduler` as Sana sets it
    )
    EULER = (
        "euler"  # diffusers' `FlowMatchEulerDiscreteScheduler` given the sigmas 1, (n-1)/n .. 1/n
    )


def sigma_schedule(steps: int, *, shift: float, solver: Solver) -> np.ndarray:
    """Noise levels between which the solver steps.

    Args:
      steps: how often the velocity is asked for, at least 1.
      shift: moves the levels towards noise, s sigma / (1 + (s - 1) sigma), once; above 0.
      solver: DPM-Solver++ starts just below 1 (0.99967 at shift 3), where the picture's share of x is not 0,
        because it steps in log(share of picture / share of noise). Euler starts at 1.

    Returns:
      float64[steps + 1], falling; the last is 0.

    Raises:
      ValueError: steps or shift are out of range.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, found {steps}")
    if not shift > 0:
        raise ValueError(f"shift: expected a number above 0, found {shift}")
    if solver is Solver.DPM_SOLVER_PP:
        # In the order in which diffusers computes it: the timesteps below are cut to whole numbers.
        rising = 1 - np.linspace(1, 1 / TIMESTEPS, steps + 1)
    else:
        rising = np.linspace(0, 1, steps + 1)
    return np.flip(shifted(rising, shift))


def model_timesteps(sigmas: np.ndarray, solver: Solver) -> np.ndarray:
    """What the model is told at each step: float64[steps] of `sigma_schedule`'s [steps + 1].

    1000 sigma; for DPM-Solver++ without its fraction, as diffusers casts it.
    """
    timesteps = TIMESTEPS * sigmas[:-1]
    return np.floor(timesteps) if solver is Solver.DPM_SOLVER_PP else timesteps


def lean_factors(sigmas: np.ndarray, solver: Solver) -> np.ndarray:
    """How far each step of DPM-Solver++ 2M leans on the step before it (Lu et al. 2022, algorithm 2).

    h' / (2 h), where h and h' are the last and the coming step in log((1 - sigma) / sigma). The first step has
    none before it, and the last, to sigma 0, is infinitely long: both are of first order. (diffusers'
    `lower_order_final`, for fewer than 15 steps, asks for no more than that at order 2.)

    Args:
      sigmas: float64[steps + 1].

    Returns:
      float64[steps].
    """
    factors = np.zeros(len(sigmas) - 1)
    if solver is Solver.DPM_SOLVER_PP:
        step = np.diff(np.log1p(-sigmas[:-1]) - np.log(sigmas[:-1]))
        factors[1:-1] = step[1:] / (2 * step[:-1])
    return factors


def solve(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    noise: jax.Array,
    *,
    steps: int,
    shift: float = 3.0,
    solver: Solver = Solver.DPM_SOLVER_PP,
) -> jax.Array:
    """Integrates from noise to a picture. Under `jax.jit`, steps, shift and solver are static.

    Args:
      velocity: (x float32[B, h, w, C], timestep float32[] in 0..1000) -> [B, h, w, C], the model with its
        condition and guidance.
      noise: [B, h, w, C], N(0, 1).
      steps: how often `velocity` is called.
      shift: of the schedule.
      solver: which solver.

    Returns:
      float32[B, h, w, C], x_0. The state is float32 throughout, the coefficients are computed in float64.

    Raises:
      ValueError: steps or shift are out of range.
    """
    sigmas = sigma_schedule(steps, shift=shift, solver=solver)
    coefficients = {
        "sigma": sigmas[:-1],
        "timestep": model_timesteps(sigmas, solver),
        "keep": sigmas[1:] / sigmas[:-1],
        "lean": lean_factors(sigmas, solver),
    }

    def step(carry: tuple[jax.Array, jax.Array], at: dict[str, jax.Array]):
        x, picture_before = carry
        picture = x - at["sigma"] * velocity(x, at["timestep"]).astype(jnp.float32)
        target = picture + at["lean"] * (picture - picture_before)
        return (at["keep"] * x + (1 - at["keep"]) * target, picture), None

    noise = noise.astype(jnp.float32)
    xs = {name: jnp.asarray(values, jnp.float32) for name, values in coefficients.items()}
    (x, _), _ = jax.lax.scan(step, (noise, jnp.zeros_like(noise)), xs)
    return x
