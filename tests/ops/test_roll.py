"""Rows that change places, against numpy's roll: on one device, and from device to device."""

import math
import re

import jax
import numpy as np
import pytest

from wemmu_jax.ops.roll import roll_rows
from wemmu_jax.planning.collectives import KINDS
from wemmu_jax.sharding.mesh import make_mesh
from wemmu_jax.sharding.rules import placed, rows_sharding

# Mesh -> devices along the rows.
MESHES = {
    "data 8": (lambda: make_mesh(fsdp=1), 8),
    "data 2, fsdp 4": (lambda: make_mesh(fsdp=4), 8),
    "data 3, fsdp 2": (lambda: make_mesh(fsdp=2, devices=jax.devices()[:6]), 6),
    "fsdp 2, tensor 2, sequence 2": (lambda: make_mesh(fsdp=2, tensor=2, sequence=2), 2),
    "1 device": (lambda: make_mesh(devices=jax.devices()[:1]), 1),
}


def rolled(mesh):
    def roll(x, by):
        with placed(mesh):
            return roll_rows(x, by)

    return jax.jit(roll)


@pytest.mark.parametrize("own", [1, 3])
@pytest.mark.parametrize("name", MESHES)
def test_every_shift_is_numpys_to_the_bit(name, own):
    make, shards = MESHES[name]
    mesh, rows = make(), shards * own
    bits = np.random.default_rng(0).integers(0, 2**32, (rows, 4, 3, 2), np.uint32)  # NaNs too
    roll = rolled(mesh)
    for x in (bits.view(np.float32), bits[:, 0, 0, 0]):
        spread = jax.device_put(x, rows_sharding(mesh))
        for by in range(rows):
            found = np.asarray(roll(spread, np.int32(by)))
            assert found.tobytes() == np.roll(x, -by, axis=0).tobytes(), by


@pytest.mark.parametrize("own", [1, 3])
@pytest.mark.parametrize("name", MESHES)
def test_a_device_hands_on_its_own_rows_and_no_more(name, own):
    make, shards = MESHES[name]
    mesh = make()
    x = jax.ShapeDtypeStruct((shards * own, 4), np.float32, sharding=rows_sharding(mesh))
    text = rolled(mesh).lower(x, jax.ShapeDtypeStruct((), np.int32)).compile().as_text()
    found = re.findall(rf"= \(?(\w+\[[\d,]*\]).*? ({'|'.join(KINDS)})(?:-start)?\(", text)
    times = 0 if shards == 1 else math.ceil(math.log2(shards)) + (own > 1)
    assert found == [(f"f32[{own},4]", "collective-permute")] * times


def test_without_a_mesh():
    x = np.arange(10).reshape(5, 2)
    np.testing.assert_array_equal(jax.jit(roll_rows)(x, 3), np.roll(x, -3, axis=0))
    np.testing.assert_array_equal(roll_rows(x, 0), x)
