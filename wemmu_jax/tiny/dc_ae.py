"""The tiny DC-AE: pictures of scenes, and a few photographs, there and back."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from wemmu_jax.conversion.backbones import DC_AE
from wemmu_jax.demo.photographs import random_crops
from wemmu_jax.miniworld.renderer import render
from wemmu_jax.miniworld.scene import Split, draw_scene
from wemmu_jax.miniworld.scorer import score_reconstruction
from wemmu_jax.models.dc_ae import DCAE, DCAEConfig
from wemmu_jax.tiny.backbones import DC_AE_CONFIG, save_backbone
from wemmu_jax.tiny.loop import Recipe
from wemmu_jax.tiny.pictures import batch_rng, draw_size
from wemmu_jax.training.optimizer import Method, OptimizerConfig

ROWS, PHOTOGRAPHS, STEPS = 16, 2, 8000  # rows of a batch, how many of them real
# The diffusion model's latents will be a little off; the decoder learns to bear that, and latents keep their
# size, or they would outgrow the noise.
LATENT_NOISE, LATENT_DECAY = 0.1, 1e-3
HELD_OUT = 128


def _model() -> DCAE:
    return DCAE(dataclasses.replace(DCAEConfig.from_hf(DC_AE_CONFIG), scaling_factor=1.0))


def _pictures(rng: np.random.Generator, split: Split, count: int, size: tuple[int, int]):
    scenes = [draw_scene(rng, split) for _ in range(count)]
    return scenes, np.stack([render(scene, *size) for scene in scenes])


def _scaled(pixels: jax.Array) -> jax.Array:
    return pixels.astype(jnp.float32) / 127.5 - 1


def recipe(_: pathlib.Path, *, seed: int, steps: int) -> Recipe:
    """L1 and L2 on pixels in [-1, 1], and L1 on differences of neighbours, through latents with a little noise.

    Corners are what tells a square from a circle, and few of the pixels: the differences give them their weight.
    """
    model = _model()

    def loss(params: Mapping, _, batch: Mapping, key: jax.Array):
        pixels = _scaled(batch["pixels"])
        latents = model.apply({"params": params}, pixels, method="encode")
        noise = LATENT_NOISE * jax.random.normal(key, latents.shape)
        error = model.apply({"params": params}, latents + noise, method="decode") - pixels
        square, size = jnp.mean(error**2), jnp.mean(latents**2)
        edges = sum(jnp.mean(jnp.abs(jnp.diff(error, axis=axis))) for axis in (1, 2))
        total = jnp.mean(jnp.abs(error)) + edges + square + LATENT_DECAY * size
        return total, {"psnr": 10 * jnp.log10(4 / square), "latent_rms": jnp.sqrt(size)}

    def batch(step: int) -> dict[str, np.ndarray]:
        rng = batch_rng(seed, step)
        size = draw_size(rng)
        _, scenes = _pictures(rng, "train", ROWS - PHOTOGRAPHS, size)
        return {"pixels": np.concatenate([scenes, random_crops(rng, PHOTOGRAPHS, size)])}

    return Recipe(
        name="dc-ae",
        seed=seed,
        rows=ROWS,
        optimizer=OptimizerConfig(
            learning_rate=2e-3, warmup=min(200, steps // 10), steps=steps, method=Method.MUON
        ),
        ema=0.999,
        init=lambda key: model.init(key, jnp.zeros((1, 16, 16, 3)))["params"],
        frozen={},
        batch=batch,
        loss=loss,
        evaluate=functools.partial(_evaluate, model),
    )


def _evaluate(model: DCAE, params: Mapping) -> dict[str, float]:
    """Mean PSNR in dB of held-out scenes, and the share that the scorer still reads as the same scene."""
    scenes, pixels = _pictures(np.random.default_rng(0), "held_out", HELD_OUT, (48, 48))
    restored = np.asarray(_restore(model, params, pixels))
    error = (restored.astype(np.float64) - pixels) ** 2
    right = [score_reconstruction(p, s).correct for p, s in zip(restored, scenes, strict=True)]
    return {
        "psnr": float(np.mean(10 * np.log10(255**2 / error.mean(axis=(1, 2, 3))))),
        "scene_kept": float(np.mean(right)),
    }


@functools.partial(jax.jit, static_argnums=0)
def _restore(model: DCAE, params: Mapping, pixels: jax.Array) -> jax.Array:
    restored = model.apply({"params": params}, _scaled(pixels))
    return jnp.round(jnp.clip((restored + 1) * 127.5, 0, 255)).astype(jnp.uint8)


def save(params: Mapping, root: pathlib.Path) -> Mapping:
    """Writes ROOT/sana/vae and returns its weights. `scaling_factor` gives latents of training scenes unit variance."""
    _, pixels = _pictures(np.random.default_rng(1), "train", 512, (48, 48))
    encode = jax.jit(lambda p, x: _model().apply({"params": p}, _scaled(x), method="encode"))
    scale = round(1 / float(np.std(encode(params, pixels).astype(jnp.float32))), 4)
    save_backbone(DC_AE, root, {**DC_AE_CONFIG, "scaling_factor": scale}, params)
    return params
