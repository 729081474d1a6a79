"""Parity rows of the Sana transformer against diffusers' `SanaTransformer2DModel`, and ways of breaking it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import SanaTransformer2DModel

from tests.parity.cases_dc_ae import unnormalised
from tests.parity.harness import (
    BLOCK,
    GRADIENT,
    MODEL,
    Case,
    Sabotage,
    converted,
    randomise,
    relative_l2,
    to_torch,
)
from wemmu_jax.conversion.memory import flatten, params_from_tensors
from wemmu_jax.conversion.sana import table
from wemmu_jax.models.sana import SanaConfig, SanaTransformer, modeling
from wemmu_jax.ops.attention import Mask

BATCH, HEIGHT, WIDTH, QUERIES = 2, 5, 7, 11
TIMESTEPS = np.array([371.37, 912.781], np.float32)
VALID = np.arange(QUERIES) < np.array([[4], [QUERIES]])

SMALL = {
    "in_channels": 6,
    "out_channels": 6,
    "num_layers": 3,
    "num_attention_heads": 6,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 12,
    "cross_attention_dim": 48,
    "caption_channels": 40,
}
REAL_WIDTHS = {"num_layers": 2}  # and diffusers' defaults, which are those of the 1.6B model
QK_NORM = {"1.0": None, "1.5": "rms_norm_across_heads"}


class Pair(NamedTuple):
    """The same random model twice: diffusers' module, and our config and parameters."""

    reference: SanaTransformer2DModel
    config: SanaConfig
    params: dict

    def block(self) -> tuple[torch.nn.Module, dict]:
        """The last block of both."""
        ours = jax.tree.map(lambda leaf: leaf[-1], self.params["blocks"])
        return self.reference.transformer_blocks[-1], ours


def build(hf: dict, version: str, *, quiet: bool = False) -> Pair:
    """A random pair; `quiet` makes the caption's norm read numbers so small that its epsilon counts."""
    reference = SanaTransformer2DModel(**hf, qk_norm=QK_NORM[version])
    reference = randomise(reference, seed=3)
    if quiet:
        with torch.no_grad():
            for parameter in reference.caption_projection.linear_2.parameters():
                parameter *= 0.01
    config = SanaConfig.from_hf(dict(reference.config))
    return Pair(reference, config, converted(reference, table(config)))


small = functools.cache(functools.partial(build, SMALL))


@functools.lru_cache(maxsize=1)
def real(version: str) -> Pair:
    """The widths of the 1.6B model; 0.8 GB twice, so only the last one stays."""
    return build(REAL_WIDTHS, version)


