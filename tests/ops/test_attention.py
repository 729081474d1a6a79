"""Every attention kernel against XLA's, forward and backward, and which one is chosen where."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wemmu_jax.ops import attention as attention_lib
from wemmu_jax.ops import splash
from wemmu_jax.ops.attention import AttentionBackend, Mask, attention, attention_backend
from wemmu_jax.ops.xla_attention import xla_attention
from wemmu_jax.sharding.mesh import make_mesh
from wemmu_jax.sharding.topology import topology_devices


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def arrays(tokens: int, keys: int, *, heads: int = 4, key_heads: int = 2, width: int = 24):
    """Queries, keys and values of two rows, no number of tokens a multiple of a block."""
    query = draw(0, 2, tokens, heads, width)
    return query, draw(1, 2, keys, key_heads, width), draw(2, 2, keys, key_heads, width)


def ragged(keys: int, *lengths: int) -> jax.Array:
    """bool[2, S]: each row's keys are padded after its length."""
    return jnp.arange(keys) < jnp.array(lengths)[:, None]


def prefix_and_own(prefix: int, own: int) -> jax.Array:
    """[VLM keys | own keys], each padded at its own end."""
    return jnp.concatenate([ragged(prefix, prefix, 57), ragged(own, own - 30, own)], axis=1)


