"""Layers of the expert compiled for a TPU that is not there: attention kernels, and what each remat policy keeps."""

import functools

import jax
import jax.numpy as jnp
import pytest

from wemmu_jax.models.qwen2_5_vl.config import TextConfig
from wemmu_jax.models.qwen2_5_vl.text import DecoderStack, KeyValues, Pattern
from wemmu_jax.planning.kernels import kernel_flops
from wemmu_jax.planning.program import Work, read_program
from wemmu_jax.planning.programs import Compiled, compile_program
from wemmu_jax.sharding.mesh import make_mesh
from wemmu_jax.sharding.rules import parameter_shardings, placed, rows_sharding
from wemmu_jax.sharding.topology import topology_devices

ROWS, TOKENS, CONTEXT, LAYERS, HEADS, WIDTH, HIDDEN = 4, 384, 512, 24, 4, 128, 1024
CONFIG = TextConfig(
    vocab_size=8,
    hidden_size=HEADS * WIDTH,
    intermediate_size=HIDDEN,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=2,
    head_dim=WIDTH,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    mrope_section=(16, 24, 24),
    tie_word_embeddings=True,
)


@functools.cache
def compiled(remat: str) -> Compiled:
    """Gradients of a stack over a context of keys and values, two rows and half the heads on each of four chips."""
    mesh = make_mesh(fsdp=2, tensor=2, devices=topology_devices("v5p:2x2x1"))
    model = DecoderStack(CONFIG, dtype=jnp.bfloat16, remat=remat)

    def gradients(params, x, ids, valid, context, context_valid):
        def loss(params):
            with placed(mesh):
                hidden, _ = model.apply(
                    {"params": params},
                    x,
                    ids,
                    valid=valid,
                    context=context,
                    context_valid=context_valid,
                    pattern=Pattern.FULL,
                    return_key_values=False,
                )
            return jnp.sum(hidden.astype(jnp.float32) ** 2)

        return jax.grad(loss)(params)

    def array(*shape: int, dtype=jnp.bfloat16, axis: int = 0) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows_sharding(mesh, axis))

    keys = array(LAYERS, ROWS, CONTEXT, 2, WIDTH, axis=1)
    inputs = (
        array(ROWS, TOKENS, HEADS * WIDTH),
        array(3, ROWS, TOKENS, dtype=jnp.int32, axis=1),
        array(ROWS, TOKENS, dtype=jnp.bool),
        KeyValues(keys, keys),
        array(ROWS, CONTEXT, dtype=jnp.bool),
    )
    init = functools.partial(model.init, pattern=Pattern.FULL, return_key_values=False)
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(
        lambda key, x, ids, valid: init(key, x, ids, valid=valid), key, *inputs[:3]
    )
    places = parameter_shardings(shapes["params"], mesh)
    params = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=place),
        shapes["params"],
        places,
    )
    with jax.default_matmul_precision("default"):
        return compile_program(
            jax.jit(gradients, out_shardings=places).lower(params, *inputs), draft=False
        )


@pytest.mark.slow
def test_attention_is_the_splash_kernel_and_its_cost_is_known():
    region = read_program(compiled("full").text, lambda name, count: (1.0,) * count)
    kernels = [(times, one) for times, one in region.walk() if one.work is Work.KERNEL]
    product = 2 * (ROWS // 2) * (HEADS // 2) * TOKENS * (CONTEXT + TOKENS) * WIDTH
    found = sorted((times, kernel_flops(one) / product) for times, one in kernels)
    # Forward twice, once to recompute, and one kernel for all gradients; keys are padded from 896 to 1024.
    padded = 1024 / 896
    assert [times for times, _ in found] == [LAYERS] * 3
    assert [cost for _, cost in found] == pytest.approx([n * padded for n in (2, 2, 5)])
    assert all("attention_splash" in one.op_name for _, one in kernels)


@pytest.mark.slow
def test_what_each_policy_keeps_where():
    kept = {policy: compiled(policy).memory for policy in ("full", "named", "offload")}
    layer = ROWS // 2 * TOKENS * 2  # bytes of a value of each token
    # gate and up, and the heads of q, k, v and what was attended, on half of the heads and hidden features
    named = LAYERS * layer * (2 * HIDDEN + (2 + 1) * HEADS * WIDTH) // 2
    more = kept["named"]["temporaries"] - kept["full"]["temporaries"]
    assert 0.7 * named < more < 1.6 * named
    assert kept["offload"]["temporaries"] < kept["full"]["temporaries"]
    at_host = LAYERS * layer * (HEADS * WIDTH + HEADS * WIDTH // 2)
    assert kept["offload"]["host"] == pytest.approx(at_host, rel=0.3)
    assert kept["full"]["host"] == kept["named"]["host"] == 0
