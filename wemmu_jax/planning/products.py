"""FLOPs of the products in a program. A multiply and an add are two; taps that fall on padding are not counted."""

import functools
import re

from wemmu_jax.planning.hlo import Computation, Instruction, Module

_PAIR = re.compile(r"(-?\d+)_(-?\d+)")


def flops(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Of one execution of `instruction`: of its own product, or of those in the computation that it calls."""
    if instruction.opcode == "convolution":
        return _convolution(computation, instruction)
    if instruction.opcode == "dot":
        return _dot(computation, instruction)
    if instruction.opcode in ("fusion", "call", "async-start") and instruction.calls:
        inner = module[instruction.calls]
        return sum(flops(module, inner, one) for one in inner)
    return 0


def _dot(computation: Computation, dot: Instruction) -> int:
    left = computation[dot.operands[0]].shapes[0]
    axes = dot.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    summed = 1
    for axis in axes.split(","):
        summed *= left.dims[int(axis)] if axis else 1
    return 2 * dot.shapes[0].size * summed


def _convolution(computation: Computation, convolution: Instruction) -> int:
    # On a TPU every product is a convolution; a batch is a spatial axis whose dilated input meets one tap each.
    left, right = (computation[name].shapes[0].dims for name in convolution.operands)
    labels = re.match(r"(\w+)_(\w+)->(\w+)", convolution.attribute(r"dim_labels=([^,\s]+)"))
    lhs, rhs, out = labels[1], labels[2], labels[3]
    result = convolution.shapes[0].dims
    spatial = "".join(sorted(set(lhs) - set("bf")))
    window = _window(convolution.attribute(r"window=\{([^}]*)\}") or "", len(spatial))
    taps = 1
    for axis, place in enumerate(spatial):
        taps *= _taps(
            left[lhs.index(place)], right[rhs.index(place)], result[out.index(place)], *window[axis]
        )
    groups = int(convolution.attribute(r"batch_group_count=(\d+)") or 1)
    rows = left[lhs.index("b")] // groups
    return 2 * rows * right[rhs.index("i")] * result[out.index("f")] * taps


def _window(text: str, axes: int) -> list[tuple[int, int, int, int]]:
    """For each spatial axis: stride, padding before it, dilation of the input, dilation of the kernel."""
    fields = dict(field.split("=", 1) for field in text.split())
    stride, left, right = (
        [int(n) for n in fields[key].split("x")] if key in fields else [1] * axes
        for key in ("stride", "lhs_dilate", "rhs_dilate")
    )
    pad = [int(low) for low, _ in _PAIR.findall(fields.get("pad", ""))] or [0] * axes
    return list(zip(stride, pad, left, right, strict=True))


@functools.lru_cache(maxsize=65536)
def _taps(
    size: int, kernel: int, out: int, stride: int, pad: int, dilation: int, spread: int
) -> int:
    """Pairs of an output and a kernel place along one axis that meet a value of the input."""
    if kernel == 1 and stride == 1 and pad == 0 and dilation == 1:
        return min(out, size)
    end, count = (size - 1) * dilation, 0
    for tap in range(kernel):
        first = tap * spread - pad
        if dilation == 1:
            # Outputs o with 0 <= first + o * stride <= end.
            low = max(0, -(first // stride))
            high = min(out - 1, (end - first) // stride)
            count += max(0, high - low + 1)
        else:
            places = range(first, first + out * stride, stride)
            count += sum(0 <= place <= end and place % dilation == 0 for place in places)
    return count
