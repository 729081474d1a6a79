"""Parity of the language model with transformers' `Qwen2_5_VLTextModel`: one pass, and a pass over a cache."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import Qwen2_5_VLConfig as ReferenceConfig
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLTextModel

from tests.parity.harness import (
    BLOCK,
    MODEL,
    Case,
    Sabotage,
    converted,
    randomise,
    relative_l2,
    to_torch,
)
from wemmu_jax.conversion.qwen2_5_vl import Naming, table, text_table, vision_table
from wemmu_jax.models.qwen2_5_vl import text
from wemmu_jax.models.qwen2_5_vl.config import Qwen25VLConfig, TextConfig
from wemmu_jax.models.qwen2_5_vl.text import DecoderLayer, DecoderStack, Pattern, TextModel
from wemmu_jax.ops.attention import Mask, attention
from wemmu_jax.ops.norms import RMSNorm
from wemmu_jax.ops.rotary import multimodal_angles

IMAGE, START, END = 300, 301, 302  # picture tokens of the small vocabulary


def _sizes(width: int, inner: int, layers: int, heads: int, sections: list[int]) -> dict:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default", "mrope_section": sections},
    }


SMALL = _sizes(64, 112, 3, 4, [2, 3, 3])
REAL = _sizes(2048, 11_008, 2, 16, [16, 24, 24])


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """A reference model and its conversion, with a padded batch of two prompts that hold pictures.

    Attributes:
      reference: the whole Qwen2.5-VL.
      config: ours, read from the reference's.
      params: ours of the language model.
      tokens: int64[B, L], padded on the right.
      ids: int64[3, B, L], by the reference.
      valid: bool[B, L].
      next_position: int64[B].
    """

    reference: Qwen2_5_VLForConditionalGeneration
    config: Qwen25VLConfig
    params: dict
    tokens: np.ndarray
    ids: np.ndarray
    valid: np.ndarray
    next_position: np.ndarray


def reference_model(sizes: dict, *, tied: bool, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A random Qwen2.5-VL with a small vocabulary and a vision transformer of two layers. The embedding is as
    small as in published models, so that what a token says comes from the layers too, and eps is felt."""
    config = ReferenceConfig(
        text_config={
            "vocab_size": 320,
            "rms_norm_eps": 1e-6,
            "bos_token_id": 299,
            "eos_token_id": 299,
            **sizes,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_heads": 2,
            "out_hidden_size": sizes["hidden_size"],
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE,
        video_token_id=303,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=tied,
    )
    model = randomise(Qwen2_5_VLForConditionalGeneration(config), seed=seed)
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight.mul_(0.05)
    return model


def our_params(reference: Qwen2_5_VLForConditionalGeneration, config: Qwen25VLConfig) -> dict:
    """{'vision', 'text'} of the reference's weights."""
    if not config.text.tie_word_embeddings:
        return converted(reference, table(config, Naming.MODULES))
    rows = vision_table(config.vision, source="visual.", target="vision/")
    rows += text_table(config.text, source="language_model.", target="text/")
    return converted(reference.model, rows)  # whose state has no second name for the embedding


def picture_prompt(
    grids: Sequence[tuple[int, int]], *, words: Sequence[int], seed: int
) -> np.ndarray:
    """int64[L]: `words[0]` random tokens, a picture of the first grid (in merged tokens), `words[1]` tokens, ..."""
    generator = np.random.default_rng(seed)
    runs = [generator.integers(0, IMAGE, words[0])]
    for (rows, columns), count in zip(grids, words[1:], strict=True):
        runs += [[START], [IMAGE] * (rows * columns), [END], generator.integers(0, IMAGE, count)]
    return np.concatenate(runs)


def pad_prompts(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int64[B, L], padded on the right with a token that means something, and valid bool[B, L]."""
    length = max(map(len, prompts))
    tokens = np.stack([np.pad(p, (0, length - len(p)), constant_values=7) for p in prompts])
    return tokens, np.arange(length) < np.array([[len(p)] for p in prompts])


def picture_ids(reference, tokens, grids, valid) -> tuple[np.ndarray, np.ndarray]:
    """The reference's M-RoPE ids int64[3, B, L] and the position after each prompt int64[B]."""
    ids, deltas = reference.model.get_rope_index(
        to_torch(tokens),
        to_torch(((tokens == IMAGE) & valid).astype(np.int32)),
        image_grid_thw=torch.tensor([(1, 2 * rows, 2 * columns) for rows, columns in grids]),
        attention_mask=to_torch(valid.astype(np.int64)),
    )
    return ids.numpy(), valid.sum(1) + deltas[:, 0].numpy()


@functools.lru_cache(maxsize=2)
def bench(*, real: bool = False, tied: bool = True) -> Bench:
    """The fixture of most rows."""
    reference = reference_model(REAL if real else SMALL, tied=tied, seed=11)
    config = Qwen25VLConfig.from_hf(reference.config.to_dict())
    tokens, valid = pad_prompts(
        [
            picture_prompt([(3, 5), (4, 2)], words=(44, 3, 6), seed=1),
            picture_prompt([(2, 4)], words=(33, 5), seed=2),
        ]
    )
    grids = [(3, 5), (4, 2), (2, 4)]
    ids, next_position = picture_ids(reference, tokens, grids, valid)
    params = our_params(reference, config)["text"]
    return Bench(reference, config, params, tokens, ids, valid, next_position)


def additive(mask: np.ndarray) -> torch.Tensor:
    """A mask bool[B, 1, T, S] as the reference wants it: 0 where a key is seen, the least float elsewhere."""
    return to_torch(np.where(mask, 0.0, np.finfo(np.float32).min).astype(np.float32))


def _layer(real: bool = False, config: Callable[[TextConfig], TextConfig] = lambda c: c) -> float:
    """The first layer; the input is as small as an embedding, so that eps is felt."""
    b = bench(real=real)
    shape = (*b.tokens.shape, b.config.text.hidden_size)
    x = 0.02 * np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    mask = np.tri(x.shape[1], dtype=bool)[None, None] & b.valid[:, None, None, :]
    model = b.reference.model.language_model
    with torch.no_grad():
        wanted = model.layers[0](
            to_torch(x),
            attention_mask=additive(mask),
            position_embeddings=model.rotary_emb(to_torch(x), to_torch(b.ids)),
        )
    settings = config(b.config.text)
    angles = multimodal_angles(
        jnp.asarray(b.ids),
        head_width=settings.head_dim,
        sections=settings.mrope_section,
        theta=settings.rope_theta,
    )
    params = jax.tree.map(lambda leaf: leaf[0], b.params["layers"])
    seen = Mask(jnp.asarray(b.valid), causal=True)
    ours, _ = jax.jit(DecoderLayer(settings).apply)({"params": params}, x, None, angles, seen)
    return relative_l2(ours[b.valid], wanted[b.valid])


def _final_norm() -> float:
    b = bench()
    x = 0.02 * np.random.default_rng(4).standard_normal((2, 7, 64)).astype(np.float32)
    norm = RMSNorm(b.config.text.rms_norm_eps)
    ours = norm.apply({"params": b.params["norm"]}, x)
    return relative_l2(ours, b.reference.model.language_model.norm(to_torch(x)))


@torch.no_grad()
def _reference_prompts(b: Bench):
    """The reference's (hidden, cache) of the bench's prompts; who passes the cache on has it grow."""
    out = b.reference.model.language_model(
        input_ids=to_torch(b.tokens),
        attention_mask=to_torch(b.valid.astype(np.int64)),
        position_ids=to_torch(b.ids),
        use_cache=True,
    )
    return out.last_hidden_state, out.past_key_values


@functools.lru_cache(maxsize=2)
def _reference_pass(real: bool, tied: bool):
    """(hidden, logits, cache) of the reference over the bench's prompts."""
    b = bench(real=real, tied=tied)
    hidden, cache = _reference_prompts(b)
    return hidden, b.reference.lm_head(hidden).detach(), cache


def prefill(config: TextConfig, params: dict, tokens, ids, valid):
    """Ours: (hidden, KeyValues, logits) of prompts, traced anew in each call."""

    def run(params, tokens, ids, valid):
        model, variables = TextModel(config), {"params": params}
        hidden, own = model.apply(
            variables,
            model.apply(variables, tokens, method="embed"),
            ids,
            valid=valid,
            pattern=Pattern.CAUSAL,
            return_key_values=True,
        )
        return hidden, own, model.apply(variables, hidden, method="logits")

    return jax.jit(run)(params, jnp.asarray(tokens), jnp.asarray(ids), jnp.asarray(valid))


@functools.lru_cache(maxsize=2)
def _our_pass(real: bool, tied: bool):
    b = bench(real=real, tied=tied)
    return prefill(b.config.text, b.params, b.tokens, b.ids, b.valid)


def _hidden(*, real: bool = False) -> float:
    valid = bench(real=real).valid
    return relative_l2(_our_pass(real, True)[0][valid], _reference_pass(real, True)[0][valid])


def _logits(*, tied: bool) -> float:
    valid = bench(tied=tied).valid
    return relative_l2(_our_pass(False, tied)[2][valid], _reference_pass(False, tied)[1][valid])


def _cache(name: str) -> float:
    """All layers' keys or values, [layers, B, L, K, H]; the reference keeps [B, K, L, H] for each layer."""
    valid = bench().valid
    layers = _reference_pass(False, True)[2].layers
    wanted = torch.stack([getattr(layer, f"{name}s") for layer in layers]).transpose(2, 3)
    ours = getattr(_our_pass(False, True)[1], name)
    return relative_l2(ours[:, valid], wanted[:, valid])


@functools.lru_cache(maxsize=1)
def _expert(real: bool):
    """A second language model of the same sizes and other weights, and the params of its stack."""
    b = bench(real=real)
    expert = randomise(Qwen2_5_VLTextModel(b.reference.config.text_config), seed=12)
    params = converted(expert, text_table(b.config.text))
    return expert, {name: params[name] for name in ("layers", "norm")}


def _second_pass(*, tail: int = 0, real: bool = False, context_valid=None) -> float:
    """Queries in image form over the prompts' keys and values; the first T - tail do not see the last `tail`."""
    b, (expert, params) = bench(real=real), _expert(real)
    grid = (3, 4)
    own = math.prod(grid)
    rows, columns = np.indices(grid).reshape(2, -1)
    ids = np.stack([0 * rows, rows, columns])[:, None] + b.next_position[None, :, None]
    queries = np.random.default_rng(5).standard_normal((2, own, b.config.text.hidden_size))
    queries = queries.astype(np.float32)
    sees = np.ones((own, own), bool)
    sees[: own - tail, own - tail :] = tail == 0
    mask = np.concatenate(
        [np.repeat(b.valid[:, None], own, axis=1), np.repeat(sees[None], 2, axis=0)], axis=2
    )
    _, past = _reference_prompts(b)
    with torch.no_grad():
        wanted = expert(
            inputs_embeds=to_torch(queries),
            attention_mask=additive(mask[:, None]),
            position_ids=to_torch(ids),
            past_key_values=past,
        ).last_hidden_state
    ours, _ = jax.jit(
        functools.partial(
            DecoderStack(b.config.text).apply,
            pattern=Pattern.FULL,
            hidden_tail=tail,
            return_key_values=False,
        )
    )(
        {"params": params},
        queries,
        jnp.asarray(ids),
        valid=jnp.ones((2, own), bool),
        context=_our_pass(real, True)[1],
        context_valid=b.valid if context_valid is None else context_valid,
    )
    return relative_l2(ours, wanted)


def cases() -> list[Case]:
    """The language model's rows."""
    name = "qwen2.5-vl / "
    return [
        Case(f"{name}decoder layer, picture ids, padded", BLOCK, _layer),
        Case(f"{name}final norm", BLOCK, _final_norm),
        Case(f"{name}language model, hidden states", MODEL, _hidden),
        Case(f"{name}language model, logits, tied", MODEL, lambda: _logits(tied=True)),
        Case(f"{name}language model, logits, untied", MODEL, lambda: _logits(tied=False)),
        Case(f"{name}prefill, keys of all layers", MODEL, lambda: _cache("key")),
        Case(f"{name}prefill, values of all layers", MODEL, lambda: _cache("value")),
        Case(f"{name}second stack over the cache, full", MODEL, _second_pass),
        Case(f"{name}second stack, hidden tail", MODEL, lambda: _second_pass(tail=5)),
        Case(f"{name}decoder layer, real widths", BLOCK, lambda: _layer(real=True)),
        Case(f"{name}language model, real widths", MODEL, lambda: _hidden(real=True)),
        Case(f"{name}second stack, real widths", MODEL, lambda: _second_pass(real=True)),
    ]


def _broken(*, ids=lambda ids: ids, params=lambda params: params, config=lambda c: c) -> float:
    """The error of the whole language model with something changed on our side only."""
    b = bench()
    hidden, _, _ = prefill(config(b.config.text), params(b.params), b.tokens, ids(b.ids), b.valid)
    return relative_l2(hidden[b.valid], _reference_pass(False, True)[0][b.valid])


def _one_dimensional(ids: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.arange(ids.shape[2]), ids.shape)


def _late_after_picture(ids: np.ndarray) -> np.ndarray:
    """One more after each picture's end."""
    return ids + np.cumsum(bench().tokens == END, axis=1)


def _without_bias(name: str) -> Callable[[dict], dict]:
    def drop(params: dict) -> dict:
        params = jax.tree.map(lambda leaf: leaf, params)
        bias = params["layers"]["attention"][name]["bias"]
        params["layers"]["attention"][name]["bias"] = jnp.zeros_like(bias)
        return params

    return drop


def _patched(name: str, replacement: Callable) -> float:
    with mock.patch.object(text, name, replacement):
        return _broken()


def _coarse_angles(*arguments, **settings) -> jax.Array:
    return multimodal_angles(*arguments, **settings).astype(jnp.bfloat16).astype(jnp.float32)


def _interleaved_heads(query, key, value, *, mask):
    """Query head n reads key head n % K instead of n // (N // K)."""
    copies = (1, 1, query.shape[2] // key.shape[2], 1)
    return attention(query, jnp.tile(key, copies), jnp.tile(value, copies), mask=mask)


def _with(**changes) -> Callable[[TextConfig], TextConfig]:
    return lambda config: dataclasses.replace(config, **changes)


def sabotage() -> list[Sabotage]:
    """Ways to get the language model wrong."""
    whole = {
        "1-D ids": lambda: _broken(ids=_one_dimensional),
        "row and column ids swapped": lambda: _broken(ids=lambda ids: ids[[0, 2, 1]]),
        "ids + 1 after a picture": lambda: _broken(ids=_late_after_picture),
        "bfloat16 angles": lambda: _patched("multimodal_angles", _coarse_angles),
        "rope theta 1e4": lambda: _broken(config=_with(rope_theta=1e4)),
        "M-RoPE sections 3/3/2": lambda: _broken(config=_with(mrope_section=(3, 3, 2))),
        "key heads interleaved": lambda: _patched("attention", _interleaved_heads),
        "q bias dropped": lambda: _broken(params=_without_bias("q_proj")),
        "k bias dropped": lambda: _broken(params=_without_bias("k_proj")),
        "v bias dropped": lambda: _broken(params=_without_bias("v_proj")),
        "padding of the context seen": lambda: _second_pass(
            context_valid=np.ones_like(bench().valid)
        ),
    }
    rows = [
        Sabotage(f"qwen2.5-vl / language model, {what}", MODEL, measure)
        for what, measure in whole.items()
    ]
    layer = functools.partial(_layer, config=_with(rms_norm_eps=1e-5))
    return [*rows, Sabotage("qwen2.5-vl / decoder layer, eps 1e-5", BLOCK, layer)]
