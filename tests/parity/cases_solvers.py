"""Parity rows of the solvers against diffusers' schedulers, with the schedulers' own timesteps."""

import functools
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from tests.parity import cases_sana
from tests.parity.harness import Case, Sabotage, relative_l2, to_torch
from wemmu_jax.diffusion import solvers
from wemmu_jax.diffusion.solvers import Solver, solve
from wemmu_jax.models.sana import SanaTransformer

TOLERANCE = 1e-5
STEPS = (1, 2, 3, 5, 14, 15, 20, 50)
NAMES = {Solver.DPM_SOLVER_PP: "DPM-Solver++", Solver.EULER: "Euler"}


def scheduler(solver: Solver, *, steps: int, shift: float):
    """diffusers' scheduler, as Sana's pipeline sets it; the Euler one is given sigmas, or it would shift twice."""
    if solver is Solver.EULER:
        euler = FlowMatchEulerDiscreteScheduler(shift=shift)
        euler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
        return euler
    dpm = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction"
    )
    dpm.set_timesteps(steps)
    return dpm


@torch.no_grad()
def reference_solve(
    velocity: Callable, noise: np.ndarray, *, solver: Solver, steps: int, shift: float = 3.0
) -> torch.Tensor:
    """diffusers' loop over its own timesteps; `noise` in whatever layout `velocity` wants."""
    stepper = scheduler(solver, steps=steps, shift=shift)
    x = to_torch(noise)
    for timestep in stepper.timesteps:
        x = stepper.step(velocity(x, timestep), timestep, x, return_dict=False)[0]
    return x


def formula(x, timestep, library) -> torch.Tensor | jax.Array:
    """A velocity that bends, in x and in time; `library` is torch or jax.numpy."""
    return (
        library.tanh(1.7 * x) + 0.3 * x * library.cos(timestep / 150) + library.sin(timestep / 90)
    )


def with_formula(solver: Solver, steps: int) -> float:
    noise = cases_sana.draw(7, 2, 3, 4, 5)
    expected = reference_solve(lambda x, t: formula(x, t, torch), noise, solver=solver, steps=steps)
    run = jax.jit(lambda z: solve(lambda x, t: formula(x, t, jnp), z, steps=steps, solver=solver))
    return relative_l2(run(noise), expected)


@functools.cache
def pictures_of_diffusers(solver: Solver, steps: int) -> np.ndarray:
    """[B, h, w, C]: what diffusers' scheduler and Sana draw from the noise of `with_sana`."""
    pair = cases_sana.small("1.5")
    arguments = {
        "encoder_hidden_states": to_torch(cases_sana.condition_of(pair)),
        "encoder_attention_mask": to_torch(cases_sana.VALID),
    }

    def velocity(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        timesteps = timestep.expand(cases_sana.BATCH)
        return pair.reference(x, timestep=timesteps, **arguments).sample

    noise = cases_sana.latents_of(pair).transpose(0, 3, 1, 2)
    return reference_solve(velocity, noise, solver=solver, steps=steps).permute(0, 2, 3, 1).numpy()


def with_sana(solver: Solver, *, steps: int = 20, shift: float = 3.0) -> float:
    """Our solver with our DiT against diffusers' with diffusers'."""
    pair = cases_sana.small("1.5")
    condition = cases_sana.condition_of(pair)

    def velocity(x: jax.Array, timestep: jax.Array) -> jax.Array:
        timesteps = jnp.full((cases_sana.BATCH,), timestep)
        return SanaTransformer(pair.config).apply(
            {"params": pair.params}, x, timesteps, condition, cases_sana.VALID
        )

    run = jax.jit(lambda z: solve(velocity, z, steps=steps, shift=shift, solver=solver))
    return relative_l2(run(cases_sana.latents_of(pair)), pictures_of_diffusers(solver, steps))


def cases() -> list[Case]:
    """Sana over 20 steps, and every number of steps at which diffusers' solver changes its order."""
    rows = [
        Case(
            f"solver / {name}, 20 steps of a Sana",
            TOLERANCE,
            functools.partial(with_sana, solver),
        )
        for solver, name in NAMES.items()
    ]
    rows += [
        Case(
            f"solver / {name}, a formula, steps: {steps}",
            TOLERANCE,
            functools.partial(with_formula, solver, steps),
        )
        for solver, name in NAMES.items()
        for steps in STEPS
    ]
    return rows


def _first_order_everywhere() -> float:
    with mock.patch.object(
        solvers, "lean_factors", lambda sigmas, solver: np.zeros(len(sigmas) - 1)
    ):
        return with_sana(Solver.DPM_SOLVER_PP)


def _second_order_to_the_end() -> float:
    right = solvers.lean_factors

    def leaning(sigmas: np.ndarray, solver: Solver) -> np.ndarray:
        return np.append(right(sigmas, solver)[:-1], 0.5)

    with mock.patch.object(solvers, "lean_factors", leaning):
        return with_sana(Solver.DPM_SOLVER_PP)


def _timesteps_with_fractions() -> float:
    with mock.patch.object(solvers, "model_timesteps", lambda sigmas, solver: 1000 * sigmas[:-1]):
        return with_sana(Solver.DPM_SOLVER_PP)


def _shift_twice() -> float:
    right = solvers.shifted
    with mock.patch.object(solvers, "shifted", lambda s, shift: right(right(s, shift), shift)):
        return with_sana(Solver.EULER)


def sabotage() -> list[Sabotage]:
    """The solvers broken in one place each."""
    return [
        Sabotage(f"solver / {name}", TOLERANCE, measure)
        for name, measure in (
            ("DPM-Solver++ with shift 1", lambda: with_sana(Solver.DPM_SOLVER_PP, shift=1.0)),
            ("Euler with shift 1", lambda: with_sana(Solver.EULER, shift=1.0)),
            ("Euler shifted twice", _shift_twice),
            ("DPM-Solver++ of first order everywhere", _first_order_everywhere),
            ("DPM-Solver++ of second order to the end", _second_order_to_the_end),
            ("DPM-Solver++, timesteps with their fractions", _timesteps_with_fractions),
        )
    ]
