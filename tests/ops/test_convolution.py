"""Depthwise convolutions against XLA's grouped one; that of a doubled picture against one of the picture, doubled."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity.harness import relative_l2
from wemmu_jax.ops import convolution, depthwise_kernel
from wemmu_jax.ops.convolution import DepthwiseConv, depthwise_conv, doubled_conv
from wemmu_jax.sharding.mesh import make_mesh


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


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_on_a_cpu_the_shifts_read_what_was_computed_once(platform, monkeypatch):
    monkeypatch.setattr(convolution, "current_platform", lambda: platform)
    x, kernel = draw(1, 40, 32, 8), draw(3, 3, 1, 8)
    text = jax.jit(lambda x: depthwise_conv(nn.silu(x), kernel)).lower(x).as_text()
    assert ("optimization_barrier" in text) == (platform == "cpu")


def value_and_gradients(convolve, x, kernel, bias):
    weight = jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    def loss(x, kernel, bias):
        out = convolve(x, kernel, bias)
        return jnp.sum(weight * out), out

    (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(x, kernel, bias)
    return out, *gradients


def by_kernel(x, kernel, bias):
    return convolution._by_kernel(x, kernel[:, :, 0], bias, True)


SHAPES = ((2, 6, 9, 40), (3, 5, 7, 130), (1, 2, 15, 1100), (2, 1, 3, 128), (1, 16, 8, 256))


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_for_tpus_gives_the_same(shape, size):
    """Pictures with fewer rows and columns than the filter, widths that fill no vector, several blocks of channels."""
    inputs = draw(*shape), draw(size, size, 1, shape[-1]), draw(shape[-1])
    found = value_and_gradients(by_kernel, *inputs)
    for one, wanted in zip(found, value_and_gradients(depthwise_conv, *inputs), strict=True):
        assert relative_l2(one, wanted) <= 1e-6


def test_the_kernel_rounds_bfloat16_once():
    x, kernel = draw(1, 5, 7, 3).astype(jnp.bfloat16), draw(3, 3, 1, 3).astype(jnp.bfloat16)
    bias = draw(3).astype(jnp.bfloat16)
    found = by_kernel(x, kernel, bias)
    exact = depthwise_conv(*(one.astype(jnp.float32) for one in (x, kernel, bias)))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("rows", [8, 3])
def test_each_device_convolves_its_own_rows(rows):
    """Rows that the mesh does not divide are convolved by all."""
    inputs = draw(rows, 6, 9, 40), draw(3, 3, 1, 40), draw(40)
    wanted = value_and_gradients(depthwise_conv, *inputs)
    with jax.set_mesh(make_mesh(data=2, fsdp=4, sequence=1, tensor=1)):
        found = jax.jit(functools.partial(value_and_gradients, by_kernel))(*inputs)
    for one, expected in zip(found, wanted, strict=True):
        assert relative_l2(one, expected) <= 1e-6


def lowered_for_a_tpu(mesh, *shape: int) -> str:
    x, kernel = (jax.ShapeDtypeStruct(one, jnp.bfloat16) for one in (shape, (3, 3, 1, shape[-1])))
    gradient = jax.grad(lambda x, kernel: jnp.sum(depthwise_conv(x, kernel).astype(jnp.float32)))
    with jax.set_mesh(mesh):
        return jax.jit(gradient).trace(x, kernel).lower(lowering_platforms=("tpu",)).as_text()


def test_a_tpu_takes_the_kernel_for_whole_pictures_that_fit(monkeypatch):
    monkeypatch.setattr(convolution, "current_platform", lambda: "tpu")
    whole = make_mesh(data=2, fsdp=4, sequence=1, tensor=1)
    for shape in ((8, 12, 21, 11200), (8, 128, 128, 256)):
        assert lowered_for_a_tpu(whole, *shape).count("tpu_custom_call") == 1
    for mesh, shape in (
        (make_mesh(data=1, fsdp=2, sequence=2, tensor=2), (8, 12, 21, 11200)),
        (whole, (8, 256, 256, 128)),
    ):
        assert "tpu_custom_call" not in lowered_for_a_tpu(mesh, *shape)
    # Of more working memory than a v4 has.
    monkeypatch.setattr(depthwise_kernel, "current_device_kind", lambda: "TPU v4")
    assert "tpu_custom_call" in lowered_for_a_tpu(whole, 8, 12, 21, 11200)
    assert "tpu_custom_call" not in lowered_for_a_tpu(whole, 8, 128, 128, 256)


def of_a_doubled_picture(x: jax.Array, kernel: jax.Array) -> jax.Array:
    nearest = x.repeat(2, axis=1).repeat(2, axis=2)
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(nearest, kernel, (1, 1), "SAME", dimension_numbers=dims)


def test_a_doubled_picture_is_convolved_without_being_made():
    """Values, borders among them, and both gradients, in fewer products."""
    x, kernel, weight = draw(2, 3, 5, 4), draw(3, 3, 4, 6), draw(2, 6, 10, 6)

    def graded(convolve):
        def loss(x, kernel):
            out = convolve(x, kernel)
            return jnp.sum(weight * out), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    (_, out), gradients = graded(doubled_conv)(x, kernel)
    (_, expected), expected_gradients = graded(of_a_doubled_picture)(x, kernel)
    for found, wanted in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        assert found.shape == wanted.shape
        assert relative_l2(found, wanted) <= 1e-6
    costs = [
        jax.jit(convolve).lower(draw(1, 32, 32, 64), draw(3, 3, 64, 64)).cost_analysis()["flops"]
        for convolve in (doubled_conv, of_a_doubled_picture)
    ]
    assert costs[0] <= 0.46 * costs[1]


def test_weights_are_added_before_they_are_rounded():
    x, kernel = draw(1, 3, 4, 8).astype(jnp.bfloat16), draw(3, 3, 8, 8)
    found = doubled_conv(x, kernel)
    rough = doubled_conv(x, kernel.astype(jnp.bfloat16))
    exact = of_a_doubled_picture(x.astype(jnp.float32), kernel)
    assert found.dtype == jnp.bfloat16
    assert relative_l2(found, exact) < relative_l2(rough, exact) < 1e-2


@pytest.mark.parametrize("shape", [(3, 3, 5, 4), (2, 3, 4, 4), (3, 5, 4, 4)])
def test_a_kernel_that_does_not_fit_a_doubled_picture(shape):
    with pytest.raises(ValueError, match=r"over 4 channels is \[3, 3, 4, F\], found \["):
        doubled_conv(jnp.zeros((1, 6, 6, 4)), jnp.zeros(shape))
