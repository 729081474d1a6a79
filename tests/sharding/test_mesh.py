"""Meshes, and where leaves lie on them."""

import math
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from wemmu_jax.conversion.memory import flatten
from wemmu_jax.models.wemmu.config import BridgeConfig, Connector
from wemmu_jax.models.wemmu.modeling import WeMMUModel
from wemmu_jax.models.wemmu.published import published_wemmu
from wemmu_jax.ops.norms import RMSNorm
from wemmu_jax.sharding.mesh import check_heads, check_rows, make_mesh
from wemmu_jax.sharding.rules import (
    SMALL,
    parameter_shardings,
    parameter_spec,
    placed,
    rows_sharding,
)
from wemmu_jax.training.optimizer import Method, OptimizerConfig, make_optimizer


def test_meshes():
    eight = {"data": 8, "fsdp": 1, "sequence": 1, "tensor": 1}
    assert dict(make_mesh().shape) == eight
    assert dict(make_mesh(fsdp=4).shape) == eight | {"data": 2, "fsdp": 4}
    three = {"fsdp": 2, "sequence": 2, "tensor": 2}
    assert dict(make_mesh(**three).shape) == eight | {"data": 1} | three
    assert dict(make_mesh(data=4, tensor=2).shape) == eight | {"data": 4, "tensor": 2}
    assert dict(make_mesh(devices=jax.devices()[:1]).shape) == eight | {"data": 1}


@pytest.mark.parametrize("fsdp", [0, 3, 16])
def test_fsdp_that_does_not_divide_the_devices(fsdp):
    with pytest.raises(
        ValueError, match=rf"mesh.fsdp={fsdp} .* 8 devices \(cpu\); possible: \[1, 2, 4, 8\]"
    ):
        make_mesh(fsdp=fsdp)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (
            {"tensor": 3},
            r"mesh.tensor=3 does not divide 8 devices \(cpu\); possible: \[1, 2, 4, 8\]",
        ),
        (
            {"tensor": 2, "sequence": 2, "fsdp": 4},
            r"mesh.fsdp=4 does not divide the 2 that tensor=2 sequence=2 leaves of 8 .* possible: \[1, 2\]",
        ),
        (
            {"data": 3, "fsdp": 4},
            r"data 3 x fsdp 4 x sequence 1 x tensor 1 is not 8 devices \(cpu\); possible: mesh.data=2, or 0",
        ),
    ],
)
def test_sizes_that_do_not_multiply_to_the_devices(sizes, said):
    with pytest.raises(ValueError, match=said):
        make_mesh(**sizes)


def devices(count: int, *, slices: int = 1, processes: int = 1, platform: str = "tpu") -> list:
    """Of several slices and processes, in no order."""
    found = [
        mock.Mock(
            id=n,
            platform=platform,
            process_index=n * processes // count,
            slice_index=n * slices // count,
            device_kind="T",
        )
        for n in range(count)
    ]
    return found[::2] + found[1::2]


def test_data_alone_goes_from_slice_to_slice():
    grid = make_mesh(fsdp=2, tensor=2, devices=devices(16, slices=2)).devices
    assert grid.shape == (4, 2, 1, 2)
    for half, one in enumerate((grid[:2], grid[2:])):
        assert {device.slice_index for device in one.flat} == {half}
    with pytest.raises(
        ValueError,
        match=r"fsdp x sequence x tensor = 16 must lie inside a slice, .* its 8 devices; possible: \[1, 2, 4, 8\]",
    ):
        make_mesh(fsdp=8, tensor=2, devices=devices(16, slices=2))


