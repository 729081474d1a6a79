"""The tiny VLM: learns to describe scenes, then statements about them, then from conversations.

Descriptions teach the eye: from conversations alone, shapes were still guessed after 500 steps.
"""

import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wemmu_jax.conversion.backbones import VLM
from wemmu_jax.data.buckets import Bucket
from wemmu_jax.data.tasks import Task, make_example
from wemmu_jax.miniworld.conversations import (
    EDIT_SHARE,
    Conversation,
    draw_change,
    draw_conversation,
    draw_description,
    draw_statements,
)
from wemmu_jax.miniworld.questions import KINDS, draw_question
from wemmu_jax.miniworld.sources import SIZES, TURNS, conversation_record
from wemmu_jax.models.qwen2_5_vl.answers import TARGET_WEIGHTS
from wemmu_jax.models.qwen2_5_vl.text import Pattern
from wemmu_jax.models.wemmu.config import BridgeConfig, WeMMUConfig
from wemmu_jax.models.wemmu.inputs import RowEncoder
from wemmu_jax.models.wemmu.modeling import WeMMUModel
from wemmu_jax.tiny.backbones import BRIDGE, save_backbone
from wemmu_jax.tiny.grounding import init_places, place_labels, place_losses
from wemmu_jax.tiny.loop import Recipe
from wemmu_jax.tiny.pictures import batch_rng, draw_size
from wemmu_jax.tiny.positions import begin_with_positions
from wemmu_jax.training.optimizer import Method, OptimizerConfig

ROWS, STEPS = 32, 8000
# The steps up to which there are only descriptions, from there on only statements, and up to which there are few edits,
# answered with their outcomes, which ask for no places. How soon questions are learned hangs on it (docs/miniworld.md).
DESCRIPTIONS, STATEMENTS, QUESTIONS = 200, 500, 3000
WORDS = (36, 60)  # of a row of statements, without a picture and with one
TEXT_LENGTH, DESCRIPTION_LENGTH, STATEMENTS_LENGTH = 152, 72, 128
PLACES_WEIGHT = 1.0  # of where things are that are named, beside the loss of a token
HELD_OUT = 64


class _Mix(NamedTuple):
    """The share of batches with none, one and two pictures; of what kinds questions are; the share of edits in
    conversations about one picture; and whether what edits and compositions lead to is told, in place of what they
    mean."""

    arities: tuple[float, float, float]
    kinds: tuple[str, ...]
    edit_share: float
    outcomes: bool


# What takes longest to learn is asked more often at the end.
_EARLY = _Mix((0.2, 0.7, 0.1), tuple(KINDS), edit_share=EDIT_SHARE, outcomes=True)
_LATE = _Mix(
    (0.15, 0.65, 0.2),
    (*KINDS, "count", "count", "relation", "existence"),
    edit_share=0.4,
    outcomes=False,
)


class Conversations:
    """Conversations as arrays for the VLM."""

    def __init__(self, root: pathlib.Path):
        """`root` holds the configs and the tokenizer."""
        self.config = WeMMUConfig.from_folder(root, BridgeConfig(**BRIDGE))
        grids = [self.config.source_grid(*size) for size in SIZES]
        self._rows = RowEncoder.load(root, self.config).sized(grids, multiple=4)
        self.prompts = self._rows.prompts

    def encode(
        self,
        conversations: Sequence[Conversation],
        size: tuple[int, int],
        *,
        text_length: int = TEXT_LENGTH,
    ) -> dict[str, object]:
        """Rows with equally many pictures, all of `size`: `tokens`, `feature_index`, `position_ids`, `valid`,
        `weights` float32[B, L] of each token as a target, `places` of `place_labels`, `images` or None."""
        records = [conversation_record(str(n), one) for n, one in enumerate(conversations)]
        rows = [
            self._rows.encode_example(make_example(Task.VQA, record), Bucket(*size), text_length)
            for record in records
        ]
        arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        arrays["places"] = np.stack(
            [
                place_labels(row["tokens"], row["weights"], one.named, self.prompts)
                for row, one in zip(rows, conversations, strict=True)
            ]
        )
        arrays["position_ids"] = np.moveaxis(arrays["position_ids"], 1, 0)
        pixels = arrays.pop("vit_pixels", None)
        images = None if pixels is None else self._rows.pack(list(np.concatenate(pixels)))
        return {**arrays, "images": images}


