"""DC-AE f32c32, the autoencoder of Sana: pixels to latents of 32 channels, one for 32x32 pixels, and back."""

from wemmu_jax.models.dc_ae.config import DCAEConfig
from wemmu_jax.models.dc_ae.modeling import DCAE

__all__ = ["DCAE", "DCAEConfig"]