def test_weights_are_cut_over_gpus_of_several_hosts():
    """Whose `slice_index` is their host's, in no order of the processes."""
    gpus = devices(16, slices=4, processes=4, platform="gpu")
    for gpu in gpus:
        gpu.slice_index = 3 - gpu.slice_index
    grid = make_mesh(fsdp=8, devices=gpus).devices
    assert [gpu.process_index for gpu in grid.flat] == [n // 4 for n in range(16)]


def test_rows_of_a_process_are_not_shared_with_another():
    make_mesh(fsdp=8, tensor=2, devices=devices(16, processes=8))
    with pytest.raises(
        ValueError, match=r"sequence x tensor = 4 must lie inside a process, .* 2 dev"
    ):
        make_mesh(sequence=2, tensor=2, devices=devices(16, processes=8))


@pytest.mark.parametrize(
    ("rows", "near"), [(1, "[8]"), (12, "[8, 16]"), (20, "[16, 24]"), (73, "[72, 80]")]
)
def test_rows_that_the_mesh_does_not_divide(rows, near):
    with pytest.raises(ValueError) as error:
        check_rows(rows, make_mesh(fsdp=4), key="batch.rows")
    assert str(error.value) == (
        f"batch.rows={rows} does not divide over 8 devices (mesh data 2 x fsdp 4); the nearest that do: {near}"
    )


def test_rows_that_it_divides():
    for rows in (8, 64, 2304):
        check_rows(rows, make_mesh(fsdp=2), key="batch.rows")
    check_rows(2, make_mesh(fsdp=2, sequence=2, tensor=2), key="batch.rows")


def test_heads_that_tensor_does_not_divide():
    config = published_wemmu(BridgeConfig())
    check_heads(config, make_mesh(tensor=2))
    with pytest.raises(
        ValueError,
        match=r"tensor=4 does not divide the 2 heads for keys of the LLM; possible: \[1, 2\]",
    ):
        check_heads(config, make_mesh(tensor=4))


# -- leaves


def spec(path: str, shape: tuple[int, ...], **sizes: int) -> PartitionSpec:
    return parameter_spec(path, shape, mesh={"fsdp": 1, "tensor": 1} | sizes)


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        # 1376 of 11008 are no whole tiles of 128, 256 of 2048 are.
        ("expert/layers/mlp/up_proj/kernel", (36, 2048, 11008), (None, "fsdp")),
        ("expert/layers/mlp/down_proj/kernel", (36, 11008, 2048), (None, None, "fsdp")),
        # 700 of 5600 are not even whole tiles of 8, 280 of 2240 are.
        ("dit/blocks/ffn/contract/kernel", (20, 5600, 2240), (None, None, "fsdp")),
        # Of two that are as good the shorter one, then the first.
        ("dit/blocks/ffn/expand/kernel", (20, 2240, 11200), (None, "fsdp")),
        ("position_mlp/gate_proj/kernel", (2048, 16384), ("fsdp",)),
        ("expert/layers/attention/q_proj/kernel", (36, 2048, 2048), (None, "fsdp")),
        # Never along the layers, even where they are whole tiles.
        ("dit/blocks/ffn/expand/kernel", (4096, 16, 32), (None, "fsdp")),
        # What does not divide gives way.
        ("position_mlp/table", (74, 74, 2048), (None, None, "fsdp")),
        ("vlm/text/lm_head/kernel", (151_937, 2048), (None, "fsdp")),
        ("expert/layers/input_layernorm/scale", (36, 2048), (None, "fsdp")),
        # Small ones, odd ones and scalars are everywhere.
        ("expert/norm/scale", (2048,), ()),
        ("vae_branch/input_proj/kernel", (1001, 333), ()),
        ("step", (), ()),
        # And so is the table that tokens are looked up in.
        ("vlm/text/embed_tokens/embedding", (151_936, 2048), ()),
    ],
)
def test_where_leaves_lie_along_fsdp(path, shape, expected):
    assert spec(path, shape, fsdp=8) == PartitionSpec(*expected)
    assert spec(path, shape) == PartitionSpec()


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("vlm/text/layers/attention/k_proj/kernel", (36, 2048, 256), (None, "fsdp", "tensor")),
        ("expert/layers/attention/q_proj/bias", (36, 2048), (None, "tensor")),
        ("expert/layers/attention/o_proj/kernel", (36, 2048, 2048), (None, "tensor", "fsdp")),
        ("expert/layers/mlp/down_proj/kernel", (36, 11008, 2048), (None, "tensor", "fsdp")),
        # What is added to the sum over the devices is not cut by them.
        ("vae_branch/layers/down_proj/bias", (36, 2048), (None, "fsdp")),
        ("dit/blocks/cross_attention/k_norm/scale", (36, 2048), (None, "tensor")),
        ("dit/blocks/ffn/depthwise/kernel", (20, 3, 3, 1, 11200), (None,) * 4 + ("tensor",)),
        ("vlm/vision/layers/attention/qkv/kernel", (32, 1280, 3840), (None, "fsdp")),
        ("dc_ae/encoder/stage_3/attention/query/kernel", (3, 512, 512), (None, "fsdp")),
        ("vlm/text/embed_tokens/embedding", (151_936, 2048), ()),
    ],
)
def test_where_leaves_lie_along_tensor(path, shape, expected):
    assert spec(path, shape, fsdp=8, tensor=2) == PartitionSpec(*expected)


