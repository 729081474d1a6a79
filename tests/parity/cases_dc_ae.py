"""Parity rows of DC-AE against diffusers' `AutoencoderDC`, and ways of breaking it that must be noticed."""

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
from diffusers import AutoencoderDC

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
from wemmu_jax.conversion.dc_ae import table
from wemmu_jax.models.dc_ae import DCAE, DCAEConfig, blocks, modeling
from wemmu_jax.ops import convolution

RES, VIT = "ResBlock", "EfficientViTBlock"


class Pair(NamedTuple):
    """The same random model twice: diffusers' module, and our config and parameters."""

    reference: AutoencoderDC
    config: DCAEConfig
    params: dict


def hf_config(
    *,
    kinds: tuple[str, ...],
    widths: tuple[int, ...],
    encoder_layers: tuple[int, ...],
    decoder_layers: tuple[int, ...],
    head_dim: int,
    latents: int,
) -> dict:
    """What a diffusers `vae/config.json` says, in the settings of the published Sana models."""
    scales = tuple((5,) if kind == VIT else () for kind in kinds)
    return {
        "latent_channels": latents,
        "attention_head_dim": head_dim,
        "encoder_block_types": kinds,
        "decoder_block_types": kinds,
        "encoder_block_out_channels": widths,
        "decoder_block_out_channels": widths,
        "encoder_layers_per_block": encoder_layers,
        "decoder_layers_per_block": decoder_layers,
        "encoder_qkv_multiscales": scales,
        "decoder_qkv_multiscales": scales,
        "downsample_block_type": "Conv",
        "upsample_block_type": "interpolate",
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
        "scaling_factor": 0.41407,
    }


SMALL = hf_config(
    kinds=(RES, RES, VIT, VIT),
    widths=(8, 16, 16, 32),
    encoder_layers=(2, 1, 1, 2),
    decoder_layers=(1, 2, 2, 1),
    head_dim=8,
    latents=8,
)
REAL_WIDTHS = hf_config(
    kinds=(RES, RES, RES, VIT, VIT, VIT),
    widths=(128, 256, 512, 512, 1024, 1024),
    encoder_layers=(2, 1, 2, 1, 1, 2),
    decoder_layers=(1, 2, 1, 2, 1, 2),
    head_dim=32,
    latents=32,
)


def pair(config: dict, *, gain: float = 1.0) -> Pair:
    """Builds the reference, redraws its parameters and converts them."""
    reference = randomise(AutoencoderDC(**config), seed=7, gain=gain)
    ours = DCAEConfig.from_hf(dict(reference.config))
    return Pair(reference, ours, converted(reference, table(ours)))


@functools.cache
def small() -> Pair:
    """Four stages of both kinds, heads of 8."""
    return pair(SMALL)


@functools.cache
def faint() -> Pair:
    """The small model with matrices so weak that the norms' eps shows."""
    return pair(SMALL, gain=0.02)


@functools.cache
def real() -> Pair:
    """The published widths, one or two layers a stage."""
    return pair(REAL_WIDTHS)


def draw(*shape: int) -> np.ndarray:
    """float32 numbers, normal."""
    return np.random.default_rng(11).standard_normal(shape).astype(np.float32)


