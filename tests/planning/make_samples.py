"""Compiles the small TPU programs that the tests of planning read, and trims their texts. Needs libtpu.

python -m tests.planning.make_samples
"""

import os
import pathlib
import re

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import NamedSharding, PartitionSpec

from wemmu_jax.sharding.mesh import make_mesh
from wemmu_jax.sharding.topology import topology_devices

FOLDER = pathlib.Path(__file__).parent / "samples"
TOPOLOGY = "v5p:2x2x1"
# `loops`: OUTER x INNER layers of WIDTH x WIDTH, ROWS a device.
OUTER, INNER, WIDTH, ROWS, DEVICES = 3, 4, 1024, 512, 4

_DEVICES = topology_devices(TOPOLOGY)
_MESH = make_mesh(fsdp=DEVICES, devices=_DEVICES)
_ASYNC = (
    "xla_tpu_enable_async_collective_fusion",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
    "xla_tpu_enable_async_collective_fusion_multiple_steps",
    "xla_tpu_overlap_compute_collective_tc",
    "xla_enable_async_all_gather",
)


def spec(shape: tuple[int, ...], axis: int | None, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """An array that is cut along `axis`."""
    place = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "fsdp")
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(_MESH, place))


def pinned(x: jax.Array, axis: int | None) -> jax.Array:
    """Keeps `x` cut along `axis`, or whole."""
    return jax.lax.with_sharding_constraint(x, spec(x.shape, axis).sharding)


def loops() -> jax.stages.Compiled:
    """Gradients of a scan inside a scan, and of a product in one branch of a conditional behind it."""

    def layer(x, weight):
        return pinned(jax.nn.silu(x @ pinned(weight, None)), 0), None

    def loss(weights, last, x):
        x, _ = jax.lax.scan(lambda x, inner: jax.lax.scan(layer, x, inner), x, weights)
        x = jax.lax.cond(
            jnp.sum(x) > 0, lambda x: pinned(x @ pinned(last, None), 0), lambda x: 2 * x, x
        )
        return jnp.sum(x.astype(jnp.float32) ** 2)

    weights, last = spec((OUTER, INNER, WIDTH, WIDTH), 2), spec((WIDTH, WIDTH), 0)
    shardings = (weights.sharding, last.sharding)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=shardings)
    return gradient.lower(weights, last, spec((DEVICES * ROWS, WIDTH), 0)).compile()


def overlapped() -> jax.stages.Compiled:
    """Two layers; the second one's weights are gathered while the first runs."""

    def forward(first, second, x):
        for weight in (first, second):
            x = pinned(jax.nn.silu(x @ pinned(weight, None)), 0)
        return x

    x, weight = spec((32768, 4096), 0), spec((4096, 4096), 0)
    lowered = jax.jit(forward, out_shardings=x.sharding).lower(weight, weight, x)
    return lowered.compile(compiler_options=dict.fromkeys(_ASYNC, "true"))


def kernels() -> jax.stages.Compiled:
    """Splash attention there and back, a kernel that says what it costs, and one that does not."""
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((512, 512))] * 4)
    attend = splash_attention_kernel.make_splash_mha_single_device(mask)

    def doubled(x, name, cost):
        def kernel(source, target):
            target[...] = 2 * source[...]

        block = pl.BlockSpec((1, 128, 128), lambda i, j: (i, j, 0))
        call = pl.pallas_call(
            kernel,
            out_shape=x,
            grid=(4, 4),
            in_specs=[block],
            out_specs=block,
            name=name,
            cost_estimate=cost,
        )
        return call(x)

    def gradients(query, key, value):
        three = jax.grad(
            lambda *arrays: attend(*arrays).astype(jnp.float32).sum(), argnums=(0, 1, 2)
        )
        said = pl.CostEstimate(flops=10**12, transcendentals=0, bytes_accessed=2**20)
        return [
            doubled(doubled(x, "said", said), "unsaid", None) for x in three(query, key, value)[:1]
        ]

    one = jax.ShapeDtypeStruct(
        (4, 512, 128), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(_DEVICES[0])
    )
    return jax.jit(gradients).lower(one, one, one).compile()


def offloaded() -> jax.stages.Compiled:
    """Gradients of three layers that keep what they need in the host's memory."""
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["kept"],
        offload_src="device",
        offload_dst="pinned_host",
    )

    def layer(x, weight):
        product = jax.ad_checkpoint.checkpoint_name(x @ pinned(weight, None), "kept")
        return jax.nn.silu(product), None

    def loss(weights, x):
        x, _ = jax.lax.scan(jax.checkpoint(layer, policy=policy, prevent_cse=False), x, weights)
        return jnp.sum(x.astype(jnp.float32) ** 2)

    weights, x = spec((OUTER, WIDTH, WIDTH), 1), spec((DEVICES * ROWS, WIDTH), 0)
    return jax.jit(jax.grad(loss), out_shardings=weights.sharding).lower(weights, x).compile()


def product() -> jax.stages.Compiled:
    """8192 x 8192 x 8192."""
    one = jax.ShapeDtypeStruct(
        (8192, 8192), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(_DEVICES[0])
    )
    return jax.jit(jnp.matmul).lower(one, one).compile()


def trimmed(text: str) -> str:
    """Without what planning does not read: sources, layouts but for memories, most of the backend's settings."""
    head, _, rest = text.partition("\n")
    head = head.partition(", entry_computation_layout")[0]
    text = rest[re.search(r"^(%|ENTRY)", rest, re.M).start() :]
    text = re.sub(r"\{[\d,]*:[^}]*?(S\(\d\))?\}", lambda m: f"{{:{m[1]}}}" if m[1] else "", text)
    text = re.sub(r" stack_frame_id=\d+", "", text)
    return "\n".join([head, "", *map(_trimmed_line, text.splitlines())]) + "\n"


def _trimmed_line(line: str) -> str:
    own, _, backend = line.partition(", backend_config=")
    kept = re.findall(r'"estimated_cycles":"\d+"|"cost_estimate":\{[^}]*\}', backend)
    return own + (f", backend_config={{{','.join(kept)}}}" if kept else "")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for program in (loops, overlapped, kernels, offloaded, product):
        (FOLDER / f"{program.__name__}.hlo").write_text(trimmed(program().as_text()))
