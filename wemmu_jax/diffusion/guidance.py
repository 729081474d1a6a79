"""Classifier-free guidance of three kinds (paper, Eq. 5 to 7), as weights over branches.

Every kind is a weighted sum of the velocities of its branches, the weights adding up to 1. A solver never
knows: it is handed one velocity function. B batch, C channels.
"""

import dataclasses
import enum
import math
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from wemmu_jax.files import read_object


class Branch(enum.StrEnum):
    """What the VLM is given."""

    NOTHING = "nothing"  # neither picture nor text
    SOURCE = "source"  # the source picture and the reconstruction prompt
    REQUEST = "request"  # the user's pictures and text


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Branches with their weights; branches of weight 0 are left out, so scale 1 costs one branch."""

    weights: tuple[tuple[Branch, float], ...]

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches, in the order in which `guided` expects their conditions."""
        return tuple(branch for branch, _ in self.weights)


def _guidance(**weights: float) -> Guidance:
    return Guidance(
        tuple((Branch(name), weight) for name, weight in weights.items() if weight != 0)
    )


def request_guidance(scale: float) -> Guidance:
    """u + scale (c - u): text to image (Eq. 5, scale 4) and several images (Eq. 7, scale 3)."""
    return _guidance(nothing=1 - scale, request=scale)


def edit_guidance(*, image: float, edit: float) -> Guidance:
    """u + image (rec - u) + edit (edit - rec): one image (Eq. 6, scales 2 and 3)."""
    return _guidance(nothing=1 - image, source=image - edit, request=edit)


@dataclasses.dataclass(frozen=True)
class Scales:
    """How strongly a model is guided where a request does not say; the paper's, unless the model has its own.

    Attributes:
      generate: text to image.
      image: an edit's, towards its source.
      edit: an edit's, towards the instruction.
      compose: several images.
      reconstruct: the same image again.
    """

    generate: float = 4.0
    image: float = 2.0
    edit: float = 3.0
    compose: float = 3.0
    reconstruct: float = 2.0

    @classmethod
    def read(cls, file: pathlib.Path) -> "Scales":
        """A JSON object with any of these scales; the others, and all without such a file, are the paper's.

        Raises:
          ValueError: it is none, has an unknown key, or a scale is not a finite number.
        """
        found = read_object(file) if file.exists() else {}
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(found) - set(known)):
            raise ValueError(f"{file}: unknown keys {unknown}; known: {known}")
        for name, scale in found.items():
            if type(scale) not in (int, float) or not math.isfinite(scale):
                raise ValueError(f"{file}: {name}: expected a finite number, found {scale!r}")
        return cls(**{name: float(scale) for name, scale in found.items()})


PAPER = Scales()
Velocity = Callable[[jax.Array, jax.Array], jax.Array]


def guided(velocity: Velocity, guidance: Guidance) -> Velocity:
    """Wraps `velocity`, which takes the branches of all rows stacked branch by branch.

    Args:
      velocity: (latents [G * B, h, w, C], timestep float32[]) -> [G * B, h, w, C], where rows g * B to
        (g + 1) * B are conditioned on branch g of `guidance.branches`.
      guidance: G branches.

    Returns:
      (latents [B, h, w, C], timestep) -> float32 [B, h, w, C].
    """
    weights = jnp.asarray([weight for _, weight in guidance.weights], jnp.float32)
    count = len(guidance.weights)

    def combined(latents: jax.Array, timestep: jax.Array) -> jax.Array:
        stacked = velocity(jnp.concatenate([latents] * count), timestep).astype(jnp.float32)
        parts = stacked.reshape(count, *latents.shape)
        # Differences of nearby velocities are amplified, so the sum is taken in full float32.
        return jnp.einsum("g,gbhwc->bhwc", weights, parts, precision="highest")

    return combined
