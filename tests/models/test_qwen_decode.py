"""Properties of decoding, on a random model of two layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.qwen_fixtures import BATCH, CLOSE, MODEL, model_params, normal, picture_ids
from wemmu_jax.models.qwen2_5_vl.decode import Sampling, draw, generate
from wemmu_jax.models.qwen2_5_vl.text import Pattern


def _prompt():
    """Prompts of 9 and 6 tokens: embeddings, ids, valid, next position."""
    lengths = jnp.array([9, 6])
    return (
        0.3 * normal((BATCH, 9, 32), 20),
        picture_ids(9),
        jnp.arange(9) < lengths[:, None],
        lengths + 3,
    )


def _generate(*, eos_ids=(), sampling=Sampling(), seed=0, new=12):  # noqa: B008
    return generate(
        MODEL,
        model_params(),
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
        words = MODEL.apply({"params": model_params()}, tokens, method="embed")
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
    variables = {"params": model_params()}
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


@pytest.mark.parametrize(
    "raises, message",
    [
        (lambda: _generate(new=0), "max_new_tokens must be 1 or more, found 0"),
        (lambda: Sampling(temperature=-1), "temperature .* found -1"),
        (lambda: Sampling(top_k=0), "top_k .* found 0"),
        (lambda: Sampling(top_p=1.5), r"top_p .* found 1\.5"),
    ],
)
def test_wrong_arguments_are_named(raises, message):
    with pytest.raises(ValueError, match=message):
        raises()
