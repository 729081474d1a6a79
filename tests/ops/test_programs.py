"""A stack of bfloat16 layers needs no float32 copy of all its weights on a CPU; gradients in a TPU's memory."""

import functools

import jax
import jax.numpy as jnp
import pytest

from wemmu_jax.ops import programs
from wemmu_jax.ops.programs import compiler_options, gradient_in_memory, jit_stack

LAYERS, WIDTH = 24, 256
FLOAT32_COPY = LAYERS * WIDTH * WIDTH * 4


def run_stack(weights: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, weights)[0]


def temporaries(jit) -> int:
    weights = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((8, WIDTH), jnp.bfloat16)
    return jit(run_stack).lower(weights, x).compile().memory_analysis().temp_size_in_bytes


def test_the_weights_are_converted_layer_by_layer():
    assert temporaries(jit_stack) < FLOAT32_COPY / 4
    assert temporaries(jax.jit) >= FLOAT32_COPY, "plain jit does as well: jit_stack can go"


def test_the_numbers_are_those_of_plain_jit():
    keys = jax.random.split(jax.random.key(0))
    weights = jax.random.normal(keys[0], (LAYERS, WIDTH, WIDTH), jnp.bfloat16) / 16
    x = jax.random.normal(keys[1], (8, WIDTH), jnp.bfloat16)
    assert (jit_stack(run_stack)(weights, x) == jax.jit(run_stack)(weights, x)).all()


def test_options_are_for_the_kinds_they_were_tried_on():
    for kind in ("TPU v5", "TPU v6 lite", "TPU7x"):
        assert compiler_options(kind) == {"xla_tpu_scoped_vmem_limit_kib": "49152"}
    assert compiler_options("TPU v4") == compiler_options("NVIDIA H200") == {}


def test_on_a_cpu_a_convolution_is_a_call_of_its_own():
    """As in a `ResBlock`, which XLA's library would else take as a whole."""

    def block(x: jax.Array, kernel: jax.Array) -> jax.Array:
        dims = ("NHWC", "HWIO", "NHWC")
        convolve = functools.partial(
            jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME"
        )
        hidden = jax.nn.silu(convolve(x, kernel, dimension_numbers=dims))
        hidden = convolve(hidden, kernel, dimension_numbers=dims)
        return x + hidden * jax.lax.rsqrt(jnp.mean(hidden**2, axis=-1, keepdims=True))

    x, kernel = jnp.ones((1, 112, 112, 128)), jnp.ones((3, 3, 128, 128))

    def calls(options: dict[str, str]) -> int:
        return (
            jax.jit(block, compiler_options=options)
            .lower(x, kernel)
            .compile()
            .as_text()
            .count("kind=kCustom")
        )

    assert calls(compiler_options()) == 2
    assert calls({}) < 2, "XLA leaves them apart by itself: the option can go"


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_gradient_in_memory_is_the_same(platform, monkeypatch):
    monkeypatch.setattr(programs, "current_platform", lambda: platform)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(gradient_in_memory(x * x)))))
    x = jnp.linspace(0.1, 2.0, 7)
    assert jnp.allclose(gradient(x), 2 * x * jnp.cos(x * x), rtol=1e-6, atol=1e-6)
    assert ("optimization_barrier" in gradient.lower(x).as_text()) == (platform == "tpu")
