"""Configuration of Qwen2.5-VL: what a Hugging Face `config.json` says, checked and frozen."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

# Both are constants of the architecture, which the published configs leave out.
VISION_ROPE_THETA = 10_000.0
VISION_RMS_NORM_EPS = 1e-6

# Keys of `config.json` that are read as they are, under the names of our fields.
_TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
_VISION_FIELDS = (
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "in_channels",
    "patch_size",
    "temporal_patch_size",
    "spatial_merge_size",
    "window_size",
    "out_hidden_size",
)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision transformer; the fields have the names of the reference's `vision_config`."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int
    fullatt_block_indexes: tuple[int, ...]
    out_hidden_size: int

    def __post_init__(self):
        _check_divides("vision_config.hidden_size", self.hidden_size, "num_heads", self.num_heads)
        if self.head_dim % 4:
            raise ValueError(
                "vision_config.hidden_size / num_heads: expected a multiple of 4 (rows and columns "
                f"take half of the rotary pairs each), found {self.head_dim}"
            )
        if self.window_units < 1:
            raise ValueError(
                f"vision_config.window_size: expected at least {self.unit} pixels (one merged token), "
                f"found {self.window_size}"
            )
        layers = range(self.depth)
        if outside := [i for i in self.fullatt_block_indexes if i not in layers]:
            raise ValueError(
                f"vision_config.fullatt_block_indexes: expected layers 0 to {self.depth - 1}, "
                f"found {outside}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Values of one flattened patch: channels x frames x rows x columns."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def unit(self) -> int:
        """Side of one merged token in pixels."""
        return self.patch_size * self.spatial_merge_size

    @property
    def window_units(self) -> int:
        """Side of one attention window in merged tokens."""
        return self.window_size // self.spatial_merge_size // self.patch_size

    @property
    def slot_units(self) -> int:
        """Merged tokens of a whole window, which is what a slot of the packed layout holds."""
        return self.window_units**2


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The language model; the fields have the names of the reference's `text_config`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    tie_word_embeddings: bool

    def __post_init__(self):
        heads = self.num_attention_heads
        _check_divides("hidden_size", self.hidden_size, "num_attention_heads", heads)
        _check_divides(
            "num_attention_heads", heads, "num_key_value_heads", self.num_key_value_heads
        )
        _check_equal("head_dim", self.hidden_size // heads, self.head_dim)
        sections = self.mrope_section
        whole = all(_is_whole(section) for section in sections)
        if not whole or len(sections) != 3 or 2 * sum(sections) != self.head_dim:
            raise ValueError(
                f"mrope_section: expected three numbers that add up to {self.head_dim / 2:g} "
                f"(half the head width), found {list(sections)}"
            )


@dataclasses.dataclass(frozen=True)
class Qwen25VLConfig:
    """The whole model. `eos_token_ids` are those of `config.json`; `generation_config.json` may name more."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    eos_token_ids: tuple[int, ...]

    def __post_init__(self):
        _check_equal(
            "vision_config.out_hidden_size", self.text.hidden_size, self.vision.out_hidden_size
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Qwen25VLConfig":
        """Reads either form of `config.json`: as published (the language model's keys at the top level) or as
        transformers 5 writes it (nested `text_config`).

        Raises:
          ValueError: a key is missing, or asks for what the model here does not do; names key, expected, found.
        """
        _check_equal("model_type", "qwen2_5_vl", config.get("model_type"))
        # `from_pretrained` of transformers prefers the nested form too, if both are there.
        text = _object(config, "text_config") or config
        tied = config.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
        eos = _get(text, "eos_token_id", config)
        eos = eos if isinstance(eos, list) else [eos]
        ids = {name: _get(config, name) for name in _TOKEN_IDS}
        for key, value in [*ids.items(), *(("eos_token_id", end) for end in eos)]:
            if not _is_whole(value):
                raise ValueError(f"{key}: expected a token's id, found {value!r}")
        return cls(
            text=_text_from_hf(text, tie_word_embeddings=bool(tied)),
            vision=_vision_from_hf(_object(config, "vision_config")),
            eos_token_ids=tuple(eos),
            **ids,
        )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_equal(key: str, expected, found) -> None:
    if found != expected:
        raise ValueError(f"{key}: expected {expected!r}, found {found!r}")


def _check_divides(key: str, value: int, divisor_key: str, divisor: int) -> None:
    if divisor < 1 or value % divisor:
        raise ValueError(f"{key}: expected a multiple of {divisor_key} ({divisor}), found {value}")


def _get(config: Mapping[str, Any], key: str, *fallbacks: Mapping[str, Any], prefix: str = ""):
    for place in (config, *fallbacks):
        if place.get(key) is not None:
            return place[key]
    raise ValueError(f"{prefix}{key}: expected in the configuration, not found")


def _object(config: Mapping[str, Any], key: str, *, prefix: str = "") -> Mapping[str, Any]:
    """The object under `key`; empty where there is none."""
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{prefix}{key}: expected an object, found {value!r}")
    return value


def _list(config: Mapping[str, Any], key: str, *, prefix: str = "") -> tuple:
    value = _get(config, key, prefix=prefix)
    if not isinstance(value, list | tuple):
        raise ValueError(f"{prefix}{key}: expected a list, found {value!r}")
    return tuple(value)


def _sizes(config: Mapping[str, Any], names: Iterable[str], *, prefix: str = "") -> dict[str, int]:
    sizes = {name: _get(config, name, prefix=prefix) for name in names}
    for name, size in sizes.items():
        if not _is_whole(size) or size < 1:
            raise ValueError(f"{prefix}{name}: expected one whole number above 0, found {size!r}")
    return sizes


def _positive(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{key}: expected a number above 0, found {value!r}")
    return float(value)


def _text_from_hf(text: Mapping[str, Any], *, tie_word_embeddings: bool) -> TextConfig:
    _check_equal("hidden_act", "silu", _get(text, "hidden_act"))
    _check_equal("use_sliding_window", False, text.get("use_sliding_window") or False)
    kinds = _list(text, "layer_types") if text.get("layer_types") else ()
    sliding = [kind for kind in kinds if kind != "full_attention"]
    _check_equal("layer_types other than full_attention", [], sliding)
    rope = _object(text, "rope_parameters") or _object(text, "rope_scaling")
    kind = rope.get("rope_type") or rope.get("type")
    if kind not in ("mrope", "default"):
        raise ValueError(f"rope_scaling: expected type 'mrope' or 'default', found {kind!r}")
    sizes = _sizes(text, _TEXT_FIELDS)
    return TextConfig(
        **sizes,
        head_dim=text.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"],
        rms_norm_eps=_positive("rms_norm_eps", _get(text, "rms_norm_eps")),
        rope_theta=_positive("rope_theta", _get(rope, "rope_theta", text)),
        mrope_section=_list(rope, "mrope_section"),
        tie_word_embeddings=tie_word_embeddings,
    )


def _vision_from_hf(vision: Mapping[str, Any]) -> VisionConfig:
    prefix = "vision_config."
    if "in_channels" not in vision and "in_chans" in vision:
        # The published files say `in_chans`; transformers reads and writes `in_channels`.
        vision = {**vision, "in_channels": vision["in_chans"]}
    _check_equal(f"{prefix}hidden_act", "silu", _get(vision, "hidden_act", prefix=prefix))
    rope = _object(vision, "rope_parameters", prefix=prefix) or {"rope_theta": VISION_ROPE_THETA}
    _check_equal(f"{prefix}rope_theta", VISION_ROPE_THETA, rope.get("rope_theta"))
    sizes = _sizes(vision, _VISION_FIELDS, prefix=prefix)
    full = _list(vision, "fullatt_block_indexes", prefix=prefix)
    return VisionConfig(**sizes, fullatt_block_indexes=full)


def qwen2_5_vl_3b() -> Qwen25VLConfig:
    """The published Qwen2.5-VL-3B-Instruct."""
    return Qwen25VLConfig(
        text=TextConfig(
            vocab_size=151_936,
            hidden_size=2048,
            intermediate_size=11_008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=2,
            head_dim=128,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            mrope_section=(16, 24, 24),
            tie_word_embeddings=True,
        ),
        vision=VisionConfig(
            depth=32,
            hidden_size=1280,
            intermediate_size=3420,
            num_heads=16,
            in_channels=3,
            patch_size=14,
            temporal_patch_size=2,
            spatial_merge_size=2,
            window_size=112,
            fullatt_block_indexes=(7, 15, 23, 31),
            out_hidden_size=2048,
        ),
        image_token_id=151_655,
        video_token_id=151_656,
        vision_start_token_id=151_652,
        vision_end_token_id=151_653,
        eos_token_ids=(151_645,),
    )