def segments(tokens: int) -> jax.Array:
    """Windows of uneven sizes, padding in one of their own."""
    numbers = jnp.array([jnp.arange(tokens) // 33, jnp.arange(tokens) // 61])
    return jnp.where(jnp.arange(tokens) < tokens - 9, numbers, -1)


CASES = {
    "full, nothing hidden": (150, 150, None),
    "padding": (150, 150, Mask(ragged(150, 150, 71))),
    "cross attention": (90, 200, Mask(ragged(200, 131, 200))),
    "prefix and own": (140, 240, Mask(prefix_and_own(100, 140))),
    "causal, padded": (150, 150, Mask(ragged(150, 150, 71), causal=True)),
    "causal after a prefix": (140, 240, Mask(prefix_and_own(100, 140), causal=True)),
    "segments": (150, 150, Mask(segments(150), query=segments(150))),
}


def outcome(backend: AttentionBackend, inputs, mask: Mask | None, weights: jax.Array):
    """The result, and the gradients of its weighted sum."""

    def loss(inputs):
        with attention_backend(backend):
            mixed = attention(*inputs, mask=mask)
        return jnp.sum(mixed * weights), mixed

    gradients, mixed = jax.jit(jax.grad(loss, has_aux=True))(inputs)
    return [mixed, *gradients]


BLOCKS = {"one": (768, 4096), "several": (128, 4096), "several, in parts": (128, 512)}


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("name", CASES)
def test_splash_equals_xla(name, blocks, monkeypatch):
    """In several blocks as well, of which masks hide some whole, with gradients of the queries together or in parts."""
    for limit, tokens in zip(("_LARGEST", "_TOGETHER"), BLOCKS[blocks], strict=True):
        monkeypatch.setattr(splash, limit, tokens)
    tokens, keys, mask = CASES[name]
    assert (splash.block_size(keys) < keys) == (blocks != "one")
    inputs, weights = arrays(tokens, keys), draw(3, 2, tokens, 4, 24)
    expected, found = (
        outcome(backend, inputs, mask, weights)
        for backend in (AttentionBackend.XLA, AttentionBackend.SPLASH)
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_bfloat16_on_a_cpu_loses_no_more_than_jax_own():
    """Of values whose scores are large. Heads of 80: to scale by 80**-0.5 rounds, by a power of two would not."""
    exact = [4 * draw(0, 2, 96, 4, 80), 4 * draw(1, 2, 96, 2, 80), draw(2, 2, 96, 2, 80)]
    rounded = [x.astype(jnp.bfloat16) for x in exact]
    exact = jax.nn.dot_product_attention(*(x.astype(jnp.float32) for x in rounded))
    errors = [
        float(jnp.mean(jnp.square(mixed - exact)))
        for mixed in (xla_attention(*rounded), jax.nn.dot_product_attention(*rounded))
    ]
    assert 0 < errors[0] <= errors[1]


@pytest.mark.parametrize("backend", [AttentionBackend.XLA, AttentionBackend.SPLASH])
@pytest.mark.parametrize("name", ["causal after a prefix", "segments"])
def test_on_a_mesh_every_device_has_its_own_rows_heads_and_queries(name, backend):
    """Two parts of each; of causal queries the second part sees more keys than the first."""
    tokens, keys, mask = CASES[name]
    inputs, weights = arrays(tokens, keys), draw(3, 2, tokens, 4, 24)
    expected = outcome(AttentionBackend.XLA, inputs, mask, weights)
    with jax.set_mesh(make_mesh(fsdp=2, sequence=2, tensor=2)):
        found = outcome(backend, inputs, mask, weights)
    parts = found[0].sharding.shard_shape(found[0].shape)
    assert parts == (1, tokens // 2, 2, 24)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_what_the_mesh_does_not_divide_is_whole_on_all():
    """One row, an odd number of queries and a single key head on two of each."""
    query, key = draw(0, 1, 7, 4, 8), draw(1, 1, 9, 1, 8)
    mask = Mask(jnp.arange(9)[None] < 8, causal=True)
    alone = attention(query, key, key, mask=mask)
    with jax.set_mesh(make_mesh(fsdp=2, sequence=2, tensor=2)):
        spread = jax.jit(functools.partial(attention, mask=mask))(query, key, key)
    np.testing.assert_allclose(spread, alone, rtol=1e-6, atol=1e-6)


# -- which kernel


def shape(*sizes: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


AT_REAL_SIZE = {
    "LLM and expert": (shape(8, 1408, 16, 128), shape(8, 4352, 2, 128), "splash", "cudnn"),
    "ViT, all": (shape(8, 5504, 16, 80), shape(8, 5504, 16, 80), "splash", "cudnn"),
    "ViT, a window": (shape(8, 64, 16, 80), shape(8, 64, 16, 80), "xla", "cudnn"),
    "DiT": (shape(8, 1024, 20, 112), shape(8, 1408, 20, 112), "splash", "cudnn"),
    "decoding": (shape(8, 1, 16, 128), shape(8, 1500, 2, 128), "xla", "xla"),
    "float32": (
        shape(8, 1408, 16, 128, dtype=jnp.float32),
        shape(8, 1408, 2, 128, dtype=jnp.float32),
        "xla",
        "xla",
    ),
    "a wide head": (shape(8, 256, 4, 136), shape(8, 256, 4, 136), "splash", "xla"),
    "a narrow head": (shape(8, 256, 4, 36), shape(8, 256, 4, 36), "xla", "xla"),
}


@pytest.mark.parametrize("name", AT_REAL_SIZE)
def test_the_platform_has_its_kernel_and_what_it_does_not_do_is_said(name, caplog):
    query, key, on_tpu, on_gpu = AT_REAL_SIZE[name]
    for platform, wanted in (("tpu", on_tpu), ("gpu", on_gpu), ("cpu", "xla")):
        caplog.clear()
        with caplog.at_level(logging.INFO, attention_lib.__name__):
            assert attention_lib.chosen(platform, query=query, key=key) == wanted
        said = caplog.text
        assert f"{list(query.shape)} over {list(key.shape)}" in said and wanted in said
        assert ("(" in said.partition(f": {wanted}")[2]) == (wanted == "xla" and platform != "cpu")


def test_a_kernel_that_was_asked_for_is_never_replaced():
    query, key, *_ = AT_REAL_SIZE["DiT"]
    for backend in (AttentionBackend.XLA, AttentionBackend.SPLASH):
        with attention_backend(backend):
            assert attention_lib.chosen("tpu", query=query, key=key) is backend
    query, key, *_ = AT_REAL_SIZE["float32"]
    with attention_backend(AttentionBackend.CUDNN):
        with pytest.raises(ValueError, match="cudnn was asked for, but it does not multiply float"):
            attention_lib.chosen("gpu", query=query, key=key)
        with pytest.raises(ValueError, match="cudnn was asked for, but this is a cpu"):
            attention_lib.chosen(
                "cpu", **dict(zip(("query", "key"), AT_REAL_SIZE["DiT"], strict=False))
            )
    assert attention_lib.chosen("tpu", query=query, key=key) is AttentionBackend.XLA


@pytest.mark.parametrize(
    ("tokens", "block"),
    [(1, 128), (150, 256), (384, 384), (896, 512), (1408, 768), (1664, 640), (4352, 640)],
)
def test_blocks_of_the_splash_kernel_pad_little(tokens, block):
    assert splash.block_size(tokens) == block


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    ("tokens", "keys", "first"), [(1328, 1600, None), (1536, 2048, 0), (1328, 3000, 0)]
)
def test_blocks_of_the_splash_kernel_fit_a_tpu(tokens, keys, first, dtype):
    """Forward and backward, compiled for a v5p that is not there."""
    place = jax.sharding.SingleDeviceSharding(topology_devices("v5p:2x2x1", slices=1)[0])

    def given(*shape: int, dtype=dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def gradients(query, key, value, *segments):
        def total(*x):
            mixed = splash.splash_attention(*x, segments, first=first, interpret=False)
            return jnp.sum(mixed, dtype=jnp.float32)

        return jax.grad(total, argnums=(0, 1, 2))(query, key, value)

    inputs = given(2, tokens, 16, 128), given(2, keys, 2, 128), given(2, keys, 2, 128)
    own = (given(2, count, dtype=jnp.int32) for count in (tokens, keys))
    with jax.default_matmul_precision("default"):  # the kernels take no other
        assert "splash_mha_dkv" in jax.jit(gradients).lower(*inputs, *own).compile().as_text()


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN runs on a GPU alone")
@pytest.mark.parametrize("name", CASES)
def test_cudnn_equals_xla(name):
    """In bfloat16, which cuDNN takes; XLA multiplies the same rounded numbers in float32. To be run there with
    JAX_PLATFORMS=cuda, for tests run on the CPU otherwise."""
    tokens, keys, mask = CASES[name]
    rounded = [x.astype(jnp.bfloat16) for x in arrays(tokens - 1, keys - 1)]
    if mask is not None:
        own = None if mask.query is None else mask.query[:, :-1]
        mask = mask.replace(key=mask.key[:, :-1], query=own)
    weights = draw(3, 2, tokens - 1, 4, 24)
    with jax.default_matmul_precision("highest"):
        exact = [x.astype(jnp.float32) for x in rounded]
        expected = outcome(AttentionBackend.XLA, exact, mask, weights)
    found = outcome(AttentionBackend.CUDNN, rounded, mask, weights)
    for one, other in zip(found, expected, strict=True):
        off = jnp.linalg.norm(one.astype(jnp.float32) - other) / jnp.linalg.norm(other)
        assert off < 1e-2


@pytest.mark.parametrize("masked", [False, True])
def test_cudnn_is_what_is_lowered_for_a_gpu(masked, monkeypatch):
    """Odd numbers of tokens, which its backward pass does not take as they are. Nothing runs."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    query, key = shape(2, 151, 4, 64), shape(2, 209, 2, 64)
    mask = Mask(ragged(209, 131, 209), causal=True) if masked else None

    def gradients(query, key, value):
        three = jax.grad(lambda *all: attention(*all, mask=mask).sum(), argnums=(0, 1, 2))
        return three(query, key, value)

    lowered = jax.jit(gradients).trace(query, key, key).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert text.count("__cudnn$fmhaScaleBiasSoftmax") == 2  # there and back, with a mask
    assert "2x152x4x64" in text and "2x210x2x64" in text
