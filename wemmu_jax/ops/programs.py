"""How programs are compiled."""

import contextlib
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from wemmu_jax.ops.axes import current_platform

# XLA on CPU multiplies bfloat16 in float32. It then moves the conversion of a scanned stack's weights out of the
# scan, which costs a float32 copy of the whole stack: 11 GB for 36 layers of the language model.
_KEEP_CONVERSIONS_IN_THE_LOOP = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}

# XLA on CPU hands products and convolutions to a library, and by default all between them too: whole stages of the
# DC-AE in one call. Its convolutions then run at four fifths of the speed that they reach in calls of their own.
_CALLS_OF_THEIR_OWN = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,"
    "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
}

# KiB of a TPU's vector memory that an operation may take, where it was tried. XLA's own choice, 16 MiB on a v5p and 32
# on a v6e and a TPU7x, cuts products into small blocks and fetches operands anew for each: 12% of the language model's
# time on a v5p and on a TPU7x, 16% of the ViT's on a v6e and 7% of it on a v5e, by XLA's estimate. Beyond 48 little is
# left for what is fetched ahead.
_VECTOR_MEMORY = dict.fromkeys(("TPU v5", "TPU v5 lite", "TPU v6 lite", "TPU7x"), 48 * 1024)


def compiler_options(device_kind: str | None = None) -> dict[str, str]:
    """Of every large program for devices of this kind, by default the backend's; what runs and what is planned is
    compiled with the same."""
    kind = device_kind or jax.devices()[0].device_kind
    if kind == "cpu":
        return dict(_CALLS_OF_THEIR_OWN)
    memory = _VECTOR_MEMORY.get(kind)
    return {"xla_tpu_scoped_vmem_limit_kib": str(memory)} if memory else {}


def jit(function: Callable, **options) -> Callable:
    """`jax.jit` with `compiler_options()`.

    Args:
      function: to be compiled for the default backend.
      **options: of `jax.jit`.
    """
    return jax.jit(function, compiler_options=compiler_options(), **options)


def jit_stack(function: Callable, **options) -> Callable:
    """`jit` for a program with a scan over frozen layers, which are converted one by one."""
    chosen = compiler_options()
    if jax.default_backend() == "cpu":
        chosen |= _KEEP_CONVERSIONS_IN_THE_LOOP
    return jax.jit(function, compiler_options=chosen, **options)


def in_full(function: Callable) -> Callable:
    """Products of a model in float32 are float32's, in the backward pass too: a TPU would round their operands to
    bfloat16, a GPU to TF32.

    Args:
      function: to be traced; its first argument is the model, or whatever has the `dtype` of its products.
    """

    @functools.wraps(function)
    def traced(model, *arguments, **options):
        full = jnp.dtype(model.dtype) == jnp.float32
        with jax.default_matmul_precision("highest") if full else contextlib.nullcontext():
            return function(model, *arguments, **options)

    return traced


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
