"""The language model of Qwen2.5-VL, and the stack of decoder layers that the generation expert shares with it.

B batch, L prompt tokens, T own tokens of a call, S tokens of its context, D model width, N query heads, K key/value
heads, H head width, V vocabulary. Reference: transformers' `Qwen2_5_VLTextModel` (Qwen2.5-VL report, section 2.1).

A call takes T tokens and, if there is a context, the keys and values that S earlier tokens left behind:

    prompt --TextModel, CAUSAL--> KeyValues --context--> queries --DecoderStack of the expert, FULL--> hidden
"""

import enum
import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from wemmu_jax.models.qwen2_5_vl.config import TextConfig
from wemmu_jax.ops.attention import Mask, attention
from wemmu_jax.ops.heads import FromHeads, ToHeads
from wemmu_jax.ops.norms import RMSNorm
from wemmu_jax.ops.programs import gradient_in_memory
from wemmu_jax.ops.remat import remat, unroll
from wemmu_jax.ops.rotary import multimodal_angles, rotate


class Pattern(enum.Enum):
    """What the own tokens of a call see of one another; all of them see the whole context."""

    CAUSAL = "causal"  # each sees itself and the ones before it
    FULL = "full"  # each sees all


@flax.struct.dataclass
class KeyValues:
    """What tokens leave for later ones to attend to: rotated keys, and values.

    Attributes:
      key: [B, S, K, H] of one layer, or [layers, B, S, K, H] of all.
      value: as `key`.
    """

    key: jax.Array
    value: jax.Array

    def followed_by(self, own: "KeyValues") -> "KeyValues":
        """Both along the token axis, in the type of `own`."""
        return jax.tree.map(
            lambda a, b: jnp.concatenate([a.astype(b.dtype), b], axis=-3), self, own
        )


# [B, T, D], or the settled tokens (see `DecoderStack`) and those behind them.
Tokens = jax.Array | tuple[jax.Array, jax.Array]