@torch.no_grad()
def run_reference(module: Callable, x: np.ndarray) -> np.ndarray:
    """Channels last in and out around a module of the reference."""
    return module(to_torch(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()


def run(module: nn.Module, params: dict, x: np.ndarray, method: str = "__call__") -> jax.Array:
    """Our module, compiled."""
    return jax.jit(lambda p, x: module.apply({"params": p}, x, method=method))(params, x)


def layer(stack: dict, index: int) -> dict:
    """The parameters of one layer of a scanned stage."""
    return jax.tree.map(lambda leaf: leaf[index], stack)


class Block(NamedTuple):
    """One block of a pair, on both sides, and an input of the right width."""

    module: nn.Module
    params: dict
    reference: Callable
    x: np.ndarray

    def error(self) -> float:
        """Relative error of ours."""
        return relative_l2(
            run(self.module, self.params, self.x), run_reference(self.reference, self.x)
        )


def res_block(p: Pair) -> Block:
    """The last layer of the encoder's first stage."""
    stage, last = p.config.encoder[0], p.config.encoder[0].layers - 1
    return Block(
        blocks.ResBlock(),
        layer(p.params["encoder"]["stage_0"], last),
        p.reference.encoder.down_blocks[0][last],
        draw(2, 6, 9, stage.width),
    )


def vit_block(p: Pair, *, quadratic: bool = False) -> Block:
    """The last layer of the encoder's last stage; few places make its attention quadratic."""
    index = len(p.config.encoder) - 1
    stage = p.config.encoder[index]
    size = (2, 3) if quadratic else (5, 9)
    return Block(
        blocks.EfficientViTBlock(p.config.head_dim, stage.kernel_sizes),
        layer(p.params["encoder"][f"stage_{index}"], stage.layers - 1),
        p.reference.encoder.down_blocks[index][stage.layers - 1],
        draw(2, *size, stage.width),
    )


def attention(p: Pair, *, quadratic: bool = False) -> Block:
    """The attention of `vit_block`."""
    whole = vit_block(p, quadratic=quadratic)
    module = blocks.MultiscaleAttention(whole.module.head_dim, whole.module.kernel_sizes)
    return Block(module, whole.params["attention"], whole.reference.attn, whole.x)


def gated_conv(p: Pair) -> Block:
    """The gated convolution of `vit_block`."""
    whole = vit_block(p)
    params = whole.params["feed_forward"]
    return Block(blocks.GatedConv(), params, whole.reference.conv_out, whole.x)


def down(p: Pair, index: int) -> Block:
    """The step into stage `index` of the encoder."""
    fine, coarse = p.config.encoder[index - 1 : index + 1]
    return Block(
        blocks.Down(coarse.width),
        p.params["encoder"][f"down_{index}"],
        p.reference.encoder.down_blocks[index - 1][-1],
        draw(2, 6, 10, fine.width),
    )


def up(p: Pair, index: int) -> Block:
    """The step into stage `index` of the decoder."""
    fine, coarse = p.config.decoder[index : index + 2]
    return Block(
        blocks.Up(fine.width),
        p.params["decoder"][f"up_{index}"],
        p.reference.decoder.up_blocks[index][0],
        draw(2, 3, 5, coarse.width),
    )


def encode(p: Pair, *, places: tuple[int, int], config: DCAEConfig | None = None) -> float:
    """The whole encoder on pictures that give latents of `places`; the encoder's parameters alone."""
    pixels = np.tanh(draw(2, *(n * p.config.ratio for n in places), 3))
    reference = run_reference(lambda x: p.reference.encode(x).latent, pixels)
    params = {"encoder": p.params["encoder"]}
    ours = run(DCAE(config or p.config), params, pixels, "encode")
    return relative_l2(ours, reference * p.reference.config.scaling_factor)


def decode(p: Pair, *, places: tuple[int, int]) -> float:
    """The whole decoder; the decoder's parameters alone."""
    latents = draw(2, *places, p.config.latent_channels)
    scaling = p.reference.config.scaling_factor
    reference = run_reference(lambda z: p.reference.decode(z).sample, latents / scaling)
    params = {"decoder": p.params["decoder"]}
    return relative_l2(run(DCAE(p.config), params, latents, "decode"), reference)


def cases() -> list[Case]:
    """Each block and both halves, at small and at the real widths."""

    def block(name: str, build: Callable[[], Block]) -> Case:
        return Case(f"dc-ae / {name}", BLOCK, lambda: build().error())

    def model(name: str, measure: Callable[[], float]) -> Case:
        return Case(f"dc-ae / {name}", MODEL, measure)

    return [
        block("res block", lambda: res_block(small())),
        block("res block, faint activations", lambda: res_block(faint())),
        block("attention, linear", lambda: attention(small())),
        block("attention, quadratic", lambda: attention(small(), quadratic=True)),
        block("gated convolution", lambda: gated_conv(small())),
        block("gated convolution, faint activations", lambda: gated_conv(faint())),
        block("efficientvit block, linear", lambda: vit_block(small())),
        block("efficientvit block, quadratic", lambda: vit_block(small(), quadratic=True)),
        block("step down, twice the channels", lambda: down(small(), 1)),
        block("step down, as many channels", lambda: down(small(), 2)),
        block("step up, half the channels", lambda: up(small(), 2)),
        block("step up, as many channels", lambda: up(small(), 1)),
        model("encoder", lambda: encode(small(), places=(4, 6))),
        model("encoder, quadratic at the end", lambda: encode(small(), places=(2, 3))),
        model("decoder", lambda: decode(small(), places=(4, 6))),
        model("decoder, quadratic at the start", lambda: decode(small(), places=(2, 3))),
        block("res block, real widths", lambda: res_block(real())),
        block("efficientvit block, real widths", lambda: vit_block(real())),
        block("step down, real widths", lambda: down(real(), 4)),
        block("step up, real widths", lambda: up(real(), 3)),
        model("encoder, real widths", lambda: encode(real(), places=(2, 3))),
        model("decoder, real widths", lambda: decode(real(), places=(2, 3))),
    ]


def without(tree: dict, *path: str) -> dict:
    """`tree` with the leaf at `path` set to zeros."""
    name, *rest = path
    node = without(tree[name], *rest) if rest else jnp.zeros_like(tree[name])
    return {**tree, name: node}


def no_shortcut(x: jax.Array, channels: int) -> jax.Array:
    """In place of `average_groups` and `repeat_channels`."""
    return jnp.zeros((*x.shape[:-1], channels), x.dtype)


def shifted_border(features: int, *, stride: int = 1, **settings) -> nn.Conv:
    """In place of `conv3x3`: at stride 2, `SAME` puts its zeros right and below only."""
    return nn.Conv(
        features, (3, 3), strides=stride, padding="SAME", dtype=settings["dtype"], name="conv"
    )


def unnormalised(query: jax.Array, key: jax.Array, value: jax.Array, head_dim: int) -> jax.Array:
    """In place of `linear_attention`."""
    heads = (x.reshape(*x.shape[:2], -1, head_dim) for x in (query, key, value))
    return jnp.einsum("bsnk,btnk,btnv->bsnv", *heads).reshape(query.shape)


def sabotage() -> list[Sabotage]:
    """Shortcuts, activations, eps, biases, the normaliser, the border and the scale, each broken."""

    def broken(name, where, attribute, value, measure, tolerance=BLOCK) -> Sabotage:
        def patched() -> float:
            with mock.patch.object(where, attribute, value):
                return measure()

        return Sabotage(f"dc-ae / {name}", tolerance, patched)

    def biasless(name: str, build: Callable[[], Block], *path: str) -> Sabotage:
        def measure() -> float:
            block = build()
            return block._replace(params=without(block.params, *path)).error()

        return Sabotage(f"dc-ae / {name}", BLOCK, measure)

    def encoder() -> float:
        return encode(small(), places=(2, 3))

    def decoder() -> float:
        return decode(small(), places=(2, 3))

    def step() -> float:
        return down(small(), 1).error()

    def step_up() -> float:
        return up(small(), 2).error()

    def other_pixel(kernel: jax.Array, place: int, *, axis: int, original=convolution._merged):
        return original(kernel, 1 - place, axis=axis)

    def res() -> float:
        return res_block(small()).error()

    def faint_res() -> float:
        return res_block(faint()).error()

    def gated() -> float:
        return gated_conv(small()).error()

    def linear() -> float:
        return attention(small()).error()

    def swapped(x: jax.Array, original=blocks.space_to_depth) -> jax.Array:
        return original(x.swapaxes(1, 2)).swapaxes(1, 2)

    def wrong_scale() -> float:
        config = dataclasses.replace(small().config, scaling_factor=0.4107)
        return encode(small(), places=(2, 3), config=config)

    return [
        broken("encoder-out shortcut off", modeling, "average_groups", no_shortcut, encoder, MODEL),
        broken("decoder-in shortcut off", modeling, "repeat_channels", no_shortcut, decoder, MODEL),
        broken("step-down shortcut off", blocks, "average_groups", no_shortcut, step),
        broken("step-up shortcut off", blocks, "repeat_channels", no_shortcut, step_up),
        broken("weights of a square's other pixel", convolution, "_merged", other_pixel, step_up),
        broken("h and w swapped in a shortcut", blocks, "space_to_depth", swapped, step),
        broken("step down padded as SAME", blocks, "conv3x3", shifted_border, step),
        broken("GELU for SiLU in a res block", nn, "silu", nn.gelu, res),
        broken("tanh for SiLU in a gated convolution", nn, "silu", jnp.tanh, gated),
        broken("norm eps 1e-6", blocks, "NORM_EPS", 1e-6, faint_res),
        broken("attention unnormalised", blocks, "linear_attention", unnormalised, linear),
        biasless("no bias in a convolution", lambda: res_block(small()), "conv1", "bias"),
        biasless("no bias in a norm", lambda: res_block(small()), "norm", "bias"),
        biasless("no bias in a depthwise", lambda: gated_conv(small()), "depthwise", "bias"),
        biasless("no bias in a step up", lambda: up(small(), 2), "conv", "bias"),
        Sabotage("dc-ae / the paper's scale, 0.4107", MODEL, wrong_scale),
    ]
