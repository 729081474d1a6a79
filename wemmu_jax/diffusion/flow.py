"""The path between picture and noise, and how its times are drawn. B batch, C channels.

sigma in [0, 1] is the share of noise: x_sigma = (1 - sigma) x_0 + sigma eps (paper, Eq. 2). The model is fed
1000 sigma.
"""

import enum

import jax
import jax.numpy as jnp

from wemmu_jax.rng import Stream, per_sample, stream_key

TIMESTEPS = 1000.0


class TimeLaw(enum.StrEnum):
    """How sigma is drawn before the shift."""

    LOGIT_NORMAL = "logit_normal"  # sigmoid(N(0, 1)), as Sana is trained
    UNIFORM = "uniform"


def shifted(sigma: jax.Array, shift: float) -> jax.Array:
    """Moves times towards noise: s sigma / (1 + (s - 1) sigma), as Sana's `flow_shift`."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def draw_sigma(
    seed: int | jax.Array, numbers: jax.Array, *, law: TimeLaw, shift: float
) -> jax.Array:
    """float32[B], one sigma for each global sample number uint32[B]."""

    def draw(key: jax.Array) -> jax.Array:
        if law is TimeLaw.UNIFORM:
            return jax.random.uniform(key, (), jnp.float32)
        return jax.nn.sigmoid(jax.random.normal(key, (), jnp.float32))

    return shifted(per_sample(stream_key(seed, Stream.FLOW_TIME), numbers, draw), shift)


def draw_flow_noise(seed: int | jax.Array, numbers: jax.Array, shape: tuple) -> jax.Array:
    """float32[B, *shape], the eps of each global sample number uint32[B]."""
    key = stream_key(seed, Stream.FLOW_NOISE)
    return per_sample(key, numbers, lambda k: jax.random.normal(k, shape, jnp.float32))


def noised(clean: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
    """x_sigma, Eq. 2: clean and noise float32[B, h, w, C], sigma float32[B]."""
    sigma = sigma[:, None, None, None]
    return (1 - sigma) * clean + sigma * noise


def target_velocity(clean: jax.Array, noise: jax.Array) -> jax.Array:
    """v+ = eps - x_0 (paper, Eq. 3)."""
    return noise - clean
