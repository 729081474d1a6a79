"""Where arrays lie on the mesh: one table for parameters and activations of all models.

    rows of a batch              along data and fsdp
    tokens, rows of a picture    along sequence
    heads, hidden features       along tensor, by the table
    weights                      along tensor, by the table, and along fsdp, by the axis that is easiest to gather

A device works on its own rows alone, so every layer's weights are gathered along fsdp as the layer runs, and its
gradients are scattered again. XLA has to be told so: see `placed`.
"""

import contextlib
import enum
import functools
import math
import re
from collections.abc import Iterator, Mapping

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wemmu_jax.ops.attention import AttentionBackend, attention_backend
from wemmu_jax.ops.axes import HEADS, ROWS, TOKENS
from wemmu_jax.ops.convolution import DepthwiseConv
from wemmu_jax.ops.norms import RMSNorm

# The layers whose first axis is that of the rows, in and out; all others are made of them.
_LAYERS = (nn.Dense, nn.Conv, nn.Embed, RMSNorm, DepthwiseConv)
SMALL = 2**16  # values; below this a leaf is copied to every device


class Cut(enum.Enum):
    """What `tensor` cuts of a layer (Megatron-LM, arXiv 1909.08053, section 3): features in, features out."""

    NEITHER = (False, False)
    OUT = (False, True)
    IN = (True, False)  # XLA sums the results over the devices
    THROUGH = (True, True)  # each feature comes from itself
    LOOKUP = (None, False)  # a table that is on every device, whatever its size


# Layer, a path inside any of the models -> how it is cut. The first match counts, and every layer must have one.
RULES: tuple[tuple[str, Cut], ...] = (
    # In a table that is cut, a lookup would run over the whole batch on every device. Frozen, 0.6 GB.
    (r"embed_tokens$", Cut.LOOKUP),
    (r"(^|/)(encoder|decoder)/", Cut.NEITHER),  # DC-AE
    (r"(^|/)([qkv]_proj|gate_proj|up_proj|lm_head)$", Cut.OUT),
    (r"(^|/)(o_proj|down_proj)$", Cut.IN),
    (r"/[qk]_norm$", Cut.THROUGH),
    # The two halves that `expand` makes are gated with one another, so XLA moves one to the other's device.
    (r"ffn/expand$", Cut.OUT),
    (r"ffn/depthwise$", Cut.THROUGH),
    (r"ffn/contract$", Cut.IN),
    (r"(caption_projection/linear_1|merger/hidden)$", Cut.OUT),
    (r"(caption_projection/linear_2|merger/out)$", Cut.IN),
    (r"norm\d?$", Cut.NEITHER),
    # [query | key | value] of the ViT would be cut between the three, not between heads.
    (r"attention/(qkv|proj)$", Cut.NEITHER),
    (r"(^|/)(patch_embed|input_proj|output_proj)$", Cut.NEITHER),
    (r"(^|/)(time_embed/\w+|output/projection)$", Cut.NEITHER),
    # Tables and scales that lie in no layer of their own.
    (r"(^|/)(blocks|output|position_mlp|vae_branch|queries)$", Cut.NEITHER),
)


@functools.cache
def cut_of(layer: str) -> Cut:
    """The rule for a layer. Raises ValueError if there is none."""
    for pattern, cut in RULES:
        if re.search(pattern, layer):
            return cut
    raise ValueError(f"no rule of sharding.rules.RULES says how {layer!r} lies on a mesh; add one")


