"""How programs that run stacks of layers are compiled."""

from collections.abc import Callable

import jax

from wemmu_jax.ops.axes import current_platform

# XLA on CPU multiplies bfloat16 in float32. It then moves the conversion of a scanned stack's weights out of the
# scan, which costs a float32 copy of the whole stack: 11 GB for 36 layers of the language model.
_KEEP_CONVERSIONS_IN_THE_LOOP = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


def jit_stack(function: Callable, **options) -> Callable:
    """`jax.jit` for a program with a scan over layers.

    Args:
      function: to be compiled for the default backend.
      **options: of `jax.jit`.
    """
    if jax.default_backend() == "cpu":
        options["compiler_options"] = _KEEP_CONVERSIONS_IN_THE_LOOP
    return jax.jit(function, **options)


@jax.custom_vjp
def gradient_in_memory(x: jax.Array) -> jax.Array:
    """`x`, whose gradient a TPU computes once and keeps for the product that is next in the backward pass.

    XLA would fuse what the gradient is made of into that product and compute it anew for each of the product's blocks:
    6% of the expert's time on a v5p, by XLA's estimate.
    """
    return x


def _backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
    if current_platform() == "tpu":
        gradient = jax.lax.optimization_barrier(gradient)
    return (gradient,)


gradient_in_memory.defvjp(lambda x: (x, None), _backward)
