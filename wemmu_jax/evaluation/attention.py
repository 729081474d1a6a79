"""Where the queries look: attention of the generation expert to picture and to text tokens (paper, 4.3.1, Fig. 3).

The paper calls its numbers "the difference between the average attention paid to image tokens versus text tokens",
with values from 1.80 to -0.99, which a difference of probabilities cannot reach; so three forms are measured.

B rows, L prompt tokens, Q query tokens, N heads, K key heads, H head width, S keys: [prompt | VAE tokens | queries].
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from wemmu_jax.diffusion.guidance import Branch
from wemmu_jax.inference.pipeline import WeMMU
from wemmu_jax.inference.requests import DrawingRequest
from wemmu_jax.models.wemmu.batch import PromptBatch, Sources
from wemmu_jax.models.wemmu.modeling import WeMMUModel
from wemmu_jax.models.wemmu.queries import draw_noise

GROUPS = ("vit", "vae", "text", "template", "rest", "queries")


@dataclasses.dataclass(frozen=True)
class Attention:
    """Means over layers, heads, queries and requests.

    Attributes:
      mass: share of the attention that each of `GROUPS` gets; the sum is 1. "text" are the prompt's tokens after its
        last picture token to the end of the user's turn, the instruction; "template" is what the chat template puts
        behind it, where a causal model has read all; "rest" stands before the last picture.
      log_ratio: log of the mean attention a picture token (ViT or VAE) gets over that which a token behind the pictures
        gets, text or template.
      logit_difference: mean logit of picture tokens less that of tokens behind them.
      mass_difference: total attention to picture tokens less that to tokens behind them.
      map: float32[Q, S'] of the first request, attention from each query to each prompt and VAE token that is not
        padding, mean over layers and heads.
      groups: of the S' columns of `map`.
    """

    mass: dict[str, float]
    log_ratio: float
    logit_difference: float
    mass_difference: float
    map: np.ndarray
    groups: tuple[str, ...]


def measure_attention(model: WeMMU, requests: Sequence[DrawingRequest], *, seed: int) -> Attention:
    """Where the queries look in these requests; all have the same number of sources, at least one."""
    side = model.default_size
    rows = model.requests.sized(requests, (side, side))
    inputs = model.requests.branch(Branch.REQUEST, requests, (side, side), rows)
    prompt, sources = model.with_latents(inputs)
    grid, tokens = model.model.config.query_grid(side, side), rows.shapes.tokens
    return attention_of(
        model.model,
        model.params,
        prompt,
        sources,
        grid=grid,
        query_tokens=tokens,
        turn_end=model.requests.rows.prompts.turn_end_id,
        seed=seed,
    )


def attention_of(
    model: WeMMUModel,
    params: Mapping,
    prompt: PromptBatch,
    sources: Sources,
    *,
    grid: tuple[int, int],
    query_tokens: int,
    turn_end: int,
    seed: int,
) -> Attention:
    """The same for what `WeMMUModel.read` and `write` are given.

    `turn_end` is the token that ends a turn of a conversation, `seed` that of the noise.
    """
    logits, valid = _logits(model, grid, query_tokens)(params, prompt, sources, seed)
    own = valid.shape[1] - prompt.tokens.shape[1]
    groups = _groups(prompt, sources, own=own, query_tokens=query_tokens, turn_end=turn_end)
    return _summary(np.asarray(logits), np.asarray(valid), groups)


@functools.lru_cache(maxsize=8)
def _logits(model: WeMMUModel, grid: tuple[int, int], query_tokens: int):
    """(params, prompt, sources, seed) -> float32[layers, B, N, rows * columns, S], and bool[B, S]."""

    def logits(params: Mapping, prompt, sources, seed: int):
        numbers = jnp.arange(len(prompt.tokens), dtype=jnp.uint32)
        noise = draw_noise(seed, numbers, grid=grid, width=model.width)
        context = model.read(params, prompt, sources)
        x, inputs = model.expert_inputs(
            params, context, noise, grid=grid, query_tokens=query_tokens
        )
        _, kept = model.expert.apply(
            {"params": params["expert"]}, x, **inputs, mutable=["attention"]
        )
        kept = kept["attention"]["layers"]["attention"]
        (query,), (key,) = kept["query"], kept["key"]
        count = grid[0] * grid[1]
        query = query[:, :, -query_tokens:][:, :, :count]
        heads = query.shape[-2] // key.shape[-2]
        key = jnp.repeat(key, heads, axis=-2)
        scores = jnp.einsum("lbqnh,lbsnh->lbnqs", query, key, preferred_element_type=jnp.float32)
        valid = jnp.concatenate([context.valid, inputs["valid"]], axis=1)
        return scores / query.shape[-1] ** 0.5, valid

    return jax.jit(logits)


def _groups(
    prompt: PromptBatch, sources: Sources, *, own: int, query_tokens: int, turn_end: int
) -> np.ndarray:
    """int[B, S], the number of each key's group in `GROUPS`."""
    index = np.asarray(prompt.feature_index)
    places = np.arange(index.shape[1])
    last = np.max(np.where(index >= 0, places, -1), axis=1, keepdims=True)
    ends = np.asarray(prompt.tokens) == turn_end
    end = np.max(np.where(ends, places, -1), axis=1, keepdims=True)
    groups = np.where(places > last, GROUPS.index("text"), GROUPS.index("rest"))
    groups = np.where(places >= end, GROUPS.index("template"), groups)
    vit_tokens = sources.place.shape[1]
    groups = np.where(index >= 0, GROUPS.index("vit"), groups)
    groups = np.where(index >= vit_tokens, GROUPS.index("vae"), groups)
    beside = np.full((len(index), own), GROUPS.index("queries"))
    beside[:, : own - query_tokens] = GROUPS.index("vae")
    return np.concatenate([groups, beside], axis=1)


def _summary(logits: np.ndarray, valid: np.ndarray, groups: np.ndarray) -> Attention:
    """From logits float32[layers, B, N, Q, S], valid bool[B, S] and groups int[B, S]."""
    seen = np.where(valid[None, :, None, None], logits, -np.inf)
    attention = np.exp(seen - seen.max(axis=-1, keepdims=True))
    attention /= attention.sum(axis=-1, keepdims=True)
    # Of each request, means over layers, heads and queries: float[B].
    mass, tokens, level = {}, {}, {}
    for number, name in enumerate(GROUPS):
        chosen = valid & (groups == number)
        inside = chosen[None, :, None, None]
        tokens[name] = chosen.sum(axis=1)
        mass[name] = np.where(inside, attention, 0).sum(axis=-1).mean(axis=(0, 2, 3))
        level[name] = np.where(inside, logits, 0).sum(axis=-1).mean(axis=(0, 2, 3))
    picture_tokens, picture_mass, picture_level = (
        of["vit"] + of["vae"] for of in (tokens, mass, level)
    )
    words, words_mass, words_level = (of["text"] + of["template"] for of in (tokens, mass, level))
    each = picture_mass / picture_tokens, words_mass / words
    levels = picture_level / picture_tokens, words_level / words
    columns = np.flatnonzero(valid[0] & (groups[0] != GROUPS.index("queries")))
    return Attention(
        mass={name: float(shares.mean()) for name, shares in mass.items()},
        log_ratio=float(np.mean(np.log(each[0]) - np.log(each[1]))),
        logit_difference=float(np.mean(levels[0] - levels[1])),
        mass_difference=float(np.mean(picture_mass - words_mass)),
        map=attention[:, 0].mean(axis=(0, 1))[:, columns],
        groups=tuple(GROUPS[number] for number in groups[0, columns]),
    )
