"""Linear attention: side by side in a TPU's lanes, head by head elsewhere, and all weights one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wemmu_jax.ops import linear_attention as ops
from wemmu_jax.sharding.mesh import make_mesh

HEAD_DIM = 32


def draw(channels):
    """Queries and keys that are not negative, values, and a cotangent."""
    query, key, value, other = np.random.default_rng(channels).standard_normal(
        (4, 2, 70, channels), np.float32
    )
    return (jax.nn.relu(query), jax.nn.relu(key), value), other


def run(attend, channels, dtype=jnp.float32):
    """What it gives, and the gradients of its inputs."""
    inputs, other = draw(channels)
    inputs = [x.astype(dtype) for x in inputs]
    mixed, back = jax.vjp(lambda *inputs: attend(*inputs, HEAD_DIM), *inputs)
    assert mixed.dtype == jnp.float32
    return [mixed, *back(jnp.asarray(other))]


def assert_near(found, wanted, error):
    for a, b in zip(found, wanted, strict=True):
        a, b = np.float32(a), np.float32(b)
        assert np.abs(a - b).max() <= error * np.abs(b).max()


@pytest.mark.parametrize("channels", [96, 256, 320])
def test_its_forms_agree(channels, monkeypatch):
    """Vectors of 128 channels, the last of them perhaps shorter."""
    wanted = run(ops.quadratic_attention, channels)
    assert_near(run(ops.linear_attention, channels), wanted, 1e-5)
    monkeypatch.setattr(ops, "current_platform", lambda: "tpu")
    assert_near(run(ops.linear_attention, channels), wanted, 1e-5)


def test_sums_are_float32_whatever_comes_in(monkeypatch):
    """bfloat16 holds its own inputs exactly, so that nothing but the gradients' type is narrower."""
    inputs, _ = draw(320)
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in inputs]
    wanted = ops.quadratic_attention(*(x.astype(jnp.float32) for x in narrow), HEAD_DIM)
    for platform in ("cpu", "tpu"):
        monkeypatch.setattr(ops, "current_platform", lambda platform=platform: platform)
        assert_near([ops.linear_attention(*narrow, HEAD_DIM)], [wanted], 1e-5)


def test_heads_that_devices_share_stay_apart(monkeypatch):
    """A run of lanes would lie on two of them."""
    monkeypatch.setattr(ops, "current_platform", lambda: "tpu")
    inputs, _ = draw(256)
    lowered = {}
    for tensor in (1, 2):
        with jax.set_mesh(
            make_mesh(data=1, fsdp=1, sequence=1, tensor=tensor, devices=jax.devices()[:tensor])
        ):
            attend = jax.jit(ops.linear_attention, static_argnums=3)
            lowered[tensor] = attend.lower(*inputs, HEAD_DIM).as_text()
    assert "128x256" in lowered[1] and "128x256" not in lowered[2]
