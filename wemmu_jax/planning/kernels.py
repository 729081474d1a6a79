"""FLOPs and vector work of Pallas calls, of which XLA knows nothing."""

import re

from wemmu_jax.planning.program import Operation

# Name of a kernel -> products of [T, H] x [H, S] that it makes for each head; the first that matches counts.
_ATTENTION = (
    # All gradients in one kernel, as `ops.splash` asks for it: scores, their gradient, and one for each of q, k, v. Its
    # name is the same where a kernel for dq stands beside it, and that for dkv makes one product less.
    (r"(mha|mqa|flash|attention).*dkv", 5),
    (r"(mha|mqa|flash|attention).*dq", 3),
    (r"mha|mqa|flash|attention", 2),  # forward: scores, values
)


def kernel_flops(kernel: Operation) -> int:
    """What the call says itself, or of an attention kernel the formula for its operands: queries [..., T, H] and keys
    [..., S, H] come first among the real ones, and no block is taken to be skipped. 0 if neither is known."""
    if kernel.flops:
        return kernel.flops
    for pattern, products in _ATTENTION:
        if re.search(pattern, kernel.name):
            real = [one for one in kernel.operands if re.match("b?f", one.dtype)]
            if len(real) >= 2 and min(len(one.dims) for one in real[:2]) >= 2:
                return 2 * products * real[0].size * real[1].dims[-2]
    return 0


# Bundles of instructions for each vector of float32 sums and each place of a filter, counted in libtpu's schedule of
# `ops.depthwise_kernel` for a v5p (3 x 3, 16 x 16 x 11200: 2680 for a block of 256 x 1024 sums).
_BUNDLES, _VECTOR = 1.16, 8 * 128


def kernel_cycles(kernel: Operation) -> float:
    """Of a kernel whose work is in the chip's vectors and not in its matrix units; 0 for others."""
    if not kernel.name.startswith("depthwise"):
        return 0.0
    x, filters = kernel.operands[:2]
    return _BUNDLES * x.size / _VECTOR * filters.size / filters.dims[-1]
