"""Properties of the language model, of the decoder stack and of decoding, on a random model of two layers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.ad_checkpoint import print_saved_residuals
from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

from wemmu_jax.conversion.memory import flatten, nest
from wemmu_jax.models.qwen2_5_vl.config import TextConfig, qwen2_5_vl_3b
from wemmu_jax.models.qwen2_5_vl.decode import Sampling, draw, generate
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

CONFIG = TextConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    mrope_section=(1, 1, 2),
    tie_word_embeddings=True,
)
MODEL, STACK = TextModel(CONFIG), DecoderStack(CONFIG)
BATCH, LENGTH = 2, 11
SIZES = ("vocab", "hidden", "intermediate", "num_")  # how the names of the sizes begin
CLOSE = {"rtol": 0, "atol": 2e-5}


def _draw(shape, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _params(model: TextModel, seed: int = 0) -> dict:
    """Random parameters, none of them constant; a matrix keeps the size of its input."""
    ids, valid = jnp.zeros((3, 1, 4), jnp.int32), jnp.ones((1, 4), bool)
    init = functools.partial(model.init, valid=valid, method="score")
    shapes = jax.eval_shape(init, jax.random.key(0), ids[0], ids)["params"]
    generator, leaves = np.random.default_rng(seed), {}
    for path, leaf in flatten(shapes).items():
        noise = generator.standard_normal(leaf.shape).astype(np.float32)
        if path.endswith("scale"):
            leaves[path] = 1 + 0.2 * noise
        else:
            size = leaf.shape[-2] ** -0.5 if path.endswith("kernel") else 0.3
            leaves[path] = np.float32(size) * noise
    return nest(leaves)


@functools.cache
def _model_params() -> dict:
    return _params(MODEL)


def _stack_params() -> dict:
    return {name: _model_params()[name] for name in ("layers", "norm")}


def _ids(length: int) -> jax.Array:
    """Ids whose three axes differ, as in a picture: int32[3, BATCH, length]."""
    place = np.arange(length)
    ids = np.stack([place, place // 3, place % 5]).astype(np.int32)
    return jnp.asarray(np.tile(ids[:, None], (1, BATCH, 1)))


@functools.partial(jax.jit, static_argnames=("pattern", "hidden_tail", "return_key_values"))
def _run(x, ids, valid, context=None, context_valid=None, **settings):
    settings |= {"valid": valid, "context": context, "context_valid": context_valid}
    return STACK.apply({"params": _stack_params()}, x, ids, **settings)


def _prefix(seed: int, length: int = 5) -> tuple[KeyValues, jax.Array]:
    shape = (CONFIG.num_hidden_layers, BATCH, length, 2, CONFIG.head_dim)
    valid = jnp.arange(length)[None] < jnp.array([[length], [length - 2]])
    return KeyValues(_draw(shape, seed), _draw(shape, seed + 1)), valid


def test_two_causal_calls_equal_one():
    x, ids, valid = _draw((BATCH, LENGTH, 32), 1), _ids(LENGTH), jnp.ones((BATCH, LENGTH), bool)
    settings = {"pattern": Pattern.CAUSAL, "return_key_values": True}
    whole, all_keys = _run(x, ids, valid, **settings)
    first, context = _run(x[:, :7], ids[:, :, :7], valid[:, :7], **settings)
    second, own = _run(x[:, 7:], ids[:, :, 7:], valid[:, 7:], context, valid[:, :7], **settings)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, **CLOSE)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), context.followed_by(own), all_keys
    )


@pytest.mark.parametrize("pattern", Pattern)
def test_padding_changes_nothing_and_a_batch_equals_its_rows(pattern):
    context, context_valid = _prefix(2)
    lengths = np.array([LENGTH, 6])
    x, ids = _draw((BATCH, LENGTH, 32), 4), _ids(LENGTH)
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
    probe = _draw((BATCH, LENGTH, 32), 8)

    def outputs(x, context):
        settings = {"pattern": pattern, "hidden_tail": hidden_tail, "return_key_values": False}
        hidden, _ = _run(x, _ids(LENGTH), valid, context, context_valid, **settings)
        return jnp.sum(hidden * probe, axis=(0, 2))

    _, pull = jax.vjp(outputs, _draw((BATCH, LENGTH, 32), 9), context)
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
    x, ids, valid = _draw((BATCH, LENGTH, 32), 1), _ids(LENGTH), jnp.ones((BATCH, LENGTH), bool)
    settings = {"pattern": Pattern.FULL, "return_key_values": False}
    plain, _ = _run(x, ids, valid, **settings)
    tail, _ = _run(x, ids, valid, hidden_tail=LENGTH, **settings)
    np.testing.assert_array_equal(plain, tail)


def _loss(policy, params, x):
    context, context_valid = _prefix(10)
    hidden, own = DecoderStack(CONFIG, remat=policy).apply(
        {"params": params},
        x,
        _ids(LENGTH),
        valid=jnp.ones((BATCH, LENGTH), bool),
        context=context,
        context_valid=context_valid,
        pattern=Pattern.FULL,
        hidden_tail=3,
        return_key_values=True,
    )
    return jnp.sum(hidden * _draw(hidden.shape, 12)) + jnp.sum(own.key**2 * own.value)


def test_remat_changes_neither_value_nor_gradient():
    x = _draw((BATCH, LENGTH, 32), 11)
    value = {
        policy: jax.jit(jax.value_and_grad(functools.partial(_loss, policy), argnums=(0, 1)))(
            _stack_params(), x
        )
        for policy in ("none", "full", "dots", "named", "offload")
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
    for policy in ("none", "full", "dots", "named", "offload"):
        print_saved_residuals(
            functools.partial(_loss, policy), _stack_params(), _draw((BATCH, LENGTH, 32), 11)
        )
        said = capsys.readouterr().out
        counts[policy] = said.count(f"f32[2,{BATCH},{LENGTH},")
        hidden[policy] = said.count(f"f32[2,{BATCH},{LENGTH},48]")  # of the MLP
        host[policy] = said.count("f32<host>[2,")
    assert counts["offload"] < counts["full"] < counts["named"] < counts["none"], counts
    assert counts["full"] < counts["dots"] < counts["none"], counts
    assert hidden["named"] == 2 and hidden["full"] == hidden["offload"] == 0  # gate and up
    # The layer's input, and what the two calls of attention returned.
    assert host == {"none": 0, "full": 0, "dots": 0, "named": 0, "offload": 3}


def test_the_scan_equals_a_loop_over_its_layers():
    x, ids, valid = _draw((BATCH, LENGTH, 32), 1), _ids(LENGTH), jnp.ones((BATCH, LENGTH), bool)
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
    ids, valid = _ids(LENGTH), jnp.ones((BATCH, LENGTH), bool)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, (BATCH, LENGTH)), jnp.int32)
    variables = {"params": _model_params()}
    exact, rounded = (
        jax.jit(functools.partial(m.apply, method="score"))(variables, tokens, ids, valid=valid)
        for m in (MODEL, model)
    )
    assert rounded.dtype == jnp.float32
    assert np.linalg.norm(rounded - exact) < 0.05 * np.linalg.norm(exact)
    hidden, own = jax.eval_shape(
        functools.partial(model.apply, pattern=Pattern.CAUSAL, return_key_values=True),
        variables,
        _draw((BATCH, LENGTH, 32), 1),
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


def _prompt():
    """Prompts of 9 and 6 tokens: embeddings, ids, valid, next position."""
    lengths = jnp.array([9, 6])
    return 0.3 * _draw((BATCH, 9, 32), 20), _ids(9), jnp.arange(9) < lengths[:, None], lengths + 3


def _generate(*, eos_ids=(), sampling=Sampling(), seed=0, new=12):  # noqa: B008
    return generate(
        MODEL,
        _model_params(),
        *_prompt(),
        max_new_tokens=new,
        eos_ids=eos_ids,
        sampling=sampling,
        key=jax.random.key(seed),
        return_logits=True,
    )


def test_greedy_decoding_equals_one_long_prefill():
    embeds, ids, _, position = _prompt()
    decoded = _generate()
    assert np.all(decoded.lengths == 12)
    for row, length in enumerate((9, 6)):
        tokens = decoded.tokens[row : row + 1]
        words = MODEL.apply({"params": _model_params()}, tokens, method="embed")
        new = jnp.broadcast_to(position[row] + jnp.arange(12), (3, 1, 12))
        logits, _ = _long_prefill(
            jnp.concatenate([embeds[row : row + 1, :length], words], axis=1),
            jnp.concatenate([ids[:, row : row + 1, :length], new], axis=2),
        )
        steps = logits[0, length - 1 : -1]
        np.testing.assert_allclose(decoded.logits[row], steps, **CLOSE)
        np.testing.assert_array_equal(tokens[0], jnp.argmax(steps, axis=-1))


@jax.jit
def _long_prefill(embeds, ids):
    variables = {"params": _model_params()}
    hidden, own = MODEL.apply(
        variables,
        embeds,
        ids,
        valid=jnp.ones(embeds.shape[:2], bool),
        pattern=Pattern.CAUSAL,
        return_key_values=True,
    )
    return MODEL.apply(variables, hidden, method="logits"), own


def test_end_tokens_stop_a_row_and_all_rows_stop_the_loop():
    free = np.asarray(_generate().tokens)
    place = next(t for t in range(2, 10) if free[0, t] not in free[0, :t])
    end = int(free[0, place])
    decoded = _generate(eos_ids=(96, end))
    assert decoded.lengths[0] == place
    np.testing.assert_array_equal(decoded.tokens[0, :place], free[0, :place])
    assert np.all(decoded.tokens[0, place:] == 96)
    stop = np.flatnonzero(np.isin(free[1], (96, end)))
    length = stop[0] if len(stop) else 12
    assert decoded.lengths[1] == length
    np.testing.assert_array_equal(decoded.tokens[1, :length], free[1, :length])
    first = tuple(int(token) for token in free[:, 0])
    stopped = _generate(eos_ids=first)
    assert np.all(stopped.lengths == 0) and np.all(stopped.tokens == first[0])
    assert np.all(stopped.logits[:, 1:] == 0), "the loop went on after every row had ended"


def test_sampling_follows_its_key():
    sampling = Sampling(temperature=1.5, top_k=40, top_p=0.95)
    one, same = (_generate(sampling=sampling, seed=3).tokens for _ in range(2))
    other = _generate(sampling=sampling, seed=4).tokens
    np.testing.assert_array_equal(one, same)
    assert np.any(one != other)


def test_draws_have_the_probabilities_asked_for():
    logits = jnp.log(jnp.array([0.1, 0.4, 0.3, 0.15, 0.05]))
    keys, rows = jax.random.split(jax.random.key(0), 20_000), jnp.tile(logits, (20_000, 1))
    for sampling, wanted in (
        (Sampling(temperature=1.0), [0.1, 0.4, 0.3, 0.15, 0.05]),
        (Sampling(temperature=0.5), np.square([0.1, 0.4, 0.3, 0.15, 0.05]) / 0.285),
        (Sampling(temperature=1.0, top_k=2), [0, 4 / 7, 3 / 7, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.69), [0, 4 / 7, 3 / 7, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.71), [0, 0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0]),
        (Sampling(temperature=1.0, top_k=1), [0, 1, 0, 0, 0]),
        (Sampling(), [0, 1, 0, 0, 0]),
    ):
        found = np.bincount(draw(rows, sampling, keys), minlength=5) / 20_000
        np.testing.assert_allclose(found, wanted, atol=0.015)
        assert np.all(found[np.array(wanted) == 0] == 0)


def _call(**changes):
    context, context_valid = _prefix(2)
    arguments = {
        "x": jnp.zeros((BATCH, LENGTH, 32)),
        "position_ids": _ids(LENGTH),
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
        (lambda: _call(position_ids=_ids(LENGTH)[0]), r"position ids \(3, 2, 11\)"),
        (lambda: _call(valid=jnp.ones((BATCH, 4), bool)), r"found .* and \(2, 4\)"),
        (lambda: _call(context_valid=None), "together or not at all"),
        (lambda: _call(context_valid=jnp.ones((BATCH, 9), bool)), r"\(2, 2, 9, 2, 8\)"),
        (lambda: _call(hidden_tail=LENGTH + 1), "hidden_tail must be 0 to 11"),
        (lambda: _call(hidden_tail=2, pattern=Pattern.CAUSAL), "hidden_tail is for Pattern.FULL"),
        (lambda: remat(DecoderStack, "everything"), "'everything'; the known ones are none, full"),
        (lambda: _generate(new=0), "max_new_tokens must be 1 or more, found 0"),
        (lambda: Sampling(temperature=-1), "temperature .* found -1"),
        (lambda: Sampling(top_k=0), "top_k .* found 0"),
        (lambda: Sampling(top_p=1.5), r"top_p .* found 1\.5"),
    ],
)
def test_wrong_arguments_are_named(raises, message):
    with pytest.raises(ValueError, match=message):
        raises()