class Attention(nn.Module):
    """Grouped-query attention with M-RoPE over [context | own tokens]; q, k and v carry biases."""

    config: TextConfig
    dtype: jnp.dtype = jnp.float32
    hidden_tail: int = 0

    @nn.compact
    def __call__(
        self, x: jax.Array, context: KeyValues | None, angles: jax.Array, mask: Mask
    ) -> tuple[jax.Array, KeyValues]:
        """x [B, T, D], context [B, S, K, H], angles float32[B, T, H/2], mask of S+T keys;
        returns [B, T, D] and the own keys and values [B, T, K, H]."""
        config = self.config
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        project = functools.partial(ToHeads, head_dim=config.head_dim, dtype=self.dtype)
        query = project(config.num_attention_heads, name="q_proj")(x)
        key = rotate(project(config.num_key_value_heads, name="k_proj")(x), cos, sin)
        value = project(config.num_key_value_heads, name="v_proj")(x)
        own = KeyValues(checkpoint_name(key, "k"), checkpoint_name(value, "v"))
        query = checkpoint_name(rotate(query, cos, sin), "q")
        seen = own if context is None else context.followed_by(own)
        # For those who want to look at the attention, see `evaluation.attention`; nothing is kept unless asked for.
        self.sow("attention", "query", query)
        self.sow("attention", "key", seen.key)
        mixed = self._attend(query, seen, mask)
        out = FromHeads(config.hidden_size, use_bias=False, dtype=self.dtype, name="o_proj")
        return checkpoint_name(out(mixed), "out"), own

    def _attend(self, query: jax.Array, seen: KeyValues, mask: Mask) -> jax.Array:
        tail = self.hidden_tail
        if tail == 0:
            return attention(query, seen.key, seen.value, mask=mask)
        # Two calls, because one dense mask over [context | own]^2 would cost memory for what is a slice.
        hidden = mask.replace(key=mask.key[:, :-tail])
        body = attention(query[:, :-tail], seen.key[:, :-tail], seen.value[:, :-tail], mask=hidden)
        last = attention(query[:, -tail:], seen.key, seen.value, mask=mask)
        return jnp.concatenate([body, last], axis=1)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) without biases."""

    config: TextConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype)
        gate = checkpoint_name(dense(self.config.intermediate_size, name="gate_proj")(x), "gate")
        up = checkpoint_name(dense(self.config.intermediate_size, name="up_proj")(x), "up")
        gate, up = gradient_in_memory(gate), gradient_in_memory(up)
        return dense(self.config.hidden_size, name="down_proj")(nn.silu(gate) * up)


class DecoderLayer(nn.Module):
    """One layer: attention, then MLP, each behind its norm and beside its residual.

    Attributes:
      config: sizes of the language model.
      dtype: compute type.
      hidden_tail: see `DecoderStack`.
      return_key_values: whether the own keys and values are returned; unused ones would still cost memory.
    """

    config: TextConfig
    dtype: jnp.dtype = jnp.float32
    hidden_tail: int = 0
    return_key_values: bool = True

    @nn.compact
    def __call__(
        self, x: Tokens, context: KeyValues | None, angles: jax.Array, mask: Mask
    ) -> tuple[Tokens, KeyValues | None]:
        """x of T tokens, context [B, S, K, H], angles float32[B, T, H/2], mask of S+T keys;
        returns the same tokens and the own keys and values [B, T, K, H] or None."""
        x = jax.tree.map(lambda part: checkpoint_name(part, "input"), x)
        norm = functools.partial(RMSNorm, eps=self.config.rms_norm_eps, dtype=self.dtype)
        before_attention = norm(name="input_layernorm")
        attend = Attention(self.config, self.dtype, self.hidden_tail, name="attention")
        before_mlp = norm(name="post_attention_layernorm")
        mlp = GatedMLP(self.config, self.dtype, name="mlp")

        def run(x: jax.Array, context: KeyValues | None, angles: jax.Array, mask: Mask):
            mixed, own = attend(before_attention(x), context, angles, mask)
            x = x + mixed
            return x + mlp(before_mlp(x)), own

        if isinstance(x, tuple):
            first, rest = x
            count, unseen = first.shape[1], rest.shape[1]
            before = mask.replace(key=mask.key[:, :-unseen])
            first, known = run(jax.lax.stop_gradient(first), context, angles[:, :count], before)
            seen = known if context is None else context.followed_by(known)
            rest, own = run(rest, seen, angles[:, count:], mask)
            x, own = (first, rest), known.followed_by(own)
        else:
            x, own = run(x, context, angles, mask)
        return x, own if self.return_key_values else None


class DecoderStack(nn.Module):
    """All decoder layers as one scan, and the final norm. Parameters: {'layers': stacked, 'norm'}.

    Attributes:
      config: sizes of the language model.
      dtype: compute type; norms, softmax and rotary angles are float32 whatever it is.
      remat: name of a policy of `ops.remat`, for one layer.
    """

    config: TextConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        position_ids: jax.Array,
        *,
        valid: jax.Array,
        context: KeyValues | None = None,
        context_valid: jax.Array | None = None,
        pattern: Pattern,
        hidden_tail: int = 0,
        settled: int = 0,
        return_key_values: bool,
    ) -> tuple[jax.Array, KeyValues | None]:
        """Runs T tokens through the layers.

        Args:
          x: [B, T, D] embeddings.
          position_ids: int32[3, B, T], time, row and column of each token.
          valid: bool[B, T], False for padding, which nobody sees.
          context: keys and values [layers, B, S, K, H] of earlier tokens, from any stack of this config.
          context_valid: bool[B, S]; given exactly when `context` is.
          pattern: what the own tokens see of one another.
          hidden_tail: with FULL, the first T - hidden_tail own tokens do not see the last `hidden_tail`
            ones, which see all: [VAE tokens | queries].
          settled: with CAUSAL, through the first so many own tokens no gradient goes. What backward passes need
            is computed again for the others alone.
          return_key_values: whether the own keys and values are wanted.

        Returns:
          [B, T, D] after the final norm (rows of padding mean nothing), and the own keys and values
          [layers, B, T, K, H] or None.

        Raises:
          ValueError: shapes or arguments do not fit each other.
        """
        self._check(x, position_ids, valid, context, context_valid)
        _check_parts(x.shape[1], pattern, hidden_tail, settled)
        config = self.config
        angles = multimodal_angles(
            position_ids,
            head_width=config.head_dim,
            sections=config.mrope_section,
            theta=config.rope_theta,
        )
        layers = nn.scan(
            remat(DecoderLayer, self.remat),
            variable_axes={"params": 0, "attention": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            out_axes=0,
            length=config.num_hidden_layers,
            unroll=unroll(self.remat, config.num_hidden_layers),
        )(
            config,
            self.dtype,
            hidden_tail % x.shape[1],  # a tail of all T tokens is hidden from nobody
            return_key_values,
            name="layers",
        )
        mask = visibility(valid, context_valid, pattern)
        x = x.astype(self.dtype)
        # Apart through all layers: joined behind each, they would be cut again in front of the next.
        x, own = layers((x[:, :settled], x[:, settled:]) if settled else x, context, angles, mask)
        x = jnp.concatenate(x, axis=1) if settled else x
        return RMSNorm(config.rms_norm_eps, dtype=self.dtype, name="norm")(x), own

    def _check(self, x, position_ids, valid, context, context_valid) -> None:
        batch, own = x.shape[:2]
        if position_ids.shape != (3, batch, own) or valid.shape != (batch, own):
            raise ValueError(
                f"embeddings {x.shape} want position ids {(3, batch, own)} and valid {(batch, own)}, "
                f"found {position_ids.shape} and {valid.shape}"
            )
        if (context is None) != (context_valid is None):
            raise ValueError("context and context_valid are given together or not at all")
        if context is not None:
            config = self.config
            heads = (config.num_key_value_heads, config.head_dim)
            wanted = (config.num_hidden_layers, *context_valid.shape, *heads)
            if context.key.shape != wanted or context_valid.shape[0] != batch:
                raise ValueError(
                    f"context of {batch} rows wants keys [layers, B, S, K, H] = {wanted}, "
                    f"found {context.key.shape}"
                )


def _check_parts(own: int, pattern: Pattern, hidden_tail: int, settled: int) -> None:
    if not 0 <= hidden_tail <= own:
        raise ValueError(f"hidden_tail must be 0 to {own}, found {hidden_tail}")
    if hidden_tail and pattern is not Pattern.FULL:
        raise ValueError("hidden_tail is for Pattern.FULL; a causal tail is hidden anyway")
    if not 0 <= settled < own:
        raise ValueError(f"settled must be 0 to {own - 1}, found {settled}")
    if settled and pattern is not Pattern.CAUSAL:
        raise ValueError(
            "settled is for Pattern.CAUSAL; in Pattern.FULL the first tokens see the last"
        )


def visibility(valid: jax.Array, context_valid: jax.Array | None, pattern: Pattern) -> Mask:
    """The mask of T own tokens over [context | own tokens], from bool[B, T] and bool[B, S]."""
    if context_valid is not None:
        valid = jnp.concatenate([context_valid, valid], axis=1)
    return Mask(valid, causal=pattern is Pattern.CAUSAL)


class TextModel(DecoderStack):
    """The language model: a decoder stack with words at both ends.

    Parameters: those of `DecoderStack`, so that the expert starts as {'layers', 'norm'} of this tree, and
    'embed_tokens', and 'lm_head' if the config does not tie it to the embedding. Calling it runs the stack.
    """

    def setup(self) -> None:
        config = self.config
        self.embed_tokens = nn.Embed(config.vocab_size, config.hidden_size, dtype=self.dtype)
        if not config.tie_word_embeddings:
            # Logits leave the product in float32; a bfloat16 logit of 30 is off by up to 0.06.
            to_float32 = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
            self.lm_head = nn.Dense(
                config.vocab_size, use_bias=False, dtype=self.dtype, dot_general=to_float32
            )

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int32[B, L] -> [B, L, D]."""
        return self.embed_tokens(tokens)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[B, T, D] after the final norm -> float32[B, T, V]."""
        if not self.config.tie_word_embeddings:
            return self.lm_head(hidden)
        words = self.embed_tokens.embedding.astype(self.dtype)
        return jnp.einsum(
            "btd,vd->btv", hidden.astype(self.dtype), words, preferred_element_type=jnp.float32
        )

    def score(self, tokens: jax.Array, position_ids: jax.Array, *, valid: jax.Array) -> jax.Array:
        """Text alone, causally: int32[B, L], int32[3, B, L], bool[B, L] -> float32[B, L, V].

        It touches every parameter, so `init(..., method="score")` draws the whole tree.
        """
        hidden, _ = self(
            self.embed(tokens),
            position_ids,
            valid=valid,
            pattern=Pattern.CAUSAL,
            return_key_values=False,
        )
        return self.logits(hidden)
