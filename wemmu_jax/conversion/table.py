"""What a conversion table is made of: one row for each tensor of the reference, or for a stack of them.

A table is a list of `Entry`, built by a function of the model's config. The same rows are read forwards by
`convert` and backwards by `export`.
"""

import dataclasses
import enum

import numpy as np


class Layout(enum.Enum):
    """How a PyTorch tensor lies in ours. Every layout is a permutation, so it is exactly reversible."""

    COPY = "copy"  # any shape, unchanged
    LINEAR = "linear"  # [out, in] -> [in, out]
    CONV = "conv"  # [out, in/groups, kh, kw] -> [kh, kw, in/groups, out]
    POINTWISE = "pointwise"  # a 1x1 (x1) convolution [out, in, 1, 1] -> [in, out]
    PATCH = "patch"  # patch embedding [out, C, T, ph, pw] -> [C*T*ph*pw, out]

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """A view of `tensor` in our layout."""
        match self:
            case Layout.COPY:
                return tensor
            case Layout.LINEAR:
                return tensor.T
            case Layout.CONV:
                return tensor.transpose(2, 3, 1, 0)
            case Layout.POINTWISE | Layout.PATCH:
                return tensor.reshape(tensor.shape[0], -1).T

    def to_reference(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The inverse of `to_ours` for a reference tensor of `shape`."""
        match self:
            case Layout.COPY:
                return array
            case Layout.CONV:
                return array.transpose(3, 2, 0, 1)
            case Layout.LINEAR | Layout.POINTWISE | Layout.PATCH:
                return array.T.reshape(shape)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row.

    Attributes:
      source: name of the reference's tensor; with `stack`, it contains `{i}`.
      target: our path, joined by '/', relative to the model's own parameter tree.
      layout: how the tensor is laid out.
      shape: the reference tensor's shape (of one layer), as the config implies it.
      stack: the values of `{i}`, in the order in which they lie along our leading layer axis; None for a
        tensor that is not stacked.
    """

    source: str
    target: str
    layout: Layout
    shape: tuple[int, ...]
    stack: tuple[int, ...] | None = None

    def sources(self) -> list[str]:
        """The names of all reference tensors of this row, in stacking order."""
        if self.stack is None:
            return [self.source]
        return [self.source.replace("{i}", str(i)) for i in self.stack]

    @property
    def target_shape(self) -> tuple[int, ...]:
        """The shape of our leaf."""
        one = self.layout.to_ours(np.broadcast_to(np.zeros((), np.int8), self.shape)).shape
        return one if self.stack is None else (len(self.stack), *one)


def dense(
    source: str,
    target: str,
    *,
    inputs: int,
    outputs: int,
    bias: bool = True,
    layout: Layout = Layout.LINEAR,
    stack: tuple[int, ...] | None = None,
) -> list[Entry]:
    """Rows of a linear layer, or of a 1x1 convolution with `layout=POINTWISE`: `{source}.weight` and `.bias`."""
    shape = (outputs, inputs) if layout is Layout.LINEAR else (outputs, inputs, 1, 1)
    rows = [Entry(f"{source}.weight", f"{target}/kernel", layout, shape, stack)]
    if bias:
        rows.append(Entry(f"{source}.bias", f"{target}/bias", Layout.COPY, (outputs,), stack))
    return rows
