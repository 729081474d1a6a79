"""Parity of greedy decoding, from pixels to 32 tokens, with transformers' `generate`."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import torch

from tests.parity.cases_qwen_text import (
    IMAGE,
    SMALL,
    our_params,
    pad_prompts,
    picture_ids,
    picture_prompt,
    reference_model,
)
from tests.parity.harness import MODEL, Case, Sabotage, relative_l2, to_torch
from wemmu_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from wemmu_jax.models.qwen2_5_vl.decode import Decoded, Sampling, generate
from wemmu_jax.models.qwen2_5_vl.images import pack_images, patchify
from wemmu_jax.models.qwen2_5_vl.text import TextModel
from wemmu_jax.models.qwen2_5_vl.vision import VisionTransformer

NEW_TOKENS, DISTINCT = 32, 12
# Row n of the batch has n pictures; each grid is (rows, columns) in merged tokens.
GRIDS: tuple[tuple[tuple[int, int], ...], ...] = ((), ((3, 5),), ((5, 2), (2, 6)))
WORDS = ((9,), (4, 6), (5, 3, 8))


@dataclasses.dataclass(frozen=True, eq=False)
class Chat:
    """A reference model with three prompts of 0, 1 and 2 pictures, and what it answers to each of them alone.

    Attributes:
      config: ours.
      params: ours, with `vision` and `text`.
      prompts: int64[L] for each row.
      ids: int64[3, B, L] of the padded batch.
      next_position: int64[B].
      patches: of each picture of the batch, in order.
      answers: for each row the tokens int64[32] and the logits float32[32, V] they were taken from.
    """

    config: Qwen25VLConfig
    params: dict
    prompts: list[np.ndarray]
    ids: np.ndarray
    next_position: np.ndarray
    patches: list[np.ndarray]
    answers: list[tuple[torch.Tensor, torch.Tensor]]


@functools.cache
def _chat(tied: bool) -> Chat:
    # Most random models soon repeat a few tokens; with these seeds every row has 12 distinct ones or more.
    reference = reference_model(SMALL, tied=tied, seed=76 if tied else 23)
    config = Qwen25VLConfig.from_hf(reference.config.to_dict())
    prompts = [
        picture_prompt(grids, words=words, seed=row)
        for row, (grids, words) in enumerate(zip(GRIDS, WORDS, strict=True))
    ]
    all_grids = [grid for grids in GRIDS for grid in grids]
    generator = np.random.default_rng(22)
    unit = config.vision.unit
    patches = [
        patchify(
            generator.integers(0, 256, (rows * unit, columns * unit, 3), np.uint8), config.vision
        )
        for rows, columns in all_grids
    ]
    tokens, valid = pad_prompts(prompts)
    ids, next_position = picture_ids(reference, tokens, all_grids, valid)
    answers, used = [], 0
    for prompt, grids in zip(prompts, GRIDS, strict=True):
        own = patches[used : used + len(grids)]
        answers.append(_reference_answer(reference, prompt, grids, own))
        used += len(grids)
    params = our_params(reference, config)
    return Chat(config, params, prompts, ids, next_position, patches, answers)


def _reference_answer(reference, prompt, grids, patches) -> tuple[torch.Tensor, torch.Tensor]:
    pictures = {}
    if grids:
        pictures = {
            "pixel_values": to_torch(np.concatenate(patches)),
            "image_grid_thw": torch.tensor([(1, 2 * gh, 2 * gw) for gh, gw in grids]),
        }
    tokens = to_torch(prompt[None])
    reference.generation_config.eos_token_id = None
    out = reference.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        mm_token_type_ids=(tokens == IMAGE).int(),
        **pictures,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[0, len(prompt) :], torch.cat(out.logits)


def _our_answers(tied: bool, *, late: int = 0) -> Decoded:
    """Ours: the three prompts as one padded batch; new tokens start `late` positions too late."""
    chat = _chat(tied)
    tokens, valid = pad_prompts(chat.prompts)
    model = TextModel(chat.config.text)
    grids = [grid for row in GRIDS for grid in row]
    images = pack_images(chat.patches, grids, chat.config.vision)
    vision = VisionTransformer(chat.config.vision)
    features = jax.jit(vision.apply)({"params": chat.params["vision"]}, images)
    words = model.apply({"params": chat.params["text"]}, jnp.asarray(tokens), method="embed")
    embeds = np.array(words)
    embeds[(tokens == IMAGE) & valid] = np.concatenate(
        [features[i, : gh * gw] for i, (gh, gw) in enumerate(grids)]
    )
    return generate(
        model,
        chat.params["text"],
        jnp.asarray(embeds),
        jnp.asarray(chat.ids),
        jnp.asarray(valid),
        jnp.asarray(chat.next_position + late),
        max_new_tokens=NEW_TOKENS,
        eos_ids=(),
        sampling=Sampling(),
        key=jax.random.key(0),
        return_logits=True,
    )


_decoded = functools.cache(_our_answers)


def _worst_step(decoded: Decoded, tied: bool, row: int) -> float:
    """The greatest relative error of the logits of any of the 32 steps."""
    _, logits = _chat(tied).answers[row]
    return max(map(relative_l2, decoded.logits[row], logits))


def _greedy(tied: bool, row: int) -> float:
    tokens, _ = _chat(tied).answers[row]
    distinct = len(set(tokens.tolist()))
    assert distinct >= DISTINCT, f"only {distinct} of the reference's tokens are distinct"
    if not np.array_equal(_decoded(tied).tokens[row], tokens.numpy()):
        return math.inf
    return _worst_step(_decoded(tied), tied, row)


def cases() -> list[Case]:
    """The error is the worst step's, and infinite if any token differs."""
    return [
        Case(
            f"qwen2.5-vl / greedy, 32 tokens, {len(grids)} images, {'tied' if tied else 'untied'}",
            MODEL,
            functools.partial(_greedy, tied, row),
        )
        for tied in (True, False)
        for row, grids in enumerate(GRIDS)
    ]


def sabotage() -> list[Sabotage]:
    """Ways to get decoding wrong that prefill would not show."""
    return [
        Sabotage(
            "qwen2.5-vl / greedy, new tokens one position late",
            MODEL,
            lambda: _worst_step(_our_answers(True, late=1), True, row=2),
        )
    ]