def _token_losses(model: WeMMUModel, params: Mapping, batch: Mapping) -> tuple[jax.Array, ...]:
    """Cross-entropy, whether the likeliest token is right, and the weight, of tokens 1 to L, [B, L - 1] each; and the
    values of all layers."""
    x = model.embed_prompt(params, batch["tokens"], batch["feature_index"], batch["images"])
    hidden, key_values = model.text.apply(
        {"params": params["text"]},
        x,
        batch["position_ids"],
        valid=batch["valid"],
        pattern=Pattern.CAUSAL,
        return_key_values=True,
    )
    logits = model.text.apply({"params": params["text"]}, hidden[:, :-1], method="logits")
    targets = batch["tokens"][:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    right = jnp.argmax(logits, axis=-1) == targets
    return losses, right, batch["weights"][:, 1:], key_values.value


def recipe(root: pathlib.Path, *, seed: int, steps: int) -> Recipe:
    """Next-token prediction on the answers, and a little on the users' words; and where what they name is."""
    data = Conversations(root)
    model = WeMMUModel(data.config, dtype=jnp.float32, remat="unrolled")

    def init(key: jax.Array) -> dict:
        params, text = model.init_backbones(key)["vlm"], data.config.vlm.text
        params = {**params, "text": begin_with_positions(params["text"], text)}
        return {"vlm": params, "places": init_places(text)}

    def loss(params: Mapping, _, batch: Mapping, key: jax.Array):
        losses, right, weights, values = _token_losses(model, params["vlm"], batch)
        answers = weights == TARGET_WEIGHTS["assistant"]
        total = jnp.sum(losses * weights) / jnp.sum(weights)
        misplaced, placed = place_losses(params["places"], values, batch["places"])
        accuracy = jnp.sum(right & answers) / jnp.sum(answers)
        total = total + PLACES_WEIGHT * misplaced
        return total, {"answer_accuracy": accuracy, "place_accuracy": placed}

    def batch(step: int) -> dict[str, object]:
        rng = batch_rng(seed, step)
        if step <= DESCRIPTIONS:
            drawn = [draw_description(rng, "train") for _ in range(ROWS)]
            return data.encode(drawn, SIZES[0], text_length=DESCRIPTION_LENGTH)
        if step <= STATEMENTS:
            pictures = int(rng.random() < 0.8)
            drawn = [
                draw_statements(rng, "train", pictures=pictures, words=WORDS[pictures])
                for _ in range(ROWS)
            ]
            return data.encode(drawn, SIZES[0], text_length=STATEMENTS_LENGTH)
        mix = _EARLY if step <= QUESTIONS else _LATE
        pictures = int(rng.choice(3, p=mix.arities))
        size = draw_size(rng) if pictures == 1 else SIZES[0]
        drawn = [
            draw_conversation(
                rng,
                "train",
                pictures=pictures,
                turns=TURNS,
                kinds=mix.kinds,
                edit_share=mix.edit_share,
                outcomes=mix.outcomes,
            )
            for _ in range(ROWS)
        ]
        return data.encode(drawn, size)

    return Recipe(
        name="vlm",
        seed=seed,
        rows=ROWS,
        optimizer=OptimizerConfig(
            learning_rate=2e-3,
            warmup=min(150, steps // 10),
            steps=steps,
            weight_decay=0.01,
            method=Method.MUON,
        ),
        ema=0.995,
        init=init,
        frozen={},
        batch=batch,
        loss=loss,
        evaluate=functools.partial(_evaluate, data, jax.jit(functools.partial(_right, model))),
    )


def _right(model: WeMMUModel, params: Mapping, batch: Mapping) -> jax.Array:
    """bool[B]: greedy decoding would give the whole answer, since it is right wherever all before it is right."""
    _, right, weights, _ = _token_losses(model, params, batch)
    return jnp.all(right | (weights < TARGET_WEIGHTS["assistant"]), axis=1)


def _evaluate(data: Conversations, right, params: Mapping) -> dict[str, float]:
    """Shares of held-out requests, in held-out wordings, whose whole answer is right: questions by kind and their mean,
    and what edits, and compositions of two pictures, mean."""
    asked: dict[str, list[Conversation]] = {}
    for number, kind in enumerate(KINDS):
        rng = np.random.default_rng([0, number])
        drawn = [draw_question(rng, "held_out", kind) for _ in range(HELD_OUT)]
        asked[kind] = [Conversation(((q.text, q.answer),), (q.scene,)) for q in drawn]
    rng = np.random.default_rng([0, len(KINDS)])
    for name, pictures in (("edit", 1), ("composition", 2)):
        asked[name] = [draw_change(rng, "held_out", pictures=pictures) for _ in range(HELD_OUT)]
    scores = {
        name: float(np.mean(right(params["vlm"], data.encode(conversations, SIZES[0]))))
        for name, conversations in asked.items()
    }
    return {**scores, "mean": float(np.mean([scores[kind] for kind in KINDS]))}


def save(params: Mapping, root: pathlib.Path) -> Mapping:
    """Writes the VLM's weights beside the config and the tokenizer in ROOT/vlm, and returns them."""
    config = json.loads((root / "vlm/config.json").read_text())
    save_backbone(VLM, root, config, params["vlm"])
    return params["vlm"]
