"""Sizes of a DC-AE, and how they are read from a diffusers folder."""

import dataclasses
import enum
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any


class BlockKind(enum.Enum):
    """What a stage is made of; the values are the names in a diffusers config."""

    RES = "ResBlock"
    EFFICIENT_VIT = "EfficientViTBlock"


@dataclasses.dataclass(frozen=True)
class Stage:
    """The blocks that work at one resolution.

    Attributes:
      width: channels C.
      layers: how many equal blocks.
      kind: which block.
      kernel_sizes: sizes of the depthwise kernels that give an EfficientViT block's further scales of query,
        key and value; empty in a stage of ResBlocks.
    """

    width: int
    layers: int
    kind: BlockKind = BlockKind.RES
    kernel_sizes: tuple[int, ...] = ()


# Settings in which all DC-AEs of Sana agree; a model with others is another architecture.
_FIXED: Mapping[str, Any] = {
    "in_channels": 3,
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "decoder_conv_act_fn": "relu",
    "encoder_out_shortcut": True,
    "decoder_in_shortcut": True,
}

# What diffusers' `AutoencoderDC` takes where a config.json says nothing; older files lack the newer keys.
_CLASS_DEFAULTS: Mapping[str, Any] = {
    "in_channels": 3,
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
    "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "upsample_block_type": "pixel_shuffle",
    "downsample_block_type": "pixel_unshuffle",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "encoder_out_shortcut": True,
    "decoder_in_shortcut": True,
    "decoder_conv_act_fn": "relu",
    "scaling_factor": 1.0,
}


def _published(*layers: int) -> tuple[Stage, ...]:
    vit = (BlockKind.EFFICIENT_VIT, (5,))
    kinds = ((BlockKind.RES, ()),) * 3 + (vit,) * 3
    widths = (128, 256, 512, 512, 1024, 1024)
    return tuple(
        Stage(width, count, *kind) for width, count, kind in zip(widths, layers, kinds, strict=True)
    )


@dataclasses.dataclass(frozen=True)
class DCAEConfig:
    """Sizes of a DC-AE; as it stands, the published f32c32 model of Sana (DC-AE, arXiv 2410.10733).

    Attributes:
      encoder: stages from pixels to latents, each at half the resolution of the one before.
      decoder: the same order, finest first; the decoder runs them from the last to the first.
      latent_channels: C of the latents.
      head_dim: H, width of an attention head.
      scaling_factor: latents of the diffusion model = this factor x output of the encoder.
    """

    encoder: tuple[Stage, ...] = _published(2, 2, 2, 3, 3, 3)
    decoder: tuple[Stage, ...] = _published(3, 3, 3, 3, 3, 3)
    latent_channels: int = 32
    head_dim: int = 32
    scaling_factor: float = 0.41407

    def __post_init__(self):
        if len(self.encoder) != len(self.decoder) or not self.encoder:
            raise ValueError(
                "DC-AE config: encoder_block_out_channels and decoder_block_out_channels: expected the same number of "
                f"stages, at least one, found {len(self.encoder)} and {len(self.decoder)}"
            )
        for side, stages in (("encoder", self.encoder), ("decoder", self.decoder)):
            _check_stages(side, stages, head_dim=self.head_dim, latents=self.latent_channels)

    @property
    def ratio(self) -> int:
        """Pixels along one side of a latent."""
        return 2 ** (len(self.encoder) - 1)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DCAEConfig":
        """Reads a diffusers `vae/config.json`; keys it lacks take the defaults of diffusers' class.

        Raises:
          ValueError: the config describes a DC-AE that is not of the f32c32 family of Sana.
        """
        config = {**_CLASS_DEFAULTS, **config}
        for key, expected in _FIXED.items():
            found = config[key]
            values = found if isinstance(found, list | tuple) and found else [found]
            if any(_lower(value) != expected for value in values):
                raise ValueError(f"DC-AE config: {key}: expected {expected!r}, found {found!r}")
        factor = config["scaling_factor"]
        if type(factor) not in (int, float) or not 0 < factor < math.inf:
            raise ValueError(
                f"DC-AE config: scaling_factor: expected a number above 0, found {factor!r}"
            )
        return cls(
            encoder=_stages(config, "encoder"),
            decoder=_stages(config, "decoder"),
            latent_channels=_size(config, "latent_channels"),
            head_dim=_size(config, "attention_head_dim"),
            scaling_factor=factor,
        )


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _size(config: Mapping[str, Any], key: str) -> int:
    [size] = _sizes(key, [config[key]])
    return size


