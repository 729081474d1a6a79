"""Parity of the bridge, values and gradients, with transformers and diffusers; see `bridge_reference.py`.

B rows, L prompt tokens, n sources, S tokens of a source, Q queries, D width.
"""

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Sequence
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch

from tests.models import wemmu_fixtures as fixtures
from tests.parity import cases_qwen_text
from tests.parity.bridge_reference import (
    QUERY_GRID,
    TIMESTEPS,
    Bench,
    bench,
    joint_sequences,
    query_ids,
    reference_paint,
    reference_read,
    reference_write,
)
from tests.parity.harness import BLOCK, GRADIENT, MODEL, Case, Sabotage, relative_l2, to_torch
from wemmu_jax.conversion.memory import flatten, params_from_tensors
from wemmu_jax.models.qwen2_5_vl import text
from wemmu_jax.models.qwen2_5_vl.text import Pattern
from wemmu_jax.models.wemmu import modeling, position_mlp
from wemmu_jax.models.wemmu.config import VAEStream
from wemmu_jax.ops.attention import attention

QUERY_TOKENS = 18  # three queries of padding
LATENT_SIZE = (3, 2)
BATCH = len(fixtures.TEXTS)


# -- both, on the same numbers


@dataclasses.dataclass(frozen=True)
class Setup:
    """A configuration of the bridge and its inputs: `sources` of the two grids, and a stream."""

    sources: int
    stream: VAEStream
    real: bool = False

    @property
    def bench(self) -> Bench:
        return bench(real=self.real)

    @property
    def request(self) -> fixtures.Request:
        return fixtures.request(self.bench.config, fixtures.GRIDS[: self.sources])

    def packed(self):
        """(PromptBatch, Sources or None), the prompts a few tokens longer than they need be."""
        encoder = fixtures.row_encoder(self.bench.model(self.stream).config)
        return jax.tree.map(jnp.asarray, fixtures.pack(encoder, self.request, text_length=90))


def draw(seed: int, *shape: int) -> np.ndarray:
    """float32 N(0, 1)."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def noise_of(b: Bench) -> np.ndarray:
    """The queries, [B, Q, D] without padding."""
    return draw(31, BATCH, math.prod(QUERY_GRID), b.config.vlm.text.hidden_size)


def latents_of(b: Bench) -> np.ndarray:
    """What Sana paints on, [B, h, w, C]."""
    return draw(32, BATCH, *LATENT_SIZE, b.config.dit.in_channels)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Condition [B, Q, caption width] without padding, velocity [B, h, w, C], gradients by path."""

    condition: np.ndarray
    velocity: np.ndarray
    gradients: dict[str, np.ndarray]


@functools.cache
def expected(setup: Setup) -> Outcome:
    """The reference's, with the gradient of sum(velocity * weights)."""
    b = setup.bench
    for module in b.learned.values():
        module.zero_grad()
    condition = reference_write(b, reference_read(b, setup.request, setup.stream), noise_of(b))
    velocity = reference_paint(b, latents_of(b), condition)
    (velocity * to_torch(draw(33, *velocity.shape))).sum().backward()
    gradients = {}
    for name, module in b.learned.items():
        tensors = {
            n: (torch.zeros_like(p) if p.grad is None else p.grad).numpy()
            for n, p in module.named_parameters()
        }
        gradients |= {
            f"{name}/{path}": leaf
            for path, leaf in flatten(params_from_tensors(tensors, b.tables[name])).items()
        }
    del gradients["expert/embed_tokens/embedding"]
    return Outcome(condition.detach().numpy(), velocity.detach().numpy(), gradients)


@functools.cache
def found(setup: Setup) -> Outcome:
    """Ours."""
    b = setup.bench
    model = b.model(setup.stream)

    def loss(trainable, frozen, prompt, sources, noise, latents, weights):
        params = {**trainable, **frozen}
        context = model.read(params, prompt, sources)
        condition = model.write(params, context, noise, grid=QUERY_GRID, query_tokens=QUERY_TOKENS)
        velocity = model.paint(params, latents, TIMESTEPS, condition)
        return jnp.sum(velocity * weights), (condition, velocity)

    trainable = {name: b.params[name] for name in b.learned}
    latents = latents_of(b)
    gradients, (condition, velocity) = fixtures.quick_jit(jax.grad(loss, has_aux=True))(
        trainable,
        {"vlm": b.params["vlm"]},
        *setup.packed(),
        noise_of(b),
        latents,
        draw(33, *latents.shape),
    )
    valid = np.asarray(condition.valid[0])
    return Outcome(
        np.asarray(condition.tokens)[:, valid],
        np.asarray(velocity),
        jax.tree.map(np.asarray, flatten(gradients)),
    )


def condition_error(setup: Setup) -> float:
    return relative_l2(found(setup).condition, expected(setup).condition)


