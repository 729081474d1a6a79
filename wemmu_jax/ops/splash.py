"""Flash attention on TPU by JAX's splash kernel (jax.experimental.pallas.ops.tpu.splash_attention), which takes whole
blocks of one row's [heads, tokens, width].

B batch, T own tokens, S keys, N heads, K key heads, H head width.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

_TILE = 128
_LARGEST = (
    768  # tokens of a block; scores of a block are float32 in the chip's 16 MiB of working memory
)
# Bytes of a channel of the keys whose gradients a kernel holds, 2048 in bfloat16; of more keys it leaves the queries'
# gradient in parts to be added up.
_TOGETHER = 4096


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
    *,
    first: int | None,
    interpret: bool,
) -> jax.Array:
    """Attention without scores in memory, forward and backward.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H].
      value: [B, S, K, H].
      segments: int32[B, T] and int32[B, S]; a query sees the keys of its own segment. None: all.
      first: query t sees keys up to `first` + t; None: all.
      interpret: run it as plain operations, on any platform.

    Returns:
      [B, T, N, H] in the dtype of `query`. Remat policies know the kernel's results as "attended".
    """
    tokens, keys = query.shape[1], key.shape[1]
    own, other = block_size(tokens), block_size(keys)
    if segments is None and keys % other:
        segments = (jnp.ones(query.shape[:2], jnp.int32), jnp.ones(key.shape[:2], jnp.int32))
    scale = query.shape[-1] ** -0.5
    query = (query.astype(jnp.float32) * scale).astype(query.dtype)  # the kernel scales nothing
    query, key, value = (
        _padded(x, block).swapaxes(1, 2)
        for x, block in ((query, own), (key, other), (value, other))
    )
    if segments is not None:
        # Padding of the queries sees what segment 1 sees, so that no softmax runs over nothing.
        segments = splash_attention_kernel.SegmentIds(
            _padded(segments[0], own, 1), _padded(segments[1], other, -2)
        )
    together = _together(key.shape[2], other, key.dtype.itemsize)
    kernel = _kernel(query.shape[1:3], key.shape[2], (own, other, together), first, interpret)
    return jax.vmap(kernel)(query, key, value, segments).swapaxes(1, 2)[:, :tokens]


def block_size(tokens: int) -> int:
    """A block for so many tokens: large ones make few steps, small ones little padding.

    A step is taken to cost half a tile more than the tokens in it, which is a guess that no TPU has been asked about.
    """
    tiles = -(-tokens // _TILE) * _TILE

    def cost(block: int) -> float:
        blocks = -(-tokens // block)
        return blocks * (block + _TILE / 2)

    return min(range(_TILE, min(tiles, _LARGEST) + 1, _TILE), key=cost)


def _together(keys: int, block: int, itemsize: int) -> int:
    """The most keys whose gradients are formed together: equal runs of blocks."""
    blocks, most = keys // block, _TOGETHER // itemsize // block
    return block * max(n for n in range(1, max(most, 1) + 1) if blocks % n == 0)


def _padded(x: jax.Array, block: int, fill: int = 0) -> jax.Array:
    """x [B, T, ...] with T a multiple of `block`."""
    spare = -x.shape[1] % block
    return jnp.pad(x, [(0, 0), (0, spare)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)


def _kernel(
    heads_and_tokens: tuple[int, int],
    keys: int,
    blocks: tuple[int, int, int],
    first: int | None,
    interpret: bool,
):
    heads, tokens = heads_and_tokens
    own, other, together = blocks
    if first is None:
        mask = splash_attention_mask.FullMask((tokens, keys))
    else:
        mask = splash_attention_mask.CausalMask((tokens, keys), offset=first)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=own,
        block_kv=other,
        block_q_dkv=own,
        block_kv_dkv=together,
        block_kv_dkv_compute=other,
        # All gradients from scores that are formed once, 5 products instead of 7.
        use_fused_bwd_kernel=True,
    )
    return splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        residual_checkpoint_name="attended",
        interpret=interpret,
    )