def _sizes(key: str, values: Any, *, least: int = 1) -> Sequence[int]:
    """`values` themselves, a list of whole numbers from `least` on."""
    is_list = isinstance(values, list | tuple)
    if not is_list or not all(type(value) is int and value >= least for value in values):
        raise ValueError(
            f"DC-AE config: {key}: expected whole numbers of at least {least}, found {values!r}"
        )
    return values


def _stages(config: Mapping[str, Any], side: str) -> tuple[Stage, ...]:
    widths = _sizes(f"{side}_block_out_channels", config[f"{side}_block_out_channels"])
    kinds = config[f"{side}_block_types"]
    if isinstance(kinds, str):
        kinds = [kinds] * len(widths)
    columns: dict[str, Sequence[Any]] = {
        "layers_per_block": config[f"{side}_layers_per_block"],
        "block_types": kinds,
        "qkv_multiscales": config[f"{side}_qkv_multiscales"],
    }
    for key, column in columns.items():
        if not isinstance(column, list | tuple) or len(column) != len(widths):
            raise ValueError(
                f"DC-AE config: {side}_{key}: expected one value for each of the {len(widths)} stages, "
                f"found {column!r}"
            )
    _sizes(f"{side}_layers_per_block", columns["layers_per_block"], least=0)
    stages = []
    for width, layers, kind, scales in zip(widths, *columns.values(), strict=True):
        known = [k.value for k in BlockKind]
        if kind not in known:
            raise ValueError(
                f"DC-AE config: {side}_block_types: expected one of {known}, found {kind!r}"
            )
        _sizes(f"{side}_qkv_multiscales", scales)
        kernel_sizes = tuple(scales) if BlockKind(kind) is BlockKind.EFFICIENT_VIT else ()
        stages.append(Stage(width, layers, BlockKind(kind), kernel_sizes))
    return tuple(stages)


def _check_stages(side: str, stages: tuple[Stage, ...], *, head_dim: int, latents: int) -> None:
    """Raises ValueError where stages do not fit each other, the head width or the latents."""
    for i, stage in enumerate(stages):
        where = f"DC-AE config: {side} stage {i}"
        if stage.layers < 1:
            raise ValueError(
                f"{where}: layers_per_block: expected at least 1, found {stage.layers}"
            )
        if stage.kind is BlockKind.EFFICIENT_VIT and stage.width < head_dim:
            raise ValueError(
                f"{where}: block_out_channels: expected at least attention_head_dim = {head_dim}, "
                f"found {stage.width}"
            )
        if any(size < 1 or size % 2 == 0 for size in stage.kernel_sizes):
            raise ValueError(
                f"{where}: qkv_multiscales: expected odd kernel sizes, found {list(stage.kernel_sizes)}"
            )
    # The shortcut of a step between two widths averages, or repeats, whole groups of channels.
    for i, (fine, coarse) in enumerate(itertools.pairwise(stages)):
        if 4 * fine.width % coarse.width:
            raise ValueError(
                f"DC-AE config: {side}_block_out_channels: expected 4 x {fine.width} (stage {i}) to be a multiple "
                f"of stage {i + 1}, found {coarse.width}"
            )
    if stages[-1].width % latents:
        raise ValueError(
            f"DC-AE config: {side}_block_out_channels: expected the last to be a multiple of latent_channels = "
            f"{latents}, found {stages[-1].width}"
        )
