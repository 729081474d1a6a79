"""How large the models and inputs of a comparison are. The configs are what Hugging Face's `config.json`s say."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import Qwen2_5_VLConfig

from wemmu_jax.models.dc_ae.config import DCAEConfig
from wemmu_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from wemmu_jax.models.sana.config import SanaConfig
from wemmu_jax.models.wemmu.config import BridgeConfig, WeMMUConfig

RES, VIT = "ResBlock", "EfficientViTBlock"
_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def _text(width: int, inner: int, layers: int, heads: int, sections: list[int], words: int) -> dict:
    return {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default", "mrope_section": sections},
        "bos_token_id": 1,
        "eos_token_id": 1,
    }


def _vision(width: int, inner: int, layers: int, heads: int, full: list[int], out: int) -> dict:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "depth": layers,
        "num_heads": heads,
        "fullatt_block_indexes": full,
        "out_hidden_size": out,
        "in_channels": 3,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 112,
    }


def _dc_ae(widths: tuple, kinds: tuple, encoder: tuple, decoder: tuple, channels: int) -> dict:
    scales = tuple((5,) if kind == VIT else () for kind in kinds)
    return {
        "latent_channels": channels,
        "attention_head_dim": 32 if channels == 32 else 8,
        "encoder_block_types": kinds,
        "decoder_block_types": kinds,
        "encoder_block_out_channels": widths,
        "decoder_block_out_channels": widths,
        "encoder_layers_per_block": encoder,
        "decoder_layers_per_block": decoder,
        "encoder_qkv_multiscales": scales,
        "decoder_qkv_multiscales": scales,
        "downsample_block_type": "Conv",
        "upsample_block_type": "interpolate",
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
        "scaling_factor": 0.41407,
    }


@dataclasses.dataclass(frozen=True)
class Sizes:
    """One comparison.

    Attributes:
      name: of its section in docs/performance.md.
      text, vision, dit, dc_ae: keys of Hugging Face's configs.
      bridge: what is between them.
      side: of drawn and source pictures, pixels.
      pictures: drawn in one call.
      rows: of a training micro-batch.
      text_tokens: of a request.
      new_tokens: decoded.
      solver_steps: of a picture.
      dtype: of weights and large products; what learns is float32.
      device: torch's name of it.
      apart: in training rows only one library's state is on the device at a time.
      regional: torch compiles the repeated layer instead of the whole model.
      remat: training recomputes activations, in both libraries.
      stages: the training steps to compare.
      product: side of the matrices whose product tells what the device can do.
      training_mfu: that a stage's step should reach of that; 0 asks for nothing.
      pictures_per_second: that drawing from text should reach; 0 asks for nothing.
    """

    name: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    dit: Mapping[str, Any]
    dc_ae: Mapping[str, Any]
    bridge: BridgeConfig
    side: int
    pictures: int = 1
    rows: int = 2
    text_tokens: int = 128
    new_tokens: int = 16
    solver_steps: int = 4
    dtype: str = "float32"
    device: str = "cpu"
    apart: bool = False
    regional: bool = False
    remat: bool = False
    stages: tuple[int, ...] = (1, 2)
    product: int = 2048
    training_mfu: float = 0.0
    pictures_per_second: float = 0.0

    @property
    def config(self) -> WeMMUConfig:
        """Ours."""
        ids = dict(zip(_IDS, (2, 3, 4, 5), strict=True))
        vlm = Qwen2_5_VLConfig(text_config=self.text, vision_config=self.vision, **ids)
        return WeMMUConfig(
            vlm=Qwen25VLConfig.from_hf({**vlm.to_dict(), "tie_word_embeddings": True}),
            dit=SanaConfig.from_hf(self.dit),
            dc_ae=DCAEConfig.from_hf(self.dc_ae),
            bridge=self.bridge,
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens of a source, and of the queries."""
        return self.config.query_grid(self.side, self.side)

    @property
    def exact(self) -> "Sizes":
        """The same widths in float32 with as few layers as there can be: parity where `dtype` is coarser."""
        if self.dtype == "float32":
            return self
        vision = {"depth": 2, "fullatt_block_indexes": [1]}
        blocks = (1,) * len(self.dc_ae["encoder_layers_per_block"])
        layers = {"encoder_layers_per_block": blocks, "decoder_layers_per_block": blocks}
        return dataclasses.replace(
            self,
            text={**self.text, "num_hidden_layers": 2},
            vision={**self.vision, **vision},
            dit={**self.dit, "num_layers": 2},
            dc_ae={**self.dc_ae, **layers},
            dtype="float32",
            pictures=1,
            rows=2,
            new_tokens=4,
            solver_steps=2,
        )