def velocity_error(setup: Setup) -> float:
    return relative_l2(found(setup).velocity, expected(setup).velocity)


def worst_gradient(setup: Setup) -> float:
    """Over all leaves that learn; none of them may have a gradient of zero, on either side."""
    ours, theirs = found(setup).gradients, expected(setup).gradients
    if setup.sources == 0:
        assert not any(ours.pop(path).any() for path in list(ours) if "vae_branch" in path)
        theirs = {path: leaf for path, leaf in theirs.items() if "vae_branch" not in path}
    assert ours.keys() == theirs.keys()
    zero = [path for path in ours if not ours[path].any() or not theirs[path].any()]
    assert not zero, f"no gradient reaches {zero}"
    return max(relative_l2(ours[path], theirs[path]) for path in ours)


# -- the condition alone, for the real widths and for sabotage


@functools.lru_cache(maxsize=2)
def expected_condition(setup: Setup) -> np.ndarray:
    """[B, Q, caption width]."""
    b = setup.bench
    with torch.no_grad():
        reading = reference_read(b, setup.request, setup.stream)
        return reference_write(b, reading, noise_of(b)).numpy()


@functools.lru_cache(maxsize=2)
def our_reader(setup: Setup) -> Callable:
    return fixtures.quick_jit(setup.bench.model(setup.stream).read)


def our_condition(
    setup: Setup,
    *,
    params: dict | None = None,
    prompt: Callable = lambda prompt, sources: prompt,
    context: Callable = lambda context: context,
) -> np.ndarray:
    """[B, Q, caption width], traced anew in each call; the arguments change what goes into it."""
    b = setup.bench
    params = params or b.params
    own, sources = setup.packed()
    read = our_reader(setup)(params, prompt(own, sources), sources)

    def write(params, context, noise):
        model = b.model(setup.stream)
        return model.write(params, context, noise, grid=QUERY_GRID, query_tokens=QUERY_TOKENS)

    condition = fixtures.quick_jit(write)(params, context(read), noise_of(b))
    return np.asarray(condition.tokens)[:, np.asarray(condition.valid[0])]


def whole_condition(setup: Setup, **changes) -> float:
    return relative_l2(our_condition(setup, **changes), expected_condition(setup))


def position_mlp_error(*, real: bool) -> float:
    """The Position MLP alone, queries padded."""
    b = bench(real=real)
    x = draw(34, BATCH, QUERY_TOKENS, b.config.vlm.text.hidden_size)
    ours = b.model(VAEStream.FROZEN).position_mlp.apply(
        {"params": b.params["position_mlp"]}, x, grid=QUERY_GRID
    )
    count = math.prod(QUERY_GRID)
    with torch.no_grad():
        return relative_l2(ours[:, :count], b.learned["position_mlp"](to_torch(x[:, :count])))


def one_joint_pass(setup: Setup) -> float:
    """As initialised, expert = LLM: reading, then writing equals one pass of the LLM over [prompt | queries]."""
    b = setup.bench
    with torch.no_grad():
        prompt, next_position = joint_sequences(b, setup.request)
        queries = to_torch(noise_of(b))
        length, own = prompt.valid.shape[1], queries.shape[1]
        sees = np.zeros((BATCH, length + own, length + own), bool)
        sees[:, :length, :length] = prompt.causal()
        sees[:, length:, :length] = prompt.valid[:, None]
        sees[:, length:, length:] = True
        out = b.vlm.model.language_model(
            inputs_embeds=torch.cat([prompt.embeddings, queries], dim=1),
            attention_mask=cases_qwen_text.additive(sees[:, None]),
            position_ids=to_torch(np.concatenate([prompt.ids, query_ids(next_position)], axis=2)),
        ).last_hidden_state
        wanted = b.learned["position_mlp"](out[:, length:])
    fresh = b.model(setup.stream).init_bridge(jax.random.key(0), b.params["vlm"]["text"])
    ours = our_condition(setup, params={**b.params, "expert": fresh["expert"]})
    return relative_l2(ours, wanted)


SETUPS = {
    "text alone": Setup(0, VAEStream.FROZEN),
    **{
        f"{count} source{'s' * (count > 1)}, VAE in the {place}": Setup(count, stream)
        for stream, place in ((VAEStream.FROZEN, "LLM"), (VAEStream.EXPERT, "expert"))
        for count in (1, 2)
    },
}
IN_LLM, IN_EXPERT = Setup(2, VAEStream.FROZEN), Setup(2, VAEStream.EXPERT)


