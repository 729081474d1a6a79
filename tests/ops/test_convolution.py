"""The depthwise convolution against XLA's grouped one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity.harness import relative_l2
from wemmu_jax.ops import convolution
from wemmu_jax.ops.convolution import DepthwiseConv, depthwise_conv


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("use_bias", [True, False])
def test_equals_the_grouped_convolution(size, use_bias):
    """Values and every gradient, with the very parameters of `nn.Conv`."""
    x, weight = draw(2, 6, 9, 4), draw(2, 6, 9, 4)
    grouped = nn.Conv(4, (size, size), padding="SAME", feature_group_count=4, use_bias=use_bias)
    ours = DepthwiseConv(size, use_bias)
    params = {"kernel": draw(size, size, 1, 4)} | ({"bias": draw(4)} if use_bias else {})
    assert jax.tree.map(jnp.shape, ours.init(jax.random.key(0), x)["params"]) == jax.tree.map(
        jnp.shape, params
    )

    def value_and_gradients(module):
        def loss(params, x):
            out = module.apply({"params": params}, x)
            return jnp.sum(weight * out), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)

    (_, out), gradients = value_and_gradients(ours)
    (_, expected), expected_gradients = value_and_gradients(grouped)
    assert relative_l2(out, expected) <= 1e-6
    for found, wanted in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        assert relative_l2(found, wanted) <= 1e-6


def test_bfloat16_is_rounded_once():
    """The sum is kept in float32: the result is the exact one, rounded."""
    x, kernel = draw(1, 5, 7, 3).astype(jnp.bfloat16), draw(5, 5, 1, 3).astype(jnp.bfloat16)
    found = depthwise_conv(x, kernel)
    exact = depthwise_conv(x.astype(jnp.float32), kernel.astype(jnp.float32))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("shape", [(3, 3, 1, 5), (3, 3, 2, 4), (2, 3, 1, 4), (3, 4, 1, 4)])
def test_a_kernel_that_does_not_fit(shape):
    with pytest.raises(ValueError, match=r"of 4 channels is \[odd, odd, 1, 4\], found \["):
        depthwise_conv(jnp.zeros((1, 6, 6, 4)), jnp.zeros(shape))


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_on_a_cpu_the_shifts_read_what_was_computed_once(platform, monkeypatch):
    monkeypatch.setattr(convolution, "current_platform", lambda: platform)
    x, kernel = draw(1, 40, 32, 8), draw(3, 3, 1, 8)
    text = jax.jit(lambda x: depthwise_conv(nn.silu(x), kernel)).lower(x).as_text()
    assert ("optimization_barrier" in text) == (platform == "cpu")


def test_on_a_tpu_the_gradient_is_in_memory_before_the_next_product(monkeypatch):
    monkeypatch.setattr(convolution, "current_platform", lambda: "tpu")
    x, kernel = draw(1, 40, 32, 8), draw(3, 3, 1, 8)
    gradient = jax.grad(lambda x: jnp.sum(depthwise_conv(x, kernel) ** 2))
    assert jax.jit(gradient).lower(x).as_text().count("optimization_barrier") == 1
