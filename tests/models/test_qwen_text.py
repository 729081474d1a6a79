"""Properties of the language model and of the decoder stack, on a random model of two layers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.ad_checkpoint import print_saved_residuals
from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

from tests.models.qwen_fixtures import (
    BATCH,
    CLOSE,
    CONFIG,
    MODEL,
    model_params,
    normal,
    picture_ids,
)
from wemmu_jax.models.qwen2_5_vl.config import qwen2_5_vl_3b
from wemmu_jax.models.qwen2_5_vl.text import (
    DecoderLayer,
    DecoderStack,
    KeyValues,
    Pattern,
    TextModel,
    visibility,
)
from wemmu_jax.ops.norms import RMSNorm
from wemmu_jax.ops.remat import remat
from wemmu_jax.ops.rotary import multimodal_angles

STACK = DecoderStack(CONFIG)
LENGTH = 11
SIZES = ("vocab", "hidden", "intermediate", "num_")  # how the names of the sizes begin


def _stack_params() -> dict:
    return {name: model_params()[name] for name in ("layers", "norm")}


@functools.partial(jax.jit, static_argnames=("pattern", "hidden_tail", "return_key_values"))
def _run(x, ids, valid, context=None, context_valid=None, **settings):
    settings |= {"valid": valid, "context": context, "context_valid": context_valid}
    return STACK.apply({"params": _stack_params()}, x, ids, **settings)


def _prefix(seed: int, length: int = 5) -> tuple[KeyValues, jax.Array]:
    shape = (CONFIG.num_hidden_layers, BATCH, length, 2, CONFIG.head_dim)
    valid = jnp.arange(length)[None] < jnp.array([[length], [length - 2]])
    return KeyValues(normal(shape, seed), normal(shape, seed + 1)), valid


def test_two_causal_calls_equal_one():
    x, ids, valid = (
        normal((BATCH, LENGTH, 32), 1),
        picture_ids(LENGTH),
        jnp.ones((BATCH, LENGTH), bool),
    )
    settings = {"pattern": Pattern.CAUSAL, "return_key_values": True}
    whole, all_keys = _run(x, ids, valid, **settings)
    first, context = _run(x[:, :7], ids[:, :, :7], valid[:, :7], **settings)
    second, own = _run(x[:, 7:], ids[:, :, 7:], valid[:, 7:], context, valid[:, :7], **settings)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, **CLOSE)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), context.followed_by(own), all_keys
    )


def test_settled_tokens_have_no_gradient_and_cost_none():
    """Of the others it is the same, because nothing of theirs comes before them; recomputed under remat or not."""
    context, context_valid = _prefix(2)
    x, count = normal((BATCH, LENGTH, 32), 3), 7
    weight = normal((BATCH, LENGTH, 32), 5)

    def program(settled: int):
        def loss(rest):
            joined = jnp.concatenate([x[:, :count], rest], axis=1)
            hidden, own = DecoderStack(CONFIG, remat="full").apply(
                {"params": _stack_params()},
                joined,
                picture_ids(LENGTH),
                valid=jnp.arange(LENGTH) < jnp.array([[LENGTH], [LENGTH - 2]]),
                context=context,
                context_valid=context_valid,
                pattern=Pattern.CAUSAL,
                settled=settled,
                return_key_values=True,
            )
            return jnp.sum(hidden * weight) + jnp.sum(own.key**2 * own.value)

        return jax.jit(jax.value_and_grad(loss)).lower(x[:, count:]).compile()

    plain, settled = program(0), program(count)
    for wanted, found in zip(plain(x[:, count:]), settled(x[:, count:]), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    flops = [one.cost_analysis()["flops"] for one in (plain, settled)]
    # Forward, recomputed and backward over 11 tokens; forward over 11, the others over 4.
    assert flops[1] / flops[0] < 0.7


@pytest.mark.parametrize("pattern", Pattern)
def test_padding_changes_nothing_and_a_batch_equals_its_rows(pattern):
    context, context_valid = _prefix(2)
    lengths = np.array([LENGTH, 6])
    x, ids = normal((BATCH, LENGTH, 32), 4), picture_ids(LENGTH)
    valid = jnp.asarray(np.arange(LENGTH)[None] < lengths[:, None])
    settings = {"pattern": pattern, "return_key_values": False}
    batch, _ = _run(x, ids, valid, context, context_valid, **settings)
    other = jnp.where(valid[..., None], x, 1e3)
    hidden = jax.tree.map(
        lambda leaf: jnp.where(context_valid[None, :, :, None, None], leaf, -1e3), context
    )
    noisy, _ = _run(other, ids, valid, hidden, context_valid, **settings)
    np.testing.assert_array_equal(noisy[valid], batch[valid])
    short = jax.tree.map(lambda leaf: leaf[:, 1:, :3], context)
    alone, _ = _run(
        x[1:, :6], ids[:, 1:, :6], valid[1:, :6], short, context_valid[1:, :3], **settings
    )
    np.testing.assert_allclose(alone[0], batch[1, :6], **CLOSE)


@functools.cache
def _influence(pattern: Pattern, hidden_tail: int) -> tuple[np.ndarray, np.ndarray]:
    """Which output token depends on which own token [T, T], and on which context token [T, S], by gradients."""
    context, context_valid = _prefix(6)
    valid = jnp.arange(LENGTH)[None] < jnp.array([[LENGTH], [LENGTH - 1]])
    probe = normal((BATCH, LENGTH, 32), 8)

    def outputs(x, context):
        settings = {"pattern": pattern, "hidden_tail": hidden_tail, "return_key_values": False}
        hidden, _ = _run(x, picture_ids(LENGTH), valid, context, context_valid, **settings)
        return jnp.sum(hidden * probe, axis=(0, 2))

    _, pull = jax.vjp(outputs, normal((BATCH, LENGTH, 32), 9), context)
    own, past = jax.vmap(pull)(jnp.eye(LENGTH))
    past = jax.tree.map(lambda leaf: np.abs(leaf).sum((1, 4, 5)), past)
    # Row 1 tells of padding: its last token and its last two context tokens are read by nobody.
    assert np.all(np.abs(own)[: LENGTH - 1, 1, LENGTH - 1] == 0)
    assert np.all(past.key[:, 1, 3:] == 0) and np.all(past.value[:, 1, 3:] == 0)
    return np.abs(own)[:, 0].sum(-1) > 0, (past.key[:, 0] > 0) & (past.value[:, 0] > 0)


@pytest.mark.parametrize("pattern", Pattern)
def test_who_sees_whom(pattern):
    own, past = _influence(pattern, 0)
    expected = np.tri(LENGTH, dtype=bool) if pattern is Pattern.CAUSAL else np.ones_like(own)
    np.testing.assert_array_equal(own, expected)
    assert past.all()


def test_hidden_tail_is_seen_by_itself_alone_and_sees_all():
    queries = 4
    own, past = _influence(Pattern.FULL, queries)
    expected = np.ones_like(own)
    expected[:-queries, -queries:] = False
    np.testing.assert_array_equal(own, expected)
    assert past.all()


def test_a_tail_of_all_tokens_is_no_tail():
    x, ids, valid = (
        normal((BATCH, LENGTH, 32), 1),
        picture_ids(LENGTH),
        jnp.ones((BATCH, LENGTH), bool),
    )
    settings = {"pattern": Pattern.FULL, "return_key_values": False}
    plain, _ = _run(x, ids, valid, **settings)
    tail, _ = _run(x, ids, valid, hidden_tail=LENGTH, **settings)
    np.testing.assert_array_equal(plain, tail)


def _loss(policy, params, x):
    context, context_valid = _prefix(10)
    hidden, own = DecoderStack(CONFIG, remat=policy).apply(
        {"params": params},
        x,
        picture_ids(LENGTH),
        valid=jnp.ones((BATCH, LENGTH), bool),
        context=context,
        context_valid=context_valid,
        pattern=Pattern.FULL,
        hidden_tail=3,
        return_key_values=True,
    )
    return jnp.sum(hidden * normal(hidden.shape, 12)) + jnp.sum(own.key**2 * own.value)


def test_remat_changes_neither_value_nor_gradient():
    x = normal((BATCH, LENGTH, 32), 11)
    value = {
        policy: jax.jit(jax.value_and_grad(functools.partial(_loss, policy), argnums=(0, 1)))(
            _stack_params(), x
        )
        for policy in ("none", "full", "dots", "named", "without_up", "offload")
    }
    for leaf in jax.tree.leaves(value["none"][1]):
        assert np.abs(leaf).max() > 0
    for policy in value:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
            value[policy],
            value["none"],
        )


def test_remat_saves_what_its_name_says(capsys):
    counts, hidden, host = {}, {}, {}
    for policy in ("none", "full", "dots", "named", "without_up", "offload"):
        print_saved_residuals(
            functools.partial(_loss, policy), _stack_params(), normal((BATCH, LENGTH, 32), 11)
        )
        said = capsys.readouterr().out
        counts[policy] = said.count(f"f32[2,{BATCH},{LENGTH},")
        hidden[policy] = said.count(f"f32[2,{BATCH},{LENGTH},48]")  # of the MLP
        host[policy] = said.count("f32<host>[2,")
    assert counts["offload"] < counts["full"] < counts["named"] < counts["none"], counts
    assert counts["full"] < counts["dots"] < counts["none"], counts
    assert counts["without_up"] == counts["named"] - 1
    assert hidden["named"] == 2 and hidden["without_up"] == 1  # gate and up; gate
    assert hidden["full"] == hidden["offload"] == 0
    # The layer's input, and what the two calls of attention returned.
    assert host.pop("offload") == 3 and not any(host.values()), host


def test_the_scan_equals_a_loop_over_its_layers():
    x, ids, valid = (
        normal((BATCH, LENGTH, 32), 1),
        picture_ids(LENGTH),
        jnp.ones((BATCH, LENGTH), bool),
    )
    context, context_valid = _prefix(13)
    settings = {"pattern": Pattern.CAUSAL, "return_key_values": True}
    hidden, keys = _run(x, ids, valid, context, context_valid, **settings)
    angles = multimodal_angles(ids, head_width=8, sections=CONFIG.mrope_section, theta=1e4)
    mask = visibility(valid, context_valid, Pattern.CAUSAL)
    for i in range(CONFIG.num_hidden_layers):
        layer, past, wanted = jax.tree.map(
            lambda leaf, i=i: leaf[i], (_stack_params()["layers"], context, keys)
        )
        x, own = jax.jit(DecoderLayer(CONFIG).apply)({"params": layer}, x, past, angles, mask)
        np.testing.assert_allclose(own.key, wanted.key, **CLOSE)
        np.testing.assert_allclose(own.value, wanted.value, **CLOSE)
    norm = RMSNorm(CONFIG.rms_norm_eps).apply({"params": _stack_params()["norm"]}, x)
    np.testing.assert_allclose(norm, hidden, **CLOSE)


def test_bfloat16_stays_near_float32_and_types_are_as_promised():
    model = TextModel(CONFIG, dtype=jnp.bfloat16)
    ids, valid = picture_ids(LENGTH), jnp.ones((BATCH, LENGTH), bool)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, (BATCH, LENGTH)), jnp.int32)
    variables = {"params": model_params()}
    exact, rounded = (
        jax.jit(functools.partial(m.apply, method="score"))(variables, tokens, ids, valid=valid)
        for m in (MODEL, model)
    )
    assert rounded.dtype == jnp.float32
    assert np.linalg.norm(rounded - exact) < 0.05 * np.linalg.norm(exact)
    hidden, own = jax.eval_shape(
        functools.partial(model.apply, pattern=Pattern.CAUSAL, return_key_values=True),
        variables,
        normal((BATCH, LENGTH, 32), 1),
        ids,
        valid=valid,
    )
    assert {leaf.dtype for leaf in (hidden, own.key, own.value)} == {jnp.dtype(jnp.bfloat16)}


def test_parameter_counts_of_the_3b_model_are_those_of_the_reference():
    config = qwen2_5_vl_3b().text
    ids, valid = jnp.zeros((3, 1, 4), jnp.int32), jnp.ones((1, 4), bool)
    init = functools.partial(TextModel(config).init, valid=valid, method="score")
    ours = jax.eval_shape(init, jax.random.key(0), ids[0], ids)["params"]
    fields = dataclasses.asdict(config)
    sizes = {name: value for name, value in fields.items() if name.startswith(SIZES)}
    with torch.device("meta"):
        theirs = Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**sizes))
    counts = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in ours.items()}
    wanted = {
        name: sum(p.numel() for p in part.parameters()) for name, part in theirs.named_children()
    }
    assert counts == {name: wanted[name] for name in ("embed_tokens", "layers", "norm")}
    assert f"{(counts['layers'] + counts['norm']) / 1e9:.3f}" == "2.775"


def _call(**changes):
    context, context_valid = _prefix(2)
    arguments = {
        "x": jnp.zeros((BATCH, LENGTH, 32)),
        "position_ids": picture_ids(LENGTH),
        "valid": jnp.ones((BATCH, LENGTH), bool),
        "context": context,
        "context_valid": context_valid,
        "pattern": Pattern.FULL,
        "return_key_values": False,
    }
    return STACK.apply({"params": _stack_params()}, **{**arguments, **changes})


@pytest.mark.parametrize(
    "raises, message",
    [
        (lambda: _call(position_ids=picture_ids(LENGTH)[0]), r"position ids \(3, 2, 11\)"),
        (lambda: _call(valid=jnp.ones((BATCH, 4), bool)), r"found .* and \(2, 4\)"),
        (lambda: _call(context_valid=None), "together or not at all"),
        (lambda: _call(context_valid=jnp.ones((BATCH, 9), bool)), r"\(2, 2, 9, 2, 8\)"),
        (lambda: _call(hidden_tail=LENGTH + 1), "hidden_tail must be 0 to 11"),
        (lambda: _call(hidden_tail=2, pattern=Pattern.CAUSAL), "hidden_tail is for Pattern.FULL"),
        (
            lambda: _call(settled=LENGTH, pattern=Pattern.CAUSAL),
            "settled must be 0 to 10, found 11",
        ),
        (lambda: _call(settled=2), "settled is for Pattern.CAUSAL"),
        (
            lambda: remat(DecoderStack, "everything"),
            "'everything'; the known ones are none, unrolled, full",
        ),
    ],
)
def test_wrong_arguments_are_named(raises, message):
    with pytest.raises(ValueError, match=message):
        raises()
