"""DC-AE (arXiv 2410.10733): encoder, decoder and the two as one model. B batch, H W pixels, h w latents, C channels."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from wemmu_jax.models.dc_ae.blocks import (
    NORM_EPS,
    Down,
    EfficientViTBlock,
    ResBlock,
    Up,
    average_groups,
    conv3x3,
    repeat_channels,
)
from wemmu_jax.models.dc_ae.config import BlockKind, DCAEConfig, Stage
from wemmu_jax.models.dc_ae.strips import count_strips, cut, joined, refresh
from wemmu_jax.ops.norms import RMSNorm


def run_stage(
    x: jax.Array, stage: Stage, *, head_dim: int, dtype: jnp.dtype, name: str, strips: int = 1
) -> jax.Array:
    """The equal blocks of a stage as one scan, called inside a compact method; parameters [layers, ...]."""
    if stage.kind is BlockKind.RES:
        block, more = ResBlock(dtype, name=name), (strips,)
    else:
        block, more = EfficientViTBlock(head_dim, stage.kernel_sizes, dtype, name=name), ()
    scan = nn.scan(
        lambda block, x, _: (block(x, *more), None),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=stage.layers,
        # One layer without a loop: XLA's CPU backward pass of a convolution is five times slower inside one.
        unroll=2 if stage.layers == 1 else 1,
    )
    return scan(block, x, None)[0]


class Encoder(nn.Module):
    """Pixels to unscaled latents (diffusers `autoencoder_dc.Encoder`)."""

    config: DCAEConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """pixels [B, H, W, 3] -> [B, h, w, C] in `dtype`."""
        config, stages = self.config, self.config.encoder
        whole = [i for i, stage in enumerate(stages) if stage.kind is not BlockKind.RES]
        strips = count_strips(pixels.shape, 2 ** min([*whole, len(stages) - 1]))
        pixels = cut(pixels, strips)
        x = refresh(conv3x3(stages[0].width, dtype=self.dtype, name="conv_in")(pixels), strips)
        for i, stage in enumerate(stages):
            if i > 0:
                x = Down(stage.width, self.dtype, name=f"down_{i}")(x, strips)
            if i in whole:  # its attention is over the whole picture
                x, strips = joined(x, strips), 1
            options = {"head_dim": config.head_dim, "dtype": self.dtype, "name": f"stage_{i}"}
            x = run_stage(x, stage, strips=strips, **options)
        x = joined(x, strips)
        shortcut = average_groups(x, config.latent_channels)
        return conv3x3(config.latent_channels, dtype=self.dtype, name="conv_out")(x) + shortcut


class Decoder(nn.Module):
    """Unscaled latents to pixels (diffusers `autoencoder_dc.Decoder`)."""

    config: DCAEConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, latents: jax.Array) -> jax.Array:
        """latents [B, h, w, C] -> pixels [B, H, W, 3] in `dtype`."""
        config, stages = self.config, self.config.decoder
        latents = latents.astype(self.dtype)
        shortcut = repeat_channels(latents, stages[-1].width)
        x = conv3x3(stages[-1].width, dtype=self.dtype, name="conv_in")(latents) + shortcut
        for i, stage in reversed(list(enumerate(stages))):
            if i + 1 < len(stages):
                x = Up(stage.width, self.dtype, name=f"up_{i}")(x)
            x = run_stage(x, stage, head_dim=config.head_dim, dtype=self.dtype, name=f"stage_{i}")
        x = RMSNorm(NORM_EPS, use_bias=True, dtype=self.dtype, name="norm_out")(x)
        return conv3x3(3, dtype=self.dtype, name="conv_out")(nn.relu(x))


class DCAE(nn.Module):
    """The autoencoder, in the units of the diffusion model (diffusers `AutoencoderDC`, no tiling).

    Use it through `apply(..., method="encode")` or `method="decode"`; either works with its own half of the
    parameters, `{"encoder": ...}` or `{"decoder": ...}`.
    """

    config: DCAEConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """There and back, [B, H, W, 3] -> [B, H, W, 3]; what `init` runs."""
        return self.decode(self.encode(pixels))

    def encode(self, pixels: jax.Array) -> jax.Array:
        """Pictures as latents of about unit variance.

        Args:
          pixels: [B, H, W, 3] in [-1, 1]; H and W are multiples of `config.ratio`.

        Returns:
          float32[B, h, w, C], the encoder's output times `scaling_factor`; h = H / ratio, w = W / ratio.

        Raises:
          ValueError: the stages do not divide the size, or the shape is another.
        """
        ratio = self.config.ratio
        if pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise ValueError(f"DC-AE encode: expected pixels [B, H, W, 3], found {pixels.shape}")
        if pixels.shape[1] % ratio or pixels.shape[2] % ratio:
            raise ValueError(
                f"DC-AE encode: expected height and width to be multiples of {ratio}, "
                f"found {pixels.shape[1]}x{pixels.shape[2]}"
            )
        return self.encoder(pixels).astype(jnp.float32) * self.config.scaling_factor

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents of the diffusion model as pictures.

        Args:
          latents: [B, h, w, C].

        Returns:
          float32[B, H, W, 3], near [-1, 1] but not clipped; H = h * ratio, W = w * ratio.

        Raises:
          ValueError: the shape is another.
        """
        channels = self.config.latent_channels
        if latents.ndim != 4 or latents.shape[-1] != channels:
            raise ValueError(
                f"DC-AE decode: expected latents [B, h, w, {channels}], found {latents.shape}"
            )
        unscaled = latents.astype(jnp.float32) / self.config.scaling_factor
        return self.decoder(unscaled).astype(jnp.float32)
