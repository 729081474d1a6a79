"""A very small WeMMU, and micro-batches for it through the real tokenizer and the real packing.

A merged ViT token is 8 pixels wide and a latent 16, so that no test can mistake one for the other; windows of 3 x 3
tokens divide none of the grids. B rows, n source pictures.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Sequence

import jax
import numpy as np

from wemmu_jax.conversion.memory import flatten, nest
from wemmu_jax.models.dc_ae.config import DCAEConfig, Stage
from wemmu_jax.models.qwen2_5_vl.config import Qwen25VLConfig, TextConfig, VisionConfig
from wemmu_jax.models.qwen2_5_vl.images import MEAN, STD
from wemmu_jax.models.qwen2_5_vl.prompt import PromptEncoder
from wemmu_jax.models.qwen2_5_vl.tokenizer import train_tokenizer
from wemmu_jax.models.sana.config import SanaConfig
from wemmu_jax.models.wemmu.batch import PromptBatch, Sources
from wemmu_jax.models.wemmu.config import BridgeConfig, WeMMUConfig
from wemmu_jax.models.wemmu.inputs import RowEncoder, prompt_batch
from wemmu_jax.models.wemmu.modeling import WeMMUModel

Grid = tuple[int, int]

# Compiling takes most of the time of tests this small; the numbers are those of the optimised program.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

LATENT_CHANNELS = 6
TEXTS = ("a red circle left of two blue squares", "the star")
GRIDS = ((3, 5), (4, 2))
PADDING = 4  # source tokens are padded to a multiple of it

_STAGES = tuple(Stage(width, layers=1) for width in (6, 6, 12, 12, 12))


@functools.cache
def tokenizer():
    """A byte-level tokenizer that learned next to nothing."""
    with tempfile.TemporaryDirectory() as folder:
        return train_tokenizer(TEXTS, vocab_size=290, folder=folder)


@functools.cache
def prompt_encoder() -> PromptEncoder:
    """Chat template and tokenizer."""
    end = tokenizer().get_added_vocab()["<|im_end|>"]
    return PromptEncoder(tokenizer(), eos_ids=(end,))


def special_ids() -> dict[str, int]:
    """The token ids that a Qwen2.5-VL config names."""
    names = ("image", "video", "vision_start", "vision_end")
    tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    ids = tokenizer().convert_tokens_to_ids(list(tokens))
    return {f"{name}_token_id": i for name, i in zip(names, ids, strict=True)}


def small_dc_ae(latent_channels: int = LATENT_CHANNELS) -> DCAEConfig:
    """Ratio 16, ResBlocks alone."""
    return DCAEConfig(_STAGES, _STAGES, latent_channels, head_dim=2)


def small_config(**bridge) -> WeMMUConfig:
    """All parts small; `bridge` are fields of `BridgeConfig`."""
    text = TextConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        mrope_section=(1, 1, 2),
        tie_word_embeddings=True,
    )
    vision = VisionConfig(
        depth=2,
        hidden_size=16,
        intermediate_size=20,
        num_heads=2,
        in_channels=3,
        patch_size=4,
        temporal_patch_size=2,
        spatial_merge_size=2,
        window_size=24,
        fullatt_block_indexes=(1,),
        out_hidden_size=32,
    )
    dit = SanaConfig(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        num_attention_heads=3,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        caption_channels=20,
    )
    settings = {"fixed_grid": 4, "max_grid": 11, "position_mlp_hidden": 48, "connector_heads": 4}
    return WeMMUConfig(
        vlm=Qwen25VLConfig(text, vision, **special_ids(), eos_token_ids=(1,)),
        dit=dit,
        dc_ae=small_dc_ae(),
        bridge=BridgeConfig(**{**settings, **bridge}),
    )


def row_encoder(config: WeMMUConfig, grids: Sequence[Grid] = GRIDS) -> RowEncoder:
    """With the paddings that `grids` need."""
    encoder = RowEncoder(config, prompt_encoder(), MEAN, STD, pixel_limits=(64, 4096))
    return encoder.sized(grids, multiple=PADDING)


def random_params(model: WeMMUModel, seed: int = 0) -> dict:
    """The whole tree with no leaf constant: norms 1 + 0.2 N, matrices N / sqrt(fan in), the rest 0.2 N."""

    def shapes(key: jax.Array) -> dict:
        backbones = model.init_backbones(key)
        return {**backbones, **model.init_bridge(key, backbones["vlm"]["text"])}

    generator, leaves = np.random.default_rng(seed), {}
    for path, leaf in flatten(jax.eval_shape(shapes, jax.random.key(0))).items():
        noise = generator.standard_normal(leaf.shape).astype(np.float32)
        if path.endswith("scale"):
            leaves[path] = 1 + np.float32(0.2) * noise
        elif path.endswith("kernel"):
            fan_in = leaf.shape[-2] * (9 if "depthwise" in path or "dc_ae" in path else 1)
            leaves[path] = noise / np.float32(fan_in**0.5)
        else:
            leaves[path] = np.float32(0.2) * noise
    return nest(leaves)


@dataclasses.dataclass(frozen=True)
class Request:
    """Rows before they are packed: B texts, uint8 pictures [B][n], latents float32[B, gh, gw, C] of each of the n."""

    texts: tuple[str, ...]
    grids: tuple[Grid, ...]
    pictures: tuple[tuple[np.ndarray, ...], ...]
    latents: tuple[np.ndarray, ...]

    def rows(self, *numbers: int) -> "Request":
        """Only some of the rows."""
        return Request(
            tuple(self.texts[i] for i in numbers),
            self.grids,
            tuple(self.pictures[i] for i in numbers),
            tuple(latents[list(numbers)] for latents in self.latents),
        )


def request(
    config: WeMMUConfig, grids: Sequence[Grid] = GRIDS, texts: Sequence[str] = TEXTS, seed: int = 0
) -> Request:
    """Random pictures and latents on `grids` for each text."""
    rng, unit = np.random.default_rng(seed), config.vlm.vision.unit
    pictures = tuple(
        tuple(rng.integers(0, 256, (gh * unit, gw * unit, 3), np.uint8) for gh, gw in grids)
        for _ in texts
    )
    shape = (len(texts), config.dc_ae.latent_channels)
    latents = tuple(
        rng.standard_normal((shape[0], gh, gw, shape[1])).astype(np.float32) for gh, gw in grids
    )
    return Request(tuple(texts), tuple(grids), pictures, latents)


def pack(
    encoder: RowEncoder, request: Request, *, text_length: int | None = None
) -> tuple[PromptBatch, Sources | None]:
    """What `WeMMUModel.read` is given; texts are padded to the longest, or to `text_length`."""
    prompts = [encoder.prompt(text, request.grids, overflow="error") for text in request.texts]
    text_length = text_length or max(prompt.text_tokens for prompt in prompts)
    sources = len(request.grids)
    rows = [
        encoder.prompt_row(prompt, text_length=text_length, sources=sources) for prompt in prompts
    ]
    arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    if not sources:
        return prompt_batch(arrays), None
    packed = [encoder.pack(pictures) for pictures in request.pictures]
    images = jax.tree.map(lambda *parts: np.concatenate(parts), *packed)
    return prompt_batch(arrays), Sources(images, arrays["place"], request.latents)
