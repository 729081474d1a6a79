"""Decoding: prefill of the prompt, then one compiled loop that adds a token to every row at a time.

B batch, L prompt tokens, D model width, V vocabulary. Reference: transformers' `GenerationMixin.generate`.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp

from wemmu_jax.models.qwen2_5_vl.text import KeyValues, Pattern, TextModel
from wemmu_jax.ops.programs import in_full


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from its logits.

    Attributes:
      temperature: divides the logits; 0 takes the most probable token (greedy).
      top_k: draw among the k most probable tokens only; None for all.
      top_p: then among the fewest whose probabilities reach p together; None for all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, found {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be 1 or more, found {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], found {self.top_p}")


@flax.struct.dataclass
class Decoded:
    """What `generate` returns.

    Attributes:
      tokens: int32[B, max_new_tokens]; from its end token on, a row is filled with the first of `eos_ids`.
      lengths: int32[B], the number of tokens before the end token.
      logits: float32[B, max_new_tokens, V], what each token was taken from (zeros after the loop stopped),
        or None.
    """

    tokens: jax.Array
    lengths: jax.Array
    logits: jax.Array | None


@flax.struct.dataclass
class _State:
    """Between two steps: `count` tokens are chosen in every row; the model has read all but the last of them."""

    count: jax.Array  # int32[]
    cache: KeyValues  # [layers, B, L + max_new_tokens, K, H]
    ended: jax.Array  # bool[B]
    decoded: Decoded


@functools.partial(
    jax.jit,
    static_argnames=("model", "max_new_tokens", "eos_ids", "sampling", "return_logits"),
)
@in_full
def generate(
    model: TextModel,
    params: dict,
    embeds: jax.Array,
    position_ids: jax.Array,
    valid: jax.Array,
    next_position: jax.Array,
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    sampling: Sampling,
    key: jax.Array,
    return_logits: bool = False,
) -> Decoded:
    """Continues a batch of prompts. Compiled once for each shape of the prompts.

    Args:
      model: the language model.
      params: its parameters.
      embeds: [B, L, D], embedded prompts with the picture features in place.
      position_ids: int32[3, B, L].
      valid: bool[B, L], padded on the right; each row has at least one token.
      next_position: int32[B], the position id of a row's first new token, on all three axes.
      max_new_tokens: how many tokens to add at most.
      eos_ids: tokens that end a row; the loop stops when all rows have ended. May be empty.
      sampling: how tokens are drawn.
      key: typed key; row b draws its token t from fold_in(fold_in(key, b), t). Greedy decoding ignores it.
      return_logits: whether to keep the logits of each step.

    Raises:
      ValueError: `max_new_tokens` is below 1, or shapes do not fit each other.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be 1 or more, found {max_new_tokens}")
    batch, prompt_length = embeds.shape[:2]
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    prompt_valid = jnp.pad(valid, ((0, 0), (0, max_new_tokens)))
    new_slot = jnp.arange(prompt_length + max_new_tokens) - prompt_length

    def append(state: _State, logits: jax.Array) -> _State:
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, state.count)
        return _append(state, logits, draw(logits, sampling, keys), eos_ids)

    def step(state: _State) -> _State:
        last = state.count - 1  # chosen, not yet read
        logits, own = _read(
            model,
            params,
            jax.lax.dynamic_slice_in_dim(state.decoded.tokens, last, 1, axis=1),
            next_position + last,
            state.cache,
            prompt_valid | ((new_slot >= 0) & (new_slot < last)),
        )
        cache = jax.tree.map(
            lambda whole, new: jax.lax.dynamic_update_slice_in_dim(
                whole, new, prompt_length + last, axis=2
            ),
            state.cache,
            own,
        )
        return append(state.replace(cache=cache), logits)

    def unfinished(state: _State) -> jax.Array:
        return (state.count < max_new_tokens) & ~jnp.all(state.ended)

    logits, prompt = _prefill(model, params, embeds, position_ids, valid)
    room = ((0, 0), (0, 0), (0, max_new_tokens), (0, 0), (0, 0))
    state = _State(
        count=jnp.int32(0),
        cache=jax.tree.map(lambda prefix: jnp.pad(prefix, room), prompt),
        ended=jnp.zeros(batch, bool),
        decoded=Decoded(
            tokens=jnp.full((batch, max_new_tokens), eos_ids[0] if eos_ids else 0, jnp.int32),
            lengths=jnp.zeros(batch, jnp.int32),
            logits=jnp.zeros((batch, max_new_tokens, logits.shape[-1])) if return_logits else None,
        ),
    )
    return jax.lax.while_loop(unfinished, step, append(state, logits)).decoded


def _prefill(model, params, embeds, position_ids, valid) -> tuple[jax.Array, KeyValues]:
    """The logits [B, V] after each row's last token, and the keys and values of the prompts."""
    hidden, prompt = model.apply(
        {"params": params},
        embeds,
        position_ids,
        valid=valid,
        pattern=Pattern.CAUSAL,
        return_key_values=True,
    )
    last = jnp.sum(valid, axis=1) - 1
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    return model.apply({"params": params}, hidden, method="logits")[:, 0], prompt


def _read(model, params, tokens, positions, cache, cache_valid) -> tuple[jax.Array, KeyValues]:
    """Reads tokens int32[B, 1] at positions int32[B] over the cache; as `_prefill`."""
    hidden, own = model.apply(
        {"params": params},
        model.apply({"params": params}, tokens, method="embed"),
        jnp.broadcast_to(positions[None, :, None], (3, *tokens.shape)),
        valid=jnp.ones(tokens.shape, bool),
        context=cache,
        context_valid=cache_valid,
        pattern=Pattern.CAUSAL,
        return_key_values=True,
    )
    return model.apply({"params": params}, hidden, method="logits")[:, 0], own


def _append(state: _State, logits: jax.Array, token: jax.Array, eos_ids) -> _State:
    """Writes one token int32[B] into each row that has not ended."""
    decoded, count = state.decoded, state.count
    write = functools.partial(jax.lax.dynamic_update_index_in_dim, index=count, axis=1)
    fill = jax.lax.dynamic_index_in_dim(decoded.tokens, count, axis=1, keepdims=False)
    ended = state.ended | jnp.isin(token, jnp.array(eos_ids, jnp.int32))
    decoded = Decoded(
        tokens=write(decoded.tokens, jnp.where(ended, fill, token)),
        lengths=decoded.lengths + ~ended,
        logits=None if decoded.logits is None else write(decoded.logits, logits),
    )
    return state.replace(count=count + 1, ended=ended, decoded=decoded)


def draw(logits: jax.Array, sampling: Sampling, keys: jax.Array) -> jax.Array:
    """One token a row: float32[B, V] and typed keys [B] -> int32[B]."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits = _drop_below(logits, jax.lax.top_k(logits, sampling.top_k)[0][:, -1])
    if sampling.top_p is not None:
        ranked = -jnp.sort(-logits, axis=-1)
        shares = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares  # what the more probable tokens sum up to
        logits = _drop_below(
            logits, jnp.min(jnp.where(before < sampling.top_p, ranked, jnp.inf), axis=-1)
        )
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _drop_below(logits: jax.Array, least: jax.Array) -> jax.Array:
    return jnp.where(logits >= least[:, None], logits, -jnp.inf)
