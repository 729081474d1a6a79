"""The one attention function of the project, and the kernels behind it.

B batch, T own tokens, S keys, N heads, K key heads, H head width.
"""

import enum
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from wemmu_jax.ops.axes import HEADS, ROWS, TOKENS, current_mesh, current_platform, dividing
from wemmu_jax.ops.splash import splash_attention
from wemmu_jax.ops.xla_attention import xla_attention

_log = logging.getLogger(__name__)
_TILE = 128  # rows and columns of a TPU's matrix unit, and lanes of its vectors


class AttentionBackend(enum.StrEnum):
    """Which kernel computes attention. All give the same numbers up to rounding."""

    AUTO = "auto"  # the platform's own, or XLA's where `reason_against` says why
    XLA = "xla"
    CUDNN = "cudnn"  # GPU
    SPLASH = "splash"  # TPU; on a CPU it is interpreted, which is slow


@flax.struct.dataclass
class Mask:
    """Which keys a query sees: those of its own segment and, if causal, none behind its own place.

    Attributes:
      key: int32 or bool[B, S], the segment of each key.
      query: int32[B, T], that of each query; None stands for segment 1, so that `Mask(valid)` hides what is False.
      causal: the queries are the last T of the S keys, and see none that follows them.
    """

    key: jax.Array
    query: jax.Array | None = None
    causal: bool = flax.struct.field(pytree_node=False, default=False)

    def dense(self, queries: int, first: int | jax.Array) -> jax.Array:
        """bool[B, 1, T or 1, S]; query t sees keys up to `first` + t if causal."""
        own = 1 if self.query is None else self.query[:, None, :, None]
        seen = self.key.astype(jnp.int32)[:, None, None, :] == own
        if self.causal:
            places = jnp.arange(self.key.shape[1])
            seen &= places <= first + jnp.arange(queries)[:, None]
        return seen


_asked: ContextVar[AttentionBackend] = ContextVar("attention", default=AttentionBackend.AUTO)


@contextmanager
def attention_backend(backend: AttentionBackend) -> Iterator[None]:
    """While it is open, attention that is traced uses `backend`. To be opened inside what is compiled."""
    token = _asked.set(backend)
    try:
        yield
    finally:
        _asked.reset(token)


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, mask: Mask | None = None
) -> jax.Array:
    """Scaled dot-product attention with grouped heads; softmax in float32, scores by 1/sqrt(H).

    On a mesh (see `sharding.rules.placed`) every device works on its own rows, heads and queries, over all keys.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H] with N a multiple of K; head n reads key head n // (N // K).
      value: [B, S, K, H].
      mask: what is seen, or None for all. A query that sees no key gets finite values that mean nothing (padding).

    Returns:
      [B, T, N, H] in the dtype of `query`. Remat policies know it as "attended".

    Raises:
      ValueError: the backend that was asked for cannot do it.
    """
    mesh, platform = current_mesh(), current_platform()
    backend = chosen(platform, query=query, key=key)
    kernel = {
        AttentionBackend.XLA: _xla,
        AttentionBackend.CUDNN: _cudnn,
        AttentionBackend.SPLASH: _splash(platform, shards=mesh.shape[TOKENS] if mesh else 1),
    }[backend]
    behind = key.shape[1] - query.shape[1]  # keys before the first query's own
    # The kernel's name stands in the program's text, where `wemmu plan` and profilers show it.
    with jax.named_scope(f"attention_{backend}"):
        if mesh is None:
            return kernel(query, key, value, mask, behind)
        return _on_mesh(kernel, mesh, query, key, value, mask, behind)


def chosen(platform: str, *, query: jax.Array, key: jax.Array) -> AttentionBackend:
    """The kernel for arrays of these shapes and types on "cpu", "gpu" or "tpu".

    Raises:
      ValueError: cuDNN was asked for and cannot do it.
    """
    asked = _asked.get()
    own = {"gpu": AttentionBackend.CUDNN, "cuda": AttentionBackend.CUDNN}.get(platform)
    own = AttentionBackend.SPLASH if platform == "tpu" else own
    backend = asked if asked is not AttentionBackend.AUTO else own or AttentionBackend.XLA
    reason = reason_against(backend, query=query, key=key)
    if asked is AttentionBackend.AUTO and reason:
        backend = AttentionBackend.XLA
    elif asked is AttentionBackend.CUDNN and (reason or own is not AttentionBackend.CUDNN):
        raise ValueError(
            f"attention by cudnn was asked for, but {reason or f'this is a {platform}'}"
        )
    what = f"attention {list(query.shape)} over {list(key.shape)} {query.dtype} on {platform}"
    _log.info("%s: %s%s", what, backend.value, f" ({reason})" if reason else "")
    return backend


