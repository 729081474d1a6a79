"""Sana, the diffusion transformer that paints: noisy latents, time and condition -> velocity."""

from wemmu_jax.models.sana.config import SanaConfig
from wemmu_jax.models.sana.modeling import SanaTransformer

__all__ = ["SanaConfig", "SanaTransformer"]