def test_every_leaf_must_have_a_rule_and_features_that_tensor_divides():
    with pytest.raises(ValueError, match=r"no rule of .* says how 'expert/layers/new_layer' lies"):
        spec("expert/layers/new_layer/kernel", (1, 2), fsdp=8)
    with pytest.raises(
        ValueError, match=r"tensor=3 does not divide the 1024 features of a/up_proj"
    ):
        spec("a/up_proj/kernel", (512, 1024), tensor=3)


@pytest.mark.parametrize("connector", [Connector.LINEAR, Connector.VIT_2])
def test_every_leaf_at_the_real_size_has_its_place(connector):
    """Of 8.6 B values little but the words' embedding is whole on every device."""
    model = WeMMUModel(published_wemmu(BridgeConfig(connector=connector)))
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(model.init_backbones, key)
    shapes |= jax.eval_shape(model.init_bridge, key, shapes["vlm"]["text"])
    whole = cut = 0
    for path, leaf in flatten(shapes).items():
        size = math.prod(leaf.shape)
        found = spec(path, leaf.shape, fsdp=8, tensor=2)
        whole += size * (found == PartitionSpec())
        cut += size * ("fsdp" in found)
    assert whole < 0.32e9 and cut > 8.2e9


def test_moments_lie_as_their_parameters():
    import optax

    mesh = make_mesh(fsdp=8)
    params = {
        "expert": {
            "layers": {"up_proj": {"kernel": jax.ShapeDtypeStruct((2, 256, SMALL), jnp.float32)}}
        }
    }
    state = jax.eval_shape(optax.adamw(1.0).init, params)
    own = jax.tree.leaves(parameter_shardings(params, mesh))
    moments = [s for s in jax.tree.leaves(parameter_shardings(state, mesh)) if s.spec]
    assert len(moments) == 2 and all(s.spec == own[0].spec for s in moments)


@pytest.mark.parametrize("axes", [1, 2])
def test_a_norm_over_heads_is_cut_between_them(axes):
    """And not inside of each, from where its neighbours would have to move all they give and take."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return RMSNorm(1e-6, axes=axes, name="q_norm")(x)

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Block(name="attention")(x)

    mesh = make_mesh(fsdp=2, tensor=2)
    x = jnp.ones((4, 3, 6, 8)[: 2 + axes])
    with mesh, placed(mesh):
        traced = jax.make_jaxpr(Layer().init_with_output)(jax.random.key(0), x)
    places = [e.params["sharding"].spec for e in traced.eqns if "constraint" in str(e.primitive)]
    expected = (("data", "fsdp"), "sequence", "tensor", None)[: 2 + axes]
    assert [tuple(place) for place in places] == [expected] * 2


def test_a_process_has_a_block_of_the_rows():
    """Its first row is the number of the process times the rows of each, whatever order the devices are given in."""
    four = [mock.Mock(id=n, process_index=n % 2, slice_index=0) for n in range(4)]
    grid = make_mesh(fsdp=2, devices=four).devices
    assert [device.id for device in grid.flat] == [0, 2, 1, 3]


def test_rows_lie_over_all_devices_in_order():
    array = jax.device_put(np.arange(16), rows_sharding(make_mesh(fsdp=4)))
    shards = sorted(array.addressable_shards, key=lambda shard: shard.device.id)
    assert [shard.data.tolist() for shard in shards] == [[2 * i, 2 * i + 1] for i in range(8)]


def test_the_state_of_muon_lies_on_a_mesh_too():
    params = {"dit": {"output_proj": {"kernel": jnp.ones((64, 2048)), "bias": jnp.ones(2048)}}}
    config = OptimizerConfig(1e-3, warmup=1, steps=10, method=Method.MUON)
    state = make_optimizer(config).init(params)
    places = parameter_shardings(state, make_mesh(fsdp=8))
    cut = [
        jax.tree_util.keystr(path)
        for path, place in jax.tree_util.tree_leaves_with_path(places)
        if not place.is_fully_replicated
    ]
    [momentum] = cut  # neither counters nor the coefficients of its polynomial
    assert momentum.endswith("mu['dit']['output_proj']['kernel']")
