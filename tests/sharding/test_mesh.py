"""Meshes, and where leaves lie on them."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from wemmu_jax.sharding.mesh import check_rows, make_mesh
from wemmu_jax.sharding.rules import SMALL, parameter_shardings, parameter_spec, rows_sharding


def test_meshes():
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1}
    assert dict(make_mesh(fsdp=4).shape) == {"data": 2, "fsdp": 4}
    assert dict(make_mesh(devices=jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1}


@pytest.mark.parametrize("fsdp", [0, 3, 16])
def test_fsdp_that_does_not_divide_the_devices(fsdp):
    with pytest.raises(
        ValueError, match=rf"mesh.fsdp={fsdp} .* 8 devices \(cpu\); possible: \[1, 2, 4, 8\]"
    ):
        make_mesh(fsdp=fsdp)


@pytest.mark.parametrize(
    ("rows", "near"), [(1, "[8]"), (12, "[8, 16]"), (20, "[16, 24]"), (73, "[72, 80]")]
)
def test_rows_that_the_mesh_does_not_divide(rows, near):
    with pytest.raises(ValueError, match=f"of {rows} rows does not divide over 8 devices") as error:
        check_rows(rows, make_mesh(fsdp=4))
    assert str(error.value).endswith(f"the nearest that do: {near}")


def test_rows_that_it_divides():
    for rows in (8, 64, 2304):
        check_rows(rows, make_mesh(fsdp=2))


@pytest.mark.parametrize(
    ("path", "shape", "fsdp", "expected"),
    [
        ("expert/layers/mlp/up_proj/kernel", (36, 2048, 11008), 8, (None, None, "fsdp")),
        ("expert/layers/mlp/down_proj/kernel", (36, 11008, 2048), 8, (None, "fsdp")),
        ("position_mlp/gate_proj/kernel", (2048, 16384), 8, (None, "fsdp")),
        # Never along the layers, even where they are the longest axis.
        ("dit/blocks/x/kernel", (4096, 16, 32), 8, (None, None, "fsdp")),
        # The longest that does not divide gives way to the next.
        ("position_mlp/table", (74, 74, 2048), 8, (None, None, "fsdp")),
        ("vlm/text/lm_head/kernel", (151_937, 2048), 8, (None, "fsdp")),
        ("expert/layers/norm/scale", (36, 2048), 8, (None, "fsdp")),
        # Small ones, odd ones and scalars are everywhere.
        ("expert/norm/scale", (2048,), 8, ()),
        ("odd/kernel", (1001, 333), 8, ()),
        ("step", (), 8, ()),
        # And so is the table that tokens are looked up in.
        ("vlm/text/embed_tokens/embedding", (151_936, 2048), 8, ()),
        ("position_mlp/gate_proj/kernel", (2048, 16384), 1, ()),
    ],
)
def test_parameter_spec(path, shape, fsdp, expected):
    assert parameter_spec(path, shape, fsdp=fsdp) == PartitionSpec(*expected)


def test_moments_lie_as_their_parameters():
    import optax

    mesh = make_mesh(fsdp=8)
    params = {"expert": {"layers": {"kernel": jax.ShapeDtypeStruct((2, 256, SMALL), jnp.float32)}}}
    state = jax.eval_shape(optax.adamw(1.0).init, params)
    own = jax.tree.leaves(parameter_shardings(params, mesh))
    moments = [s for s in jax.tree.leaves(parameter_shardings(state, mesh)) if s.spec]
    assert len(moments) == 2 and all(s.spec == own[0].spec for s in moments)


def test_a_process_has_a_block_of_the_rows():
    """Its first row is the number of the process times the rows of each, whatever order the devices are given in."""
    devices = [mock.Mock(id=n, process_index=n % 2) for n in range(4)]
    grid = make_mesh(fsdp=2, devices=devices).devices
    assert [device.id for device in grid.flat] == [0, 2, 1, 3]


def test_rows_lie_over_all_devices_in_order():
    array = jax.device_put(np.arange(16), rows_sharding(make_mesh(fsdp=4)))
    shards = sorted(array.addressable_shards, key=lambda shard: shard.device.id)
    assert [shard.data.tolist() for shard in shards] == [[2 * i, 2 * i + 1] for i in range(8)]
