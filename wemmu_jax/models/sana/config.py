"""Configuration of the Sana diffusion transformer, read from diffusers' `transformer/config.json`."""

import dataclasses
import math
from collections.abc import Mapping

_SIZES = (
    "in_channels",
    "out_channels",
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "num_cross_attention_heads",
    "cross_attention_head_dim",
    "caption_channels",
)

_NUMBERS = ("mlp_ratio", "norm_eps")

# What the port computes; diffusers allows other values, which no published text-to-image Sana of 512 or
# 1024 px sets. Keys that the files of older diffusers lack have diffusers' default here.
_FIXED = {
    "_class_name": "SanaTransformer2DModel",
    "attention_bias": False,
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "patch_size": 1,
    "interpolation_scale": None,
    "guidance_embeds": False,
    "timestep_scale": 1.0,
}

# `sample_size` is the resolution a checkpoint was made for; without position embedding nothing depends on it.
_WITHOUT_EFFECT = ("sample_size", "guidance_embeds_scale")

_QK_NORMS = {None: False, "rms_norm_across_heads": True}


@dataclasses.dataclass(frozen=True)
class SanaConfig:
    """Sizes of a Sana transformer, under diffusers' names; the defaults are Sana 1.5 1.6B.

    Attributes:
      in_channels: C of the noisy latents.
      out_channels: C of the velocity.
      num_layers: number of blocks.
      num_attention_heads: heads of the linear self-attention.
      attention_head_dim: width of one of them.
      num_cross_attention_heads: heads of the cross-attention.
      cross_attention_head_dim: width of one of them.
      caption_channels: width of the condition.
      mlp_ratio: hidden width of the feed-forward network over the model width.
      norm_eps: epsilon of the layer norms in the blocks.
      qk_norm: RMS norms over all heads of queries and keys in both attentions (Sana 1.5).
    """

    in_channels: int = 32
    out_channels: int = 32
    num_layers: int = 20
    num_attention_heads: int = 70
    attention_head_dim: int = 32
    num_cross_attention_heads: int = 20
    cross_attention_head_dim: int = 112
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    norm_eps: float = 1e-6
    qk_norm: bool = True

    def __post_init__(self):
        for name in _SIZES:
            size = getattr(self, name)
            _check(name, type(size) is int and size > 0, "a whole number above 0", size)
        for name in _NUMBERS:
            number = getattr(self, name)
            good = type(number) in (int, float) and 0 < number < math.inf
            _check(name, good, "a number above 0", number)

    @property
    def width(self) -> int:
        """D, the model width."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def cross_width(self) -> int:
        """All heads of the cross-attention together."""
        return self.num_cross_attention_heads * self.cross_attention_head_dim

    @property
    def ffn_width(self) -> int:
        """Hidden width of the feed-forward network after its gate."""
        return int(self.mlp_ratio * self.width)

    @classmethod
    def from_hf(cls, hf: Mapping) -> "SanaConfig":
        """Reads the contents of diffusers' `transformer/config.json`.

        Raises:
          ValueError: a size is missing, a key is unknown, or a value asks for what this port does not compute:
            position embedding (`interpolation_scale`, the 2K and 4K models), `guidance_embeds` (Sana Sprint).
        """
        required = (*_SIZES, *_NUMBERS, "cross_attention_dim")
        known = {*required, *_FIXED, *_WITHOUT_EFFECT, "qk_norm"}
        for key in hf:
            if key not in known and not key.startswith("_"):
                raise ValueError(f"{key}: unknown to the Sana port, found {hf[key]!r}")
        for key in required:
            if key not in hf:
                raise ValueError(f"{key}: expected in the configuration, not found")
        for key, expected in _FIXED.items():
            found = hf.get(key, expected)
            _check(key, found == expected, repr(expected), found)
        qk_norm = hf.get("qk_norm")
        _check("qk_norm", qk_norm in list(_QK_NORMS), " or ".join(map(repr, _QK_NORMS)), qk_norm)
        sizes = {key: hf[key] for key in (*_SIZES, *_NUMBERS)}
        config = cls(**sizes, qk_norm=_QK_NORMS[qk_norm])
        found = hf["cross_attention_dim"]
        _check("cross_attention_dim", found == config.width, f"{config.width} (all heads)", found)
        return config


def _check(key: str, good: bool, expected: str, found: object) -> None:
    if not good:
        raise ValueError(f"{key}: expected {expected}, found {found!r}")