def draw(seed: int, *shape: int) -> np.ndarray:
    """float32 N(0, 1)."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def latents_of(pair: Pair) -> np.ndarray:
    """[B, h, w, C]."""
    return draw(0, BATCH, HEIGHT, WIDTH, pair.config.in_channels)


def condition_of(pair: Pair) -> np.ndarray:
    """[B, Q, caption width], noise where it is padding too."""
    return draw(1, BATCH, QUERIES, pair.config.caption_channels)


def hidden_of(pair: Pair) -> np.ndarray:
    """What a block reads, [B, h, w, D]."""
    return draw(2, BATCH, HEIGHT, WIDTH, pair.config.width)


def caption_of(pair: Pair) -> np.ndarray:
    """A projected and normed condition, [B, Q, D]."""
    return draw(3, BATCH, QUERIES, pair.config.width)


def modulation_of(pair: Pair) -> np.ndarray:
    """What all blocks are modulated with, [B, 6, D]."""
    return draw(4, BATCH, 6, pair.config.width)


def tokens(x: np.ndarray) -> torch.Tensor:
    """[B, h, w, D] -> torch [B, T, D]."""
    return to_torch(x.reshape(BATCH, -1, x.shape[-1]))


def channels_first(x: np.ndarray) -> torch.Tensor:
    """[B, h, w, C] -> torch [B, C, h, w]."""
    return to_torch(x.transpose(0, 3, 1, 2))


def hiding_bias() -> torch.Tensor:
    """What diffusers makes of the mask: [B, 1, Q], added to the scores."""
    return (1 - to_torch(VALID).float())[:, None] * -10000.0


def error(ours: jax.Array, reference: torch.Tensor) -> float:
    """Relative error; the reference may lie as tokens or channels first."""
    return relative_l2(ours, reference.detach().reshape(ours.shape))


# -- parts


@torch.no_grad()
def self_attention(pair: Pair, config: SanaConfig | None = None) -> float:
    reference, ours = pair.block()
    x = hidden_of(pair)
    module = modeling.LinearAttention(config or pair.config)
    return error(module.apply({"params": ours["self_attention"]}, x), reference.attn1(tokens(x)))


@torch.no_grad()
def cross_attention(pair: Pair) -> float:
    reference, ours = pair.block()
    x, caption = hidden_of(pair), caption_of(pair)
    found = modeling.CrossAttention(pair.config).apply(
        {"params": ours["cross_attention"]}, x, caption, Mask(jnp.asarray(VALID))
    )
    expected = reference.attn2(
        tokens(x), encoder_hidden_states=to_torch(caption), attention_mask=hiding_bias()
    )
    return error(found, expected)


@torch.no_grad()
def feed_forward(pair: Pair) -> float:
    reference, ours = pair.block()
    x = hidden_of(pair)
    found = modeling.MixFFN(pair.config).apply({"params": ours["ffn"]}, x)
    return error(found, reference.ff(channels_first(x)).permute(0, 2, 3, 1))


@torch.no_grad()
def block(pair: Pair, *, loudness: float = 1.0, config: SanaConfig | None = None) -> float:
    reference, ours = pair.block()
    x, caption, modulation = hidden_of(pair) * loudness, caption_of(pair), modulation_of(pair)
    found, _ = modeling.Block(config or pair.config).apply(
        {"params": ours}, x, caption, Mask(jnp.asarray(VALID)), modulation
    )
    expected = reference(
        tokens(x),
        encoder_hidden_states=to_torch(caption),
        encoder_attention_mask=hiding_bias(),
        timestep=to_torch(modulation.reshape(BATCH, -1)),
        height=HEIGHT,
        width=WIDTH,
    )
    return error(found, expected)


@torch.no_grad()
def caption(pair: Pair) -> float:
    condition = condition_of(pair)
    width = pair.config.width
    found = modeling.CaptionProjection(width).apply(
        {"params": pair.params["caption_projection"]}, condition
    )
    found = modeling.RMSNorm(modeling.CAPTION_NORM_EPS).apply(
        {"params": pair.params["caption_norm"]}, found
    )
    reference = pair.reference
    return error(found, reference.caption_norm(reference.caption_projection(to_torch(condition))))


@torch.no_grad()
def time_embedding(pair: Pair) -> float:
    module = modeling.TimeEmbedding(pair.config.width)
    modulation, embedded = module.apply({"params": pair.params["time_embed"]}, TIMESTEPS)
    expected = pair.reference.time_embed(to_torch(TIMESTEPS), hidden_dtype=torch.float32)
    return max(error(modulation, expected[0]), error(embedded, expected[1]))


@torch.no_grad()
def output_layer(pair: Pair) -> float:
    x, embedded = hidden_of(pair), draw(5, BATCH, pair.config.width)
    module = modeling.OutputLayer(pair.config.out_channels)
    found = module.apply({"params": pair.params["output"]}, x, embedded)
    reference = pair.reference
    normed = reference.norm_out(tokens(x), to_torch(embedded), reference.scale_shift_table)
    return error(found, reference.proj_out(normed))


# -- the whole


def reference_velocity(pair: Pair) -> torch.Tensor:
    """[B, h, w, C], with a graph for gradients."""
    velocity = pair.reference(
        channels_first(latents_of(pair)),
        encoder_hidden_states=to_torch(condition_of(pair)),
        timestep=to_torch(TIMESTEPS),
        encoder_attention_mask=to_torch(VALID),
    )
    return velocity.sample.permute(0, 2, 3, 1)


def our_velocity(pair: Pair, params: dict, *, timesteps=TIMESTEPS, valid=VALID) -> jax.Array:
    """[B, h, w, C]."""
    return SanaTransformer(pair.config).apply(
        {"params": params}, latents_of(pair), timesteps, condition_of(pair), valid
    )


def whole(pair: Pair, params: dict | None = None, **inputs) -> float:
    with torch.no_grad():
        expected = reference_velocity(pair)
    found = jax.jit(lambda p: our_velocity(pair, p, **inputs))(params or pair.params)
    return relative_l2(found, expected)


def gradients(pair: Pair) -> float:
    """The worst leaf of the gradient of sum(velocity * weights)."""
    pair.reference.zero_grad()
    expected = reference_velocity(pair)
    weights = draw(6, *expected.shape)
    (expected * to_torch(weights)).sum().backward()
    named = {n: p.grad.numpy() for n, p in pair.reference.named_parameters()}
    expected = flatten(params_from_tensors(named, table(pair.config)))
    found = flatten(
        jax.jit(jax.grad(lambda p: jnp.sum(our_velocity(pair, p) * weights)))(pair.params)
    )
    return max(relative_l2(found[path], expected[path]) for path in expected)


def cases() -> list[Case]:
    """Each part and the whole, with small widths and with those of the 1.6B model."""
    rows = []
    for widths, make in (("", small), (", real widths", real)):
        for version in QK_NORM:
            norm = "" if QK_NORM[version] is None else ", q/k norm"
            for name, tolerance, measure in (
                (f"self-attention{norm}", BLOCK, self_attention),
                (f"cross-attention over padding{norm}", BLOCK, cross_attention),
                (f"block{norm}", BLOCK, block),
                (f"whole model, padded{norm}", MODEL, whole),
            ):
                rows.append(_case(f"{version} / {name}{widths}", tolerance, measure, make, version))
        for name, measure in (
            ("feed-forward network", feed_forward),
            ("caption projection and norm", caption),
            ("timestep embedding and AdaLN", time_embedding),
            ("output layer", output_layer),
        ):
            rows.append(_case(f"1.5 / {name}{widths}", BLOCK, measure, make, "1.5"))
    quiet = functools.partial(small, quiet=True)
    return [
        *rows,
        _case("1.5 / whole model, captions near the epsilon", MODEL, whole, quiet, "1.5"),
        _case("1.5 / gradient, worst leaf", GRADIENT, gradients, small, "1.5"),
    ]


def _case(
    name: str, tolerance: float, measure: Callable, make: Callable[[str], Pair], version: str
) -> Case:
    return Case(f"sana {name}", tolerance, lambda: measure(make(version)))


# -- sabotage


class _Unchanged(nn.Module):
    """Stands in for a norm that is left out."""

    eps: float
    dtype: jnp.dtype = jnp.float32

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


def _edited(params: dict, path: tuple[str, ...], edit: Callable) -> dict:
    """`params` with one leaf replaced by `edit(leaf)`; the original stays."""
    name, *rest = path
    leaf = _edited(params[name], tuple(rest), edit) if rest else edit(params[name])
    return {**params, name: leaf}


def _caption_norm_off() -> float:
    with mock.patch.object(modeling, "RMSNorm", _Unchanged):  # 1.0 has no other RMS norm
        return whole(small("1.0"))


def _caption_norm_eps() -> float:
    with mock.patch.object(modeling, "CAPTION_NORM_EPS", 1e-6):
        return whole(small("1.5", quiet=True))


def _layer_norm_eps() -> float:
    pair = small("1.5")
    config = dataclasses.replace(pair.config, norm_eps=1e-5)
    return block(pair, loudness=0.01, config=config)


def _qk_norm_off() -> float:
    pair = small("1.5")
    config = dataclasses.replace(pair.config, qk_norm=False)
    return whole(pair._replace(config=config))


def _any_bias_dropped() -> float:
    """The least noticed of all biases. In 1.5, because without its norm a bias of the keys changes nothing."""
    pair = small("1.5")
    with torch.no_grad():
        expected = reference_velocity(pair)
    run = jax.jit(lambda params: our_velocity(pair, params))
    paths = [tuple(path.split("/")) for path in flatten(pair.params) if path.endswith("/bias")]
    dropped = (run(_edited(pair.params, path, jnp.zeros_like)) for path in paths)
    return min(relative_l2(velocity, expected) for velocity in dropped)


def _exact_gelu() -> float:
    with mock.patch.object(
        modeling.nn, "gelu", lambda x, approximate: jax.nn.gelu(x, approximate=False)
    ):
        return caption(small("1.5"))


def _conv_transposed() -> float:
    pair = small("1.5")
    kernel = ("blocks", "ffn", "depthwise", "kernel")
    return whole(pair, _edited(pair.params, kernel, lambda leaf: leaf.swapaxes(1, 2)))


def _unnormalised_attention() -> float:
    with mock.patch.object(modeling, "linear_attention", unnormalised):
        return self_attention(small("1.5"))


def _modulation_in_another_order() -> float:
    pair = small("1.5")
    table_path = ("blocks", "modulation_table")
    return whole(pair, _edited(pair.params, table_path, lambda leaf: leaf[:, ::-1]))


def sabotage() -> list[Sabotage]:
    """The port broken in one place each."""
    return [
        Sabotage(f"sana / {name}", tolerance, measure)
        for name, tolerance, measure in (
            ("caption norm off", MODEL, _caption_norm_off),
            ("caption norm's epsilon 1e-6", MODEL, _caption_norm_eps),
            ("layer norms' epsilon 1e-5", BLOCK, _layer_norm_eps),
            ("q/k norm off", MODEL, _qk_norm_off),
            ("any bias dropped", MODEL, _any_bias_dropped),
            ("exact GELU in the caption projection", BLOCK, _exact_gelu),
            ("h and w swapped in the depthwise convolution", MODEL, _conv_transposed),
            ("linear attention unnormalised", BLOCK, _unnormalised_attention),
            ("modulation in another order", MODEL, _modulation_in_another_order),
            ("timestep / 1000", MODEL, lambda: whole(small("1.5"), timesteps=TIMESTEPS / 1000)),
            (
                "padding seen",
                MODEL,
                lambda: whole(small("1.5"), valid=np.ones_like(VALID)),
            ),
        )
    ]