def reason_against(backend: AttentionBackend, *, query: jax.Array, key: jax.Array) -> str | None:
    """Why AUTO does not take a platform's kernel for these shapes and types; None if it does."""
    tokens, keys, width = query.shape[1], key.shape[1], query.shape[3]
    match backend:
        case AttentionBackend.SPLASH:
            if query.dtype != jnp.bfloat16:
                return f"{query.dtype} is multiplied in full by XLA alone"
            if tokens < _TILE or keys < _TILE:
                return f"{tokens} queries over {keys} keys leave a tile of {_TILE} x {_TILE} empty"
            # 80 and 112, the widths of the ViT and of Sana, are padded in the vector lanes only.
            if width < _TILE // 2:
                return f"a head of {width} fills less than half of {_TILE} lanes"
        case AttentionBackend.CUDNN:
            if query.dtype not in (jnp.bfloat16, jnp.float16):
                return f"it does not multiply {query.dtype}"
            if width % 8 or width > 128:  # jax._src.cudnn.fused_attention_stablehlo
                return f"a head of {width} is not a multiple of 8 up to 128"
            if tokens < 2:
                return "one query at a time is no work for it"
    return None


# -- kernels: (query, key, value, mask, place of the first query among the keys)


def _xla(query, key, value, mask: Mask | None, first) -> jax.Array:
    seen = None if mask is None else mask.dense(query.shape[1], first)
    return checkpoint_name(xla_attention(query, key, value, mask=seen), "attended")


def _cudnn(query, key, value, mask: Mask | None, first) -> jax.Array:
    tokens, keys = query.shape[1], key.shape[1]
    # Its backward pass wants even numbers of tokens, and a mask of all scores.
    if mask is None and keys % 2:
        mask = Mask(jnp.ones(key.shape[:2], bool))
    seen = None
    if mask is not None:
        seen = jnp.broadcast_to(mask.dense(tokens, first), (query.shape[0], 1, tokens, keys))
        seen = jnp.pad(seen, ((0, 0), (0, 0), (0, tokens % 2), (0, keys % 2)))
    query, key, value = (
        jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (query, key, value)
    )
    mixed = jax.nn.dot_product_attention(query, key, value, mask=seen, implementation="cudnn")
    return checkpoint_name(mixed[:, :tokens], "attended")


def _splash(platform: str, *, shards: int):
    def kernel(query, key, value, mask: Mask | None, first) -> jax.Array:
        tokens, causal = query.shape[1], mask is not None and mask.causal
        segments = None
        if mask is not None:
            own = jnp.ones(query.shape[:2], jnp.int32) if mask.query is None else mask.query
            segments = (own, mask.key.astype(jnp.int32))

        def attend(*arrays, first: int | None) -> jax.Array:
            return splash_attention(*arrays, first=first, interpret=platform != "tpu")

        arrays = (query, key, value, segments)
        if not causal:
            return attend(*arrays, first=None)
        if isinstance(first, int):
            return attend(*arrays, first=first)
        # The kernel wants to know at compile time which blocks are seen: one for each part of the queries.
        behind = key.shape[1] - shards * tokens
        parts = [
            lambda *arrays, first=behind + part * tokens: attend(*arrays, first=first)
            for part in range(shards)
        ]
        return jax.lax.switch(jax.lax.axis_index(TOKENS), parts, *arrays)

    return kernel


def _on_mesh(kernel, mesh, query, key, value, mask: Mask | None, behind: int) -> jax.Array:
    """`kernel` on each device's rows, queries and heads; an axis that the mesh does not divide is whole on all."""
    rows = dividing(mesh, query.shape[0], ROWS)
    tokens = dividing(mesh, query.shape[1], TOKENS)
    heads = dividing(mesh, key.shape[2], HEADS)
    own = PartitionSpec(rows, tokens, heads)
    all_keys = PartitionSpec(rows, None, heads)
    seen = None
    if mask is not None:
        query_rows = None if mask.query is None else PartitionSpec(rows, tokens)
        seen = Mask(PartitionSpec(rows), query_rows, mask.causal)

    def local(query, key, value, mask):
        first = behind
        if tokens and mesh.shape[TOKENS] > 1:
            first = behind + jax.lax.axis_index(TOKENS) * query.shape[1]
        return kernel(query, key, value, mask, first)

    spread = jax.shard_map(
        local,
        in_specs=(own, all_keys, all_keys, seen),
        out_specs=own,
        check_vma=False,  # Pallas calls do not say along which axes their results differ
    )
    return spread(query, key, value, mask)
