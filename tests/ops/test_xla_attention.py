"""Attention in turns, the form for CPUs, against `jax.nn.dot_product_attention`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity.harness import relative_l2
from wemmu_jax.ops import xla_attention as module
from wemmu_jax.ops.xla_attention import xla_attention

BATCH, TOKENS, KEYS, HEADS, KEY_HEADS, WIDTH = 2, 5, 7, 6, 3, 8
MASKS = {
    "none": None,
    "keys": (BATCH, 1, 1, KEYS),
    "pairs": (BATCH, 1, TOKENS, KEYS),
    "one for all": (1, 1, TOKENS, KEYS),
    "heads": (BATCH, HEADS, TOKENS, KEYS),
    "not of keys": (BATCH, 1, TOKENS, 1),
}


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def given(dtype=jnp.float32) -> list[jax.Array]:
    own, other = (BATCH, TOKENS, HEADS, WIDTH), (BATCH, KEYS, KEY_HEADS, WIDTH)
    return [draw(*shape, seed=i).astype(dtype) for i, shape in enumerate((own, other, other))]


def mask_of(name: str) -> jax.Array | None:
    if MASKS[name] is None:
        return None
    mask = draw(*MASKS[name], seed=9) > 0
    return mask if name == "not of keys" else mask.at[..., 0].set(True)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("scores", [1, 2 * 2 * TOKENS * KEYS, 2**20])
def test_values_and_gradients(name, scores, monkeypatch):
    """With one key head a turn, with two, which do not divide the six of the batch evenly, and with all."""
    monkeypatch.setattr(module, "_SCORES", scores)
    mask, weight = mask_of(name), draw(BATCH, TOKENS, HEADS, WIDTH, seed=5)

    def found(function):
        def loss(arrays):
            out = function(*arrays, mask=mask)
            return jnp.sum(weight * out), out

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(given())

    (_, out), gradients = found(xla_attention)
    (_, expected), wanted = found(jax.nn.dot_product_attention)
    assert relative_l2(out, expected) <= 1e-6
    for mine, reference in zip(gradients, wanted, strict=True):
        assert relative_l2(mine, reference) <= 5e-6


def test_bfloat16_stays():
    out = xla_attention(*given(jnp.bfloat16))
    expected = jax.nn.dot_product_attention(*given())
    assert out.dtype == jnp.bfloat16 and relative_l2(out, expected) <= 1e-2


def test_a_query_that_sees_nothing_gets_finite_values():
    arrays, mask = given(), jnp.ones((BATCH, 1, TOKENS, KEYS), bool).at[:, :, 2].set(False)
    out, gradients = jax.value_and_grad(
        lambda arrays: jnp.sum(xla_attention(*arrays, mask=mask)[:, 2])
    )(arrays)
    assert jnp.isfinite(out) and all(jnp.isfinite(leaf).all() for leaf in gradients)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "gpu"])
def test_only_programs_for_a_cpu_loop(platform, monkeypatch):
    """By the platform that a program is for: `wemmu plan` lowers for TPUs on machines that have none."""
    monkeypatch.setattr(module, "_SCORES", 1)
    monkeypatch.setattr(module, "current_platform", lambda: platform)
    text = jax.jit(jax.grad(lambda a: jnp.sum(xla_attention(*a)))).lower(given()).as_text()
    assert ("stablehlo.while" in text) == (platform == "cpu")


def test_a_single_query_does_not_loop(monkeypatch):
    monkeypatch.setattr(module, "_SCORES", 1)
    query, key, value = given()
    text = jax.jit(xla_attention).lower(query[:, :1], key, value).as_text()
    assert "stablehlo.while" not in text