def parameter_spec(path: str, shape: tuple[int, ...], *, mesh: Mapping[str, int]) -> PartitionSpec:
    """Along `tensor` as the table says; along `fsdp` another axis that it divides, see `_ease`, never that of the
    layers of a scanned stack. Leaves that are small or have no such axis are on every device.

    Args:
      path: the leaf's path; kernels of stacks have one axis more than those of single layers.
      shape: its shape.
      mesh: size of each axis.

    Raises:
      ValueError: no rule matches, or `tensor` does not divide what the table wants it to.
    """
    if not shape or path.endswith("/ns_coeffs"):
        return PartitionSpec()  # counters, and the polynomial of Muon
    layer, _, leaf = path.rpartition("/")
    cut = cut_of(layer)
    if math.prod(shape) < SMALL or cut is Cut.LOOKUP:
        return PartitionSpec()
    axes: list[str | None] = [None] * len(shape)
    # What is added to the sum of an IN layer is not cut; the kernel's features are its last two axes.
    along = {Cut.OUT: -1, Cut.THROUGH: -1, Cut.IN: -2 if leaf == "kernel" else None}.get(cut)
    if along is not None and mesh[HEADS] > 1:
        if shape[along] % mesh[HEADS]:
            raise ValueError(
                f"mesh.{HEADS}={mesh[HEADS]} does not divide the {shape[along]} features of {path}"
            )
        axes[along] = HEADS
    stacked = re.search(r"(^|/)(layers|blocks|stage_\d+)/", path) is not None
    possible = [
        axis
        for axis in range(int(stacked), len(shape))
        if axes[axis] is None and shape[axis] % mesh["fsdp"] == 0
    ]
    if possible and mesh["fsdp"] > 1:
        axes[max(possible, key=lambda axis: _ease(shape, axis, mesh["fsdp"]))] = "fsdp"
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def _ease(shape: tuple[int, ...], axis: int, parts: int) -> tuple:
    """Larger where an axis is easier to gather on a TPU: parts of whole tiles are joined as they lie, others must be
    shifted into place, which can take longer than the product that needs them. Of two axes XLA lays the longer one
    along the lanes, so that the shorter one is joined by rows."""
    part = shape[axis] // parts
    return part % 128 == 0, part % 8 == 0, -shape[axis], -axis


def parameter_shardings(tree, mesh: Mesh):
    """A NamedSharding for every leaf of a tree of parameters, optimizer state or their abstract values."""

    def one(path, leaf) -> NamedSharding:
        names = "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path)
        return NamedSharding(mesh, parameter_spec(names, leaf.shape, mesh=mesh.shape))

    return jax.tree_util.tree_map_with_path(one, tree)


@contextlib.contextmanager
def placed(mesh: Mesh, attention: AttentionBackend = AttentionBackend.AUTO) -> Iterator[None]:
    """While it is open, what is traced is placed on `mesh`; to be opened inside what is compiled.

    What goes into and comes out of every layer is pinned to the devices of its rows, tokens and features. Left to
    itself, XLA's partitioner finds weights and rows cut along the same mesh axis, and now and then moves the
    activations of the whole batch to the weights instead of a layer's weights to the rows. The pins hold for the
    gradients of the activations too. Attention runs on each device's own rows and heads, and `roll_rows`
    hands rows on. Numbers do not change.
    """

    def pin(x: jax.Array, cut: bool | None, features: int) -> jax.Array:
        axes: list = [None] * x.ndim
        if x.ndim > 2 and x.shape[1] % mesh.shape[TOKENS] == 0:
            axes[1] = TOKENS
        if cut and x.shape[features] % mesh.shape[HEADS] == 0:
            axes[features] = HEADS
        axes[0] = ROWS
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))

    def interceptor(call, args: tuple, kwargs: dict, context: nn.module.InterceptorContext):
        if context.method_name != "__call__" or not isinstance(context.module, _LAYERS):
            return call(*args, **kwargs)
        before, after = cut_of("/".join(context.module.path)).value
        # Features that lie as [heads, width] are cut between heads.
        features = -getattr(context.module, "axes", 1)
        return pin(call(*(pin(x, before, features) for x in args), **kwargs), after, features)

    with (
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
        attention_backend(attention),
        nn.intercept_methods(interceptor),
    ):
        yield


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def rows_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Rows of a batch along data and fsdp; they lie along `axis` of the array."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, ROWS))
