"""A conversation as a VLM learns from it: its tokens, and how much each of them counts as a target. L tokens."""

import sys
from collections.abc import Sequence

import numpy as np

from wemmu_jax.data.records import Turn
from wemmu_jax.models.qwen2_5_vl.prompt import (
    Grid,
    PaddedPrompt,
    Prompt,
    PromptEncoder,
    user_turn,
)

# By whose turn a token belongs to. The words of users teach the language; the answers are what counts.
TARGET_WEIGHTS = {"system": 0.0, "user": 0.1, "assistant": 1.0}


def encode_turns(
    prompts: PromptEncoder,
    turns: Sequence[Turn],
    grids: Sequence[Grid],
    *,
    source_tokens: int,
    length: int = sys.maxsize,
) -> Prompt:
    """The first turns, as many as fit, up to where the assistant would answer again.

    Args:
      prompts: chat template and tokenizer.
      turns: of the conversation.
      grids: of all its pictures, in the order in which the turns show them.
      source_tokens: places that each picture has among the row's features.
      length: the most tokens, those of pictures among them.

    Raises:
      ValueError: the first turn alone is longer.
    """
    for count in range(len(turns), 0, -1):
        messages, shown = [], 0
        for turn in turns[:count]:
            asked = user_turn(turn.question, images=turn.pictures)
            messages += [asked, {"role": "assistant", "content": turn.answer}]
            shown += turn.pictures
        prompt = prompts.encode(
            messages,
            grids[:shown],
            vae_tokens=False,
            source_tokens=source_tokens,
            open_image=False,
            limit=sys.maxsize,
        )
        if len(prompt.tokens) <= length:
            return prompt
    raise ValueError(
        f"conversation: expected a first turn of at most {length} tokens, found {len(prompt.tokens)}"
    )


def target_weights(prompts: PromptEncoder, padded: PaddedPrompt) -> np.ndarray:
    """float32[L], the weight of each token as a target: TARGET_WEIGHTS of whose turn it belongs to. The end of a turn
    belongs to it; its header, pictures and padding weigh nothing."""
    tokens = padded.tokens.tolist()
    headers = {role: prompts.words(f"{role}\n") for role in TARGET_WEIGHTS}
    weights = np.zeros(len(tokens), np.float32)
    starts = np.flatnonzero(padded.tokens == prompts.turn_start_id) + 1
    for start in starts[:-1].tolist():  # the last one opens an answer that is not there
        role = next(r for r, ids in headers.items() if tokens[start : start + len(ids)] == ids)
        body = start + len(headers[role])
        end = tokens.index(prompts.turn_end_id, body) + 1
        weights[body:end] = TARGET_WEIGHTS[role]
    weights[padded.feature_index >= 0] = 0.0
    return weights
