"""The tiny Sana DiT: text to image before there is any bridge.

As Sana has a text encoder of its own, which knows nothing of Qwen2.5-VL, so this one learns with a small reader of
captions and a linear layer to its caption width. Both are dropped afterwards; the bridge takes their place.

Reader and DiT would have to find together how a place is spoken of, and do so late. So the DiT first reads the facts of
each place from a table, and captions when it knows what to make of places; those first that tell all.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from wemmu_jax.conversion.backbones import DC_AE, DIT
from wemmu_jax.data.prompts import UNCONDITIONAL_PROMPT
from wemmu_jax.diffusion.flow import (
    TIMESTEPS,
    TimeLaw,
    draw_flow_noise,
    draw_sigma,
    noised,
    target_velocity,
)
from wemmu_jax.diffusion.guidance import guided, request_guidance
from wemmu_jax.diffusion.losses import flow_matching
from wemmu_jax.diffusion.solvers import Solver, solve
from wemmu_jax.miniworld.language import complete_caption
from wemmu_jax.miniworld.prompts import CATEGORIES, draw_prompt
from wemmu_jax.miniworld.renderer import render
from wemmu_jax.miniworld.scene import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    Scene,
    draw_scene,
)
from wemmu_jax.miniworld.scorer import score_prompt
from wemmu_jax.miniworld.sources import SIZES, draw_captioned, draw_prompted
from wemmu_jax.models.qwen2_5_vl.text import Pattern, TextModel
from wemmu_jax.models.wemmu.config import BridgeConfig, WeMMUConfig
from wemmu_jax.models.wemmu.inputs import RowEncoder
from wemmu_jax.models.wemmu.modeling import Condition, WeMMUModel
from wemmu_jax.tiny.backbones import BRIDGE, DIT_CONFIG, load_backbone, save_backbone
from wemmu_jax.tiny.loop import Recipe
from wemmu_jax.tiny.pictures import batch_rng, draw_size
from wemmu_jax.tiny.positions import begin_with_positions
from wemmu_jax.training.optimizer import Method, OptimizerConfig

ROWS, STEPS = 32, 16_000
TEXT_LENGTH, READER_LAYERS = 64, 2
# The steps up to which there are only facts; only captions that tell all, beside facts in this share of the rows; and
# any captions, beside the same facts. What is late to be learned is that places agree on what a caption leaves open:
# from there on no facts, and half of the captions are prompts of GenEval's kinds, beside those among any.
FACTS, COMPLETE, ANY, FACTS_SHARE = 500, 1300, 2000, 0.25
UNCONDITIONAL_SHARE = 0.1
SHIFT, GUIDANCE, SOLVER_STEPS = 6.0, 3.0, 20
DRAWS = 4  # of noise and time for each scene; one cost half as much
HELD_OUT = 32  # prompts of each category


@dataclasses.dataclass(frozen=True)
class _Painter:
    """The DiT behind its reader."""

    model: WeMMUModel
    rows: RowEncoder

    @property
    def reader(self) -> TextModel:
        """The first layers of a language model, with the VLM's sizes and words."""
        config = self.model.config.vlm.text
        return TextModel(dataclasses.replace(config, num_hidden_layers=READER_LAYERS))

    @property
    def projection(self) -> nn.Dense:
        """From the reader's width to the DiT's caption width."""
        return nn.Dense(self.model.config.dit.caption_channels)

    def init(self, key: jax.Array) -> dict:
        """`dit`, `reader`, `projection` and `facts`, a vector for each shape, colour, place and background."""
        keys = jax.random.split(key, 4)
        one, place = jnp.zeros((1, 1), jnp.int32), jnp.zeros((3, 1, 1), jnp.int32)
        valid, hidden = jnp.ones((1, 1), bool), jnp.zeros((1, 1, self.model.width))
        sizes = (1 + len(SHAPES), 1 + len(COLOURS), len(PLACES), len(BACKGROUNDS))
        width = self.model.config.dit.caption_channels
        facts = jax.random.normal(keys[3], (sum(sizes), width))
        reader = self.reader.init(keys[1], one, place, valid=valid, method="score")["params"]
        return {
            "dit": self.model.init_backbones(keys[0])["dit"],
            "reader": begin_with_positions(reader, self.reader.config),
            "projection": self.projection.init(keys[2], hidden)["params"],
            "facts": facts,
        }

    def prompts(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """tokens int32[B, L], position_ids int32[3, B, L], valid bool[B, L]."""
        rows = [
            self.rows.prompts.pad(self.rows.prompt(text, (), overflow="cut"), TEXT_LENGTH)
            for text in texts
        ]
        return {
            "tokens": np.stack([row.tokens for row in rows]),
            "position_ids": np.stack([row.position_ids for row in rows], axis=1),
            "valid": np.stack([row.valid for row in rows]),
        }

    def condition(self, params: Mapping, prompts: Mapping) -> Condition:
        """What the DiT attends to."""
        reader = {"params": params["reader"]}
        hidden, _ = self.reader.apply(
            reader,
            self.reader.apply(reader, prompts["tokens"], method="embed"),
            prompts["position_ids"],
            valid=prompts["valid"],
            pattern=Pattern.CAUSAL,
            return_key_values=False,
        )
        tokens = self.projection.apply({"params": params["projection"]}, hidden)
        return Condition(tokens, prompts["valid"])

    def told(self, params: Mapping, batch: Mapping) -> Condition:
        """The facts of each place where `by_facts`, the caption elsewhere."""
        read = self.condition(params, batch)
        rows, length = read.valid.shape
        facts = jnp.sum(params["facts"][batch["facts"]], axis=2)
        missing = length - facts.shape[1]
        facts = jnp.pad(facts, ((0, 0), (0, missing), (0, 0)))
        valid = jnp.broadcast_to(jnp.arange(length) < length - missing, (rows, length))
        chosen = batch["by_facts"][:, None]
        return Condition(
            jnp.where(chosen[..., None], facts, read.tokens), jnp.where(chosen, valid, read.valid)
        )

    @functools.partial(jax.jit, static_argnums=0)
    def paint(self, params: Mapping, frozen: Mapping, prompts: Mapping, key: jax.Array):
        """Pictures uint8[B, 48, 48, 3]; `prompts` holds B unconditional ones, then B captions."""
        condition = self.condition(params, prompts)
        count = prompts["tokens"].shape[0] // 2

        def velocity(latents: jax.Array, timestep: jax.Array) -> jax.Array:
            times = jnp.full(latents.shape[0], timestep, jnp.float32)
            return self.model.paint(params, latents, times, condition)

        side, channels = DIT_CONFIG["sample_size"], DIT_CONFIG["in_channels"]
        latents = solve(
            guided(velocity, request_guidance(GUIDANCE)),
            jax.random.normal(key, (count, side, side, channels)),
            steps=SOLVER_STEPS,
            shift=SHIFT,
            solver=Solver.DPM_SOLVER_PP,
        )
        return self.model.decode(frozen, latents)


def facts(scene: Scene) -> np.ndarray:
    """int32[9, 4], for each place its shape, its colour, itself and the background, as rows of the table of facts; the
    first shape and the first colour are none."""
    places = {item.place: item for item in scene.objects}
    colours, backgrounds = list(COLOURS), list(BACKGROUNDS)
    rows = []
    for number, place in enumerate(PLACES):
        item = places.get(place)
        shape = 0 if item is None else 1 + SHAPES.index(item.shape)
        colour = 0 if item is None else 1 + colours.index(item.colour)
        rows.append((shape, colour, number, backgrounds.index(scene.background)))
    starts = np.cumsum([0, 1 + len(SHAPES), 1 + len(COLOURS), len(PLACES)])
    return (np.array(rows) + starts).astype(np.int32)


def recipe(root: pathlib.Path, *, seed: int, steps: int) -> Recipe:
    """Flow matching on the latents of drawn scenes."""
    config = WeMMUConfig.from_folder(root, BridgeConfig(**BRIDGE))
    rows = RowEncoder.load(root, config).sized([config.query_grid(*s) for s in SIZES], multiple=4)
    painter = _Painter(WeMMUModel(config, dtype=jnp.float32, remat="unrolled"), rows)
    frozen = {"dc_ae": load_backbone(DC_AE, root)}
    _check_latents(painter.model, frozen, root)

    def loss(params: Mapping, frozen: Mapping, batch: Mapping, key: jax.Array):
        clean = jnp.repeat(painter.model.encode(frozen, batch["pixels"]), DRAWS, axis=0)
        numbers = jnp.arange(len(clean), dtype=jnp.uint32)
        noise = draw_flow_noise(key, numbers, clean.shape[1:])
        sigma = draw_sigma(key, numbers, law=TimeLaw.LOGIT_NORMAL, shift=SHIFT)
        noisy = noised(clean, noise, sigma)
        told = painter.told(params, batch)
        velocity = painter.model.paint(params, noisy, TIMESTEPS * sigma, told)
        return jnp.mean(flow_matching(velocity, target_velocity(clean, noise))), {}

    def batch(step: int) -> dict[str, np.ndarray]:
        rng = batch_rng(seed, step)
        size = draw_size(rng)
        drawn = [_captioned(rng, step) for _ in range(ROWS)]
        texts, scenes = [text for text, _ in drawn], [scene for _, scene in drawn]
        for row in np.flatnonzero(rng.random(ROWS) < UNCONDITIONAL_SHARE):
            texts[row] = UNCONDITIONAL_PROMPT
        pixels = np.stack([render(scene, *size) for scene in scenes])
        facts_share = 1.0 if step <= FACTS else FACTS_SHARE if step <= ANY else 0.0
        by_facts = rng.random(ROWS) < facts_share
        told = {"facts": np.stack([facts(scene) for scene in scenes]), "by_facts": by_facts}
        return {"pixels": pixels, **painter.prompts(texts), **told}

    return Recipe(
        name="sana",
        seed=seed,
        rows=ROWS,
        optimizer=OptimizerConfig(
            learning_rate=4e-3,
            warmup=min(100, steps // 10),
            steps=steps,
            weight_decay=0.01,
            method=Method.MUON,
        ),
        ema=0.999,
        init=painter.init,
        frozen=frozen,
        batch=batch,
        loss=loss,
        evaluate=functools.partial(_evaluate, painter, frozen),
    )


def _check_latents(model: WeMMUModel, frozen: Mapping, root: pathlib.Path) -> None:
    """Latents of another size learn too, but badly and unnoticed: less of a picture is left under every noise."""
    rng = np.random.default_rng(0)
    pixels = np.stack([render(draw_scene(rng, "train"), *SIZES[0]) for _ in range(64)])
    deviation = float(jnp.std(jax.jit(model.encode)(frozen, pixels)))
    if not 0.8 < deviation < 1.25:
        raise ValueError(
            f"{root / DC_AE.folder / 'config.json'}: scaling_factor: expected latents of scenes with a standard "
            f"deviation of 1, found {deviation:.3g}"
        )


def _captioned(rng: np.random.Generator, step: int) -> tuple[str, Scene]:
    if step <= COMPLETE:
        scene = draw_scene(rng, "train")
        return complete_caption(scene, rng, "train"), scene
    draw = draw_prompted if step > ANY and rng.integers(2) else draw_captioned
    text, _, scene = draw(rng, "train")
    return text, scene


def _evaluate(painter: _Painter, frozen: Mapping, params: Mapping) -> dict[str, float]:
    """Share of held-out prompts that are drawn right, by category."""
    scores = {}
    for number, category in enumerate(CATEGORIES):
        rng = np.random.default_rng([0, number])
        prompts = [draw_prompt(rng, "held_out", category)[0] for _ in range(HELD_OUT)]
        texts = [UNCONDITIONAL_PROMPT] * HELD_OUT + [prompt.text for prompt in prompts]
        drawn = painter.paint(params, frozen, painter.prompts(texts), jax.random.key(number))
        graded = zip(np.asarray(drawn), prompts, strict=True)
        scores[category] = float(np.mean([score_prompt(p, q).correct for p, q in graded]))
    return {**scores, "mean": float(np.mean(list(scores.values())))}


def save(params: Mapping, root: pathlib.Path) -> Mapping:
    """Writes the DiT's weights beside its config in ROOT/sana/transformer, and returns them."""
    config = json.loads((root / DIT.folder / "config.json").read_text())
    save_backbone(DIT, root, config, params["dit"])
    return params["dit"]