def _sana(layers: int, *, channels: int, heads: int, cross: int, caption: int) -> dict:
    """Heads of 32 and, across, of 112 as in the 1.6B model, or of 8 and 12."""
    head, cross_head = (32, 112) if channels == 32 else (8, 12)
    return {
        "num_layers": layers,
        "in_channels": channels,
        "out_channels": channels,
        "num_attention_heads": heads,
        "attention_head_dim": head,
        "num_cross_attention_heads": cross,
        "cross_attention_head_dim": cross_head,
        "cross_attention_dim": cross * cross_head,
        "caption_channels": caption,
        "mlp_ratio": 2.5,
        "norm_eps": 1e-6,
        "qk_norm": "rms_norm_across_heads",
    }


# Of seconds on one core; the widths are no one's.
SMALL = Sizes(
    name="small",
    text=_text(64, 112, 2, 4, [2, 3, 3], 300),
    vision={**_vision(32, 40, 2, 2, [1], 64), "patch_size": 4, "window_size": 32},
    dit=_sana(2, channels=8, heads=6, cross=4, caption=40),
    dc_ae=_dc_ae((8, 16, 16, 32), (RES, RES, VIT, VIT), (1, 1, 1, 1), (1, 1, 1, 1), 8),
    bridge=BridgeConfig(max_grid=11, position_mlp_hidden=96),
    side=64,
    text_tokens=24,
    new_tokens=6,
    solver_steps=2,
    product=256,
)

_WIDTHS, _KINDS = (128, 256, 512, 512, 1024, 1024), (RES, RES, RES, VIT, VIT, VIT)
_PUBLISHED = {
    "text": _text(2048, 11_008, 36, 16, [16, 24, 24], 151_936),
    "vision": _vision(1280, 3420, 32, 16, [7, 15, 23, 31], 2048),
    "dit": _sana(20, channels=32, heads=70, cross=20, caption=2304),
    "dc_ae": _dc_ae(_WIDTHS, _KINDS, (2, 2, 2, 3, 3, 3), (3, 3, 3, 3, 3, 3), 32),
    "bridge": BridgeConfig(),
}

# The real widths with few layers. At 448 px no window, slot or query is padding.
CPU = Sizes(
    name="cpu",
    **{
        **_PUBLISHED,
        "text": _text(2048, 11_008, 2, 16, [16, 24, 24], 32_000),
        "vision": _vision(1280, 3420, 4, 16, [3], 2048),
        "dit": _sana(2, channels=32, heads=70, cross=20, caption=2304),
        "dc_ae": _dc_ae(_WIDTHS, _KINDS, (1,) * 6, (1,) * 6, 32),
    },
    side=448,
)

# An H100 of 78 GiB holds stage 1, an H200 of 139 GiB stages 2 to 4.
_GPU = {
    "dtype": "bfloat16",
    "device": "cuda",
    "apart": True,
    "regional": True,
    "remat": True,
    "new_tokens": 128,
    "solver_steps": 20,
    "product": 8192,
    "training_mfu": 0.46,
}
GPU_512 = Sizes(name="gpu-512", **_PUBLISHED, **_GPU, side=512, pictures=16, rows=16, stages=(1,))
GPU_1024 = Sizes(
    name="gpu-1024",
    **_PUBLISHED,
    **_GPU,
    side=1024,
    pictures=4,
    rows=8,
    stages=(2,),
    pictures_per_second=2.4,
)
# The way of the GPU sizes, on a CPU.
SMALL_GPU = dataclasses.replace(
    SMALL, name="small-gpu", dtype="bfloat16", apart=True, regional=True, remat=True
)

PRESETS = {sizes.name: sizes for sizes in (SMALL, SMALL_GPU, CPU, GPU_512, GPU_1024)}