def cases() -> list[Case]:
    """Conditions, velocities and gradients of each setup; the two streams with the real widths."""
    rows = []
    for name, setup in SETUPS.items():
        for what, tolerance, measure in (
            ("condition", MODEL, condition_error),
            ("velocity", MODEL, velocity_error),
            ("gradient, worst leaf", GRADIENT, worst_gradient),
        ):
            row = f"bridge / {name}: {what}"
            # Compilations that the rows of two sources nearly repeat.
            slow = setup.sources == 1
            rows.append(Case(row, tolerance, functools.partial(measure, setup), slow=slow))
    rows += [
        Case("bridge / expert = LLM: one joint pass", MODEL, lambda: one_joint_pass(IN_LLM)),
        Case("bridge / Position MLP", BLOCK, lambda: position_mlp_error(real=False)),
        Case("bridge / Position MLP, real widths", BLOCK, lambda: position_mlp_error(real=True)),
    ]
    for setup, place in ((IN_LLM, "LLM"), (IN_EXPERT, "expert")):
        real = dataclasses.replace(setup, real=True)
        name = f"bridge / 2 sources, VAE in the {place}: condition, real widths"
        rows.append(Case(name, MODEL, functools.partial(whole_condition, real)))
    return rows


# -- sabotage


def _patched(setup: Setup, place: object, name: str, replacement: object) -> float:
    with mock.patch.object(place, name, replacement):
        return whole_condition(setup)


def _one_dimensional(start: jax.Array, grid: tuple[int, int]) -> jax.Array:
    ids = start[:, None] + jnp.arange(math.prod(grid))
    return jnp.broadcast_to(ids, (3, *ids.shape))


def _rows_for_columns(start: jax.Array, grid: tuple[int, int]) -> jax.Array:
    return _real_positions(start, grid)[jnp.array([0, 2, 1])]


_real_positions = modeling.query_position_ids


def _late(setup: Setup) -> float:
    return whole_condition(
        setup, prompt=lambda prompt, _: prompt.replace(next_position=prompt.next_position + 1)
    )


def _vae_late_in_llm() -> float:
    def shift(prompt, sources):
        is_vae = prompt.feature_index >= sources.place.shape[1]
        return prompt.replace(position_ids=prompt.position_ids + is_vae)

    return whole_condition(IN_LLM, prompt=shift)


def _vae_late_in_expert() -> float:
    return whole_condition(
        IN_EXPERT, context=lambda context: context.replace(vae_positions=context.vae_positions + 1)
    )


def _causal_expert() -> float:
    causal = types.SimpleNamespace(CAUSAL=Pattern.CAUSAL, FULL=Pattern.CAUSAL)
    return _patched(IN_LLM, modeling, "Pattern", causal)


def _vae_sees_queries() -> float:
    def attend(self, query, seen, mask):
        return attention(query, seen.key, seen.value, mask=mask)

    return _patched(IN_EXPERT, text.Attention, "_attend", attend)


def _crop_off_by_one() -> float:
    real = position_mlp.centre_crop
    return _patched(
        IN_LLM, position_mlp, "centre_crop", lambda table, grid: real(jnp.roll(table, 1, 1), grid)
    )


def _gate_and_up_swapped() -> float:
    params = bench().params
    mlp = params["position_mlp"]
    swapped = {**mlp, "gate_proj": mlp["up_proj"], "up_proj": mlp["gate_proj"]}
    return whole_condition(IN_LLM, params={**params, "position_mlp": swapped})


def _padding_seen() -> float:
    return whole_condition(
        IN_LLM, context=lambda context: context.replace(valid=jnp.ones_like(context.valid))
    )


def _vit_and_vae_exchanged() -> float:
    """Each picture's VAE tokens before its ViT tokens."""

    def exchange(prompt, sources):
        features = sources.place.shape[1]
        index = (prompt.feature_index + features) % (2 * features)
        return prompt.replace(feature_index=jnp.where(prompt.feature_index < 0, -1, index))

    return whole_condition(IN_LLM, prompt=exchange)


def sabotage() -> list[Sabotage]:
    """The bridge broken in one place each; the condition shows it."""
    text_alone = SETUPS["text alone"]
    rows: Sequence[tuple[str, Callable[[], float]]] = (
        (
            "queries with 1-D ids",
            lambda: _patched(IN_LLM, modeling, "query_position_ids", _one_dimensional),
        ),
        (
            "h and w of the query grid swapped",
            lambda: _patched(IN_LLM, modeling, "query_position_ids", _rows_for_columns),
        ),
        ("query ids one late, after pictures", lambda: _late(IN_LLM)),
        ("query ids one late, after text", lambda: _late(text_alone)),
        ("ids of VAE tokens one late, in the LLM", _vae_late_in_llm),
        ("ids of VAE tokens one late, in the expert", _vae_late_in_expert),
        ("VAE tokens before ViT tokens", _vit_and_vae_exchanged),
        ("causal expert", _causal_expert),
        ("VAE tokens see the queries", _vae_sees_queries),
        ("prompt's padding seen by the expert", _padding_seen),
        ("Position MLP's crop off by one", _crop_off_by_one),
        ("gate and up swapped", _gate_and_up_swapped),
    )
    return [Sabotage(f"bridge / {name}", MODEL, measure) for name, measure in rows]
