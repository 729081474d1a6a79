"""The reference of the bridge: transformers and diffusers, joined by torch modules.

It reads with a whole Qwen2.5-VL of transformers, writes with a second language model of transformers, whose weights
are others, over the first one's cache, and paints with diffusers' Sana. The Position MLP and the VAE linear are torch
modules here. B rows, L prompt tokens, n sources, S tokens of a source, Q queries, D width.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import torch
from diffusers import SanaTransformer2DModel
from transformers import Qwen2_5_VLConfig as ReferenceConfig
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLTextModel
from transformers.cache_utils import DynamicCache

from tests.models import wemmu_fixtures as fixtures
from tests.parity import cases_qwen_text, cases_sana
from tests.parity.harness import converted, randomise, to_torch
from wemmu_jax.conversion import sana as sana_conversion
from wemmu_jax.conversion.qwen2_5_vl import text_table
from wemmu_jax.conversion.table import Entry, Layout, dense
from wemmu_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from wemmu_jax.models.qwen2_5_vl.images import patchify
from wemmu_jax.models.sana.config import SanaConfig
from wemmu_jax.models.wemmu.config import BridgeConfig, VAEStream, WeMMUConfig
from wemmu_jax.models.wemmu.modeling import WeMMUModel

QUERY_GRID = (5, 3)
TIMESTEPS = np.array([371.37, 912.781], np.float32)
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 2,
    "patch_size": 4,
    "window_size": 24,
    "fullatt_block_indexes": [1],
}


class PositionMLP(torch.nn.Module):
    """A.1 of the paper, equations 1 to 3."""

    def __init__(self, width: int, bridge: BridgeConfig, out: int):
        super().__init__()
        self.table = torch.nn.Parameter(torch.empty(bridge.max_grid, bridge.max_grid, width))
        self.up_proj = torch.nn.Linear(width, bridge.position_mlp_hidden, bias=False)
        self.gate_proj = torch.nn.Linear(width, bridge.position_mlp_hidden, bias=False)
        self.down_proj = torch.nn.Linear(bridge.position_mlp_hidden, out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, Q, D] on QUERY_GRID -> [B, Q, caption width]."""
        top, left = ((len(self.table) - side) // 2 for side in QUERY_GRID)
        crop = self.table[top : top + QUERY_GRID[0], left : left + QUERY_GRID[1]]
        x = x + crop.flatten(0, 1)
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """The same random model twice: modules of the reference, and our configuration and parameters.

    `learned` holds what learns, under the names of our tree; `tables` their conversion.
    """

    vlm: Qwen2_5_VLForConditionalGeneration
    learned: dict[str, torch.nn.Module]
    tables: dict[str, list[Entry]]
    config: WeMMUConfig
    params: dict

    def model(self, stream: VAEStream) -> WeMMUModel:
        """Ours, in float32."""
        bridge = dataclasses.replace(self.config.bridge, vae_stream=stream)
        return WeMMUModel(dataclasses.replace(self.config, bridge=bridge), dtype=jnp.float32)


@functools.lru_cache(maxsize=1)  # one at a time: the real widths take gigabytes
def bench(*, real: bool = False) -> Bench:
    """Small sizes, or the widths of the language model of 3B, its Position MLP and Sana's caption."""
    sizes = cases_qwen_text.REAL if real else cases_qwen_text.SMALL
    width, caption = sizes["hidden_size"], 2304 if real else 40
    bridge = BridgeConfig() if real else BridgeConfig(max_grid=11, position_mlp_hidden=96)
    hf = ReferenceConfig(
        text_config={
            "vocab_size": 300,
            "rms_norm_eps": 1e-6,
            "bos_token_id": 1,
            "eos_token_id": 1,
            **sizes,
        },
        vision_config={**VISION, "out_hidden_size": width},
        tie_word_embeddings=True,
        **fixtures.special_ids(),
    )
    vlm = randomise(Qwen2_5_VLForConditionalGeneration(hf), seed=21).requires_grad_(False)
    dit = SanaTransformer2DModel(
        **{**cases_sana.SMALL, "caption_channels": caption}, qk_norm=cases_sana.QK_NORM["1.5"]
    )
    channels = dit.config.in_channels
    config = WeMMUConfig(
        vlm=Qwen25VLConfig.from_hf(hf.to_dict()),
        dit=SanaConfig.from_hf(dict(dit.config)),
        dc_ae=fixtures.small_dc_ae(channels),
        bridge=bridge,
    )
    learned = {
        "expert": randomise(Qwen2_5_VLTextModel(hf.text_config), seed=22),
        "vae_branch": torch.nn.ModuleDict({"input_proj": torch.nn.Linear(channels, width)}),
        "position_mlp": randomise(PositionMLP(width, bridge, caption), seed=23),
        "dit": randomise(dit, seed=24),
    }
    randomise(learned["vae_branch"], seed=25)
    hidden = bridge.position_mlp_hidden
    linears = (
        ("up_proj", width, hidden),
        ("gate_proj", width, hidden),
        ("down_proj", hidden, caption),
    )
    tables = {
        "expert": text_table(config.vlm.text),
        "vae_branch": dense("input_proj", "input_proj", inputs=channels, outputs=width),
        "position_mlp": [
            Entry("table", "table", Layout.COPY, (bridge.max_grid, bridge.max_grid, width)),
            *(
                row
                for name, inputs, outputs in linears
                for row in dense(name, name, inputs=inputs, outputs=outputs, bias=False)
            ),
        ],
        "dit": sana_conversion.table(config.dit),
    }
    params = {name: converted(module, tables[name]) for name, module in learned.items()}
    del params["expert"]["embed_tokens"]  # the expert's words are never read
    params["vlm"] = cases_qwen_text.our_params(vlm, config.vlm)
    return Bench(vlm, learned, tables, config, params)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the reference's VLM leaves of the prompts; the VAE tokens are None unless they go to the expert."""

    cache: DynamicCache
    valid: np.ndarray  # bool[B, L]
    next_position: np.ndarray  # int64[B]
    vae_tokens: torch.Tensor | None = None  # [B, n * S, D]
    vae_ids: np.ndarray | None = None  # int64[3, B, n * S]


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Embedded prompts, padded: embeddings [B, L, D], ids int64[3, B, L], valid bool[B, L]."""

    embeddings: torch.Tensor
    ids: np.ndarray
    valid: np.ndarray

    def causal(self) -> np.ndarray:
        """Mask bool[B, L, L]."""
        return np.tri(self.valid.shape[1], dtype=bool) & self.valid[:, None]


@dataclasses.dataclass(frozen=True)
class ReferencePrompt:
    """Arguments for transformers' model, and the places that its own `get_rope_index` gives."""

    arguments: dict[str, torch.Tensor]
    valid: np.ndarray
    is_picture: np.ndarray
    ids: np.ndarray
    next_position: np.ndarray


def reference_prompt(b: Bench, request: fixtures.Request) -> ReferencePrompt:
    """Prompts with a ViT token wherever a feature goes; VAE tokens are no business of transformers."""
    rows = [
        fixtures.prompt_encoder()
        .encode_user(text, request.grids, vae_tokens=False, source_tokens=64, open_image=True)
        .tokens.astype(np.int64)
        for text in request.texts
    ]
    tokens, valid = cases_qwen_text.pad_prompts(rows)
    is_picture = (tokens == b.config.vlm.image_token_id) & valid
    arguments = {
        "input_ids": to_torch(tokens),
        "attention_mask": to_torch(valid.astype(np.int64)),
        "mm_token_type_ids": to_torch(is_picture.astype(np.int32)),
    }
    if request.grids:
        vision, pictures = b.config.vlm.vision, sum(request.pictures, ())
        arguments["pixel_values"] = to_torch(
            np.concatenate([patchify(picture, vision) for picture in pictures])
        )
        merge = vision.spatial_merge_size
        grids = [(1, merge * rows, merge * columns) for rows, columns in request.grids]
        arguments["image_grid_thw"] = torch.tensor(grids * len(request.texts))
    where = {name: value for name, value in arguments.items() if name != "pixel_values"}
    ids, deltas = b.vlm.model.get_rope_index(**where)
    next_position = valid.sum(1) + deltas[:, 0].numpy()
    return ReferencePrompt(arguments, valid, is_picture, ids.numpy(), next_position)


def reference_vae_tokens(b: Bench, request: fixtures.Request) -> list[torch.Tensor]:
    """For each picture [B, gh * gw, D]."""
    linear = b.learned["vae_branch"]["input_proj"]
    return [linear(to_torch(latents)).flatten(1, 2) for latents in request.latents]


def joint_sequences(b: Bench, request: fixtures.Request) -> tuple[Sequences, np.ndarray]:
    """Prompts with each picture's VAE tokens after its ViT tokens, at the same positions; and the next ones."""
    prompt = reference_prompt(b, request)
    embeddings = b.vlm.model.language_model.embed_tokens(prompt.arguments["input_ids"])
    features = b.vlm.model.get_image_features(
        prompt.arguments["pixel_values"], prompt.arguments["image_grid_thw"]
    ).pooler_output
    embeddings[to_torch(prompt.is_picture)] = torch.cat(features)
    vae = reference_vae_tokens(b, request)
    rows, row_ids = [], []
    for i, seen in enumerate(prompt.is_picture):
        start, parts, ids = 0, [], []
        ends = np.flatnonzero(seen & ~np.append(seen[1:], False)) + 1
        for end, tokens in zip(ends, vae, strict=True):
            parts += [embeddings[i, start:end], tokens[i]]
            ids += [prompt.ids[:, i, start:end], prompt.ids[:, i, end - len(tokens[i]) : end]]
            start = end
        length = prompt.valid[i].sum()
        rows.append(torch.cat([*parts, embeddings[i, start:length]]))
        row_ids.append(np.concatenate([*ids, prompt.ids[:, i, start:length]], axis=1))
    lengths = np.array([len(row) for row in rows])
    ids = np.stack([np.pad(r, ((0, 0), (0, max(lengths) - r.shape[1]))) for r in row_ids], axis=1)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    valid = np.arange(max(lengths)) < lengths[:, None]
    return Sequences(padded, ids, valid), prompt.next_position


def reference_read(b: Bench, request: fixtures.Request, stream: VAEStream) -> Reading:
    """The VLM's pass: transformers' own model, or, with VAE tokens in it, its language model on the sequence."""
    if request.grids and stream is VAEStream.FROZEN:
        joint, next_position = joint_sequences(b, request)
        cache = b.vlm.model.language_model(
            inputs_embeds=joint.embeddings,
            attention_mask=cases_qwen_text.additive(joint.causal()[:, None]),
            position_ids=to_torch(joint.ids),
            use_cache=True,
        ).past_key_values
        return Reading(cache, joint.valid, next_position)
    prompt = reference_prompt(b, request)
    cache = b.vlm.model(**prompt.arguments, use_cache=True).past_key_values
    if not request.grids:
        return Reading(cache, prompt.valid, prompt.next_position)
    ids = np.stack([prompt.ids[:, i, seen] for i, seen in enumerate(prompt.is_picture)], axis=1)
    vae = torch.cat(reference_vae_tokens(b, request), dim=1)
    return Reading(cache, prompt.valid, prompt.next_position, vae, ids)


def query_ids(next_position: np.ndarray) -> np.ndarray:
    """int64[3, B, Q], those of a picture on QUERY_GRID."""
    rows, columns = np.indices(QUERY_GRID).reshape(2, -1)
    return np.stack([0 * rows, rows, columns])[:, None] + next_position[None, :, None]


def reference_write(b: Bench, reading: Reading, noise: np.ndarray) -> torch.Tensor:
    """The second language model over the first one's cache, then the Position MLP: [B, Q, caption width]."""
    x, ids, hidden = to_torch(noise), query_ids(reading.next_position), 0
    own = x.shape[1]
    if reading.vae_tokens is not None:
        hidden = reading.vae_tokens.shape[1]
        x = torch.cat([reading.vae_tokens, x], dim=1)
        ids = np.concatenate([reading.vae_ids, ids], axis=2)
    sees = np.ones((len(x), hidden + own, hidden + own), bool)
    sees[:, :hidden, hidden:] = False  # the VAE tokens do not see the queries
    prompt = np.repeat(reading.valid[:, None], hidden + own, axis=1)
    out = b.learned["expert"](
        inputs_embeds=x,
        attention_mask=cases_qwen_text.additive(np.concatenate([prompt, sees], axis=2)[:, None]),
        position_ids=to_torch(ids),
        past_key_values=reading.cache,
    ).last_hidden_state
    return b.learned["position_mlp"](out[:, -own:])


def reference_paint(b: Bench, latents: np.ndarray, condition: torch.Tensor) -> torch.Tensor:
    """[B, h, w, C]."""
    velocity = b.learned["dit"](
        to_torch(latents.transpose(0, 3, 1, 2)),
        encoder_hidden_states=condition,
        timestep=to_torch(TIMESTEPS),
    )
    return velocity.sample.permute(0, 2, 3, 1)
