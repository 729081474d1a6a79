"""DC-AE: its config, its table, its errors and what does not depend on a reference's numbers."""

import inspect
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC

from tests.parity.cases_dc_ae import SMALL, hf_config
from tests.parity.harness import relative_l2
from wemmu_jax.conversion.dc_ae import table
from wemmu_jax.conversion.memory import flatten
from wemmu_jax.models.dc_ae import DCAE, DCAEConfig, blocks, config, modeling, strips
from wemmu_jax.sharding.mesh import make_mesh
from wemmu_jax.sharding.rules import placed, rows_sharding

PUBLISHED = hf_config(
    kinds=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    widths=(128, 256, 512, 512, 1024, 1024),
    encoder_layers=(2, 2, 2, 3, 3, 3),
    decoder_layers=(3, 3, 3, 3, 3, 3),
    head_dim=32,
    latents=32,
)


def shapes_of(model: DCAE) -> dict:
    ratio = model.config.ratio
    pixels = jax.ShapeDtypeStruct((1, ratio, ratio, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), pixels)["params"]


@pytest.fixture(scope="module")
def small() -> tuple[DCAE, dict]:
    """A small DC-AE with no constant parameter."""
    model = DCAE(DCAEConfig.from_hf(SMALL))
    leaves, tree = jax.tree.flatten(shapes_of(model))
    rng = np.random.default_rng(3)
    drawn = [rng.standard_normal(leaf.shape) for leaf in leaves]
    drawn = [
        noise / np.prod(noise.shape[:-1]) ** 0.5 if noise.ndim > 2 else 1 + 0.2 * noise
        for noise in drawn
    ]
    return model, jax.tree.unflatten(tree, [jnp.asarray(x, jnp.float32) for x in drawn])


def test_published_config_is_the_default():
    assert DCAEConfig.from_hf(PUBLISHED) == DCAEConfig()
    assert DCAEConfig().ratio == 32


def test_missing_keys_take_the_defaults_of_diffusers():
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(AutoencoderDC.__init__).parameters.items()
        if name != "self"
    }
    assert dict(config._CLASS_DEFAULTS) == defaults


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("in_channels", 4, ["in_channels", "3", "4"]),
        ("downsample_block_type", "pixel_unshuffle", ["'conv'", "'pixel_unshuffle'"]),
        ("upsample_block_type", "pixel_shuffle", ["'interpolate'", "'pixel_shuffle'"]),
        ("decoder_norm_types", ["batch_norm", "rms_norm"] * 2, ["'rms_norm'", "'batch_norm'"]),
        ("decoder_act_fns", "relu", ["decoder_act_fns", "'silu'", "'relu'"]),
        ("decoder_conv_act_fn", "silu", ["decoder_conv_act_fn", "'relu'", "'silu'"]),
        ("encoder_out_shortcut", False, ["encoder_out_shortcut", "True", "False"]),
        ("decoder_in_shortcut", False, ["decoder_in_shortcut", "True", "False"]),
        ("encoder_block_types", "UNetBlock", ["encoder_block_types", "ResBlock", "'UNetBlock'"]),
        ("encoder_layers_per_block", [0, 1, 1, 1], ["encoder stage 0", "layers_per_block", "0"]),
        ("decoder_layers_per_block", [1, 1, 1], ["decoder_layers_per_block", "4", "[1, 1, 1]"]),
        ("decoder_qkv_multiscales", [[], [], [4], [5]], ["qkv_multiscales", "odd", "[4]"]),
        ("encoder_block_out_channels", [8, 16, 24, 32], ["multiple", "16", "24"]),
        ("latent_channels", 12, ["latent_channels = 12", "32"]),
        ("attention_head_dim", 64, ["attention_head_dim = 64", "16"]),
    ],
)
def test_foreign_config_is_an_error(key, value, words):
    with pytest.raises(ValueError) as error:
        DCAEConfig.from_hf({**SMALL, key: value})
    assert all(word in str(error.value) for word in words), str(error.value)


def test_stages_of_the_two_sides_must_be_as_many():
    shorter = {name: value[:3] for name, value in SMALL.items() if name.startswith("decoder_block")}
    shorter |= {
        name: SMALL[name][:3] for name in ("decoder_layers_per_block", "decoder_qkv_multiscales")
    }
    with pytest.raises(ValueError, match="same number of stages, at least one, found 4 and 3"):
        DCAEConfig.from_hf({**SMALL, **shorter})


@pytest.mark.parametrize("hf", [SMALL, PUBLISHED], ids=["small", "published"])
def test_table_covers_both_sides(hf):
    with torch.device("meta"):
        reference = AutoencoderDC(**hf)
    ours = DCAEConfig.from_hf(hf)
    rows = table(ours)
    sources = [(name, row.shape) for row in rows for name in row.sources()]
    assert sorted(sources) == sorted(
        (name, tuple(tensor.shape)) for name, tensor in reference.state_dict().items()
    )
    leaves = {path: leaf.shape for path, leaf in flatten(shapes_of(DCAE(ours))).items()}
    assert {row.target: row.target_shape for row in rows} == leaves
    assert len(rows) == len(leaves)


def test_published_size():
    params = shapes_of(DCAE(DCAEConfig()))
    count = {side: sum(leaf.size for leaf in jax.tree.leaves(params[side])) for side in params}
    assert count == {"encoder": 153_027_104, "decoder": 159_223_171}
    assert round(sum(count.values()) / 1e9, 3) == 0.312


@pytest.mark.parametrize("size", [(20, 16), (16, 20), (4, 4)])
def test_sizes_that_the_stages_do_not_divide(small, size):
    model, params = small
    with pytest.raises(ValueError, match=f"multiples of 8, found {size[0]}x{size[1]}"):
        model.apply({"params": params}, jnp.zeros((1, *size, 3)), method="encode")


def test_wrong_channels(small):
    model, params = small
    with pytest.raises(ValueError, match=r"expected pixels \[B, H, W, 3\], found \(1, 16, 16, 4\)"):
        model.apply({"params": params}, jnp.zeros((1, 16, 16, 4)), method="encode")
    with pytest.raises(ValueError, match=r"expected latents \[B, h, w, 8\], found \(1, 2, 2, 4\)"):
        model.apply({"params": params}, jnp.zeros((1, 2, 2, 4)), method="decode")


@pytest.mark.parametrize(("method", "half"), [("encode", "encoder"), ("decode", "decoder")])
def test_each_half_alone_in_both_types(small, method, half):
    """With its own parameters only: a batch equals its rows; bfloat16 is finite and near float32."""
    model, params = small
    shape = (2, 32, 48, 3) if method == "encode" else (2, 4, 6, 8)
    x = np.tanh(np.random.default_rng(5).standard_normal(shape)).astype(np.float32)

    def compiled(model: DCAE):
        half_params = {half: jax.tree.map(lambda leaf: leaf.astype(model.dtype), params[half])}
        run = jax.jit(lambda p, x: model.apply({"params": p}, x, method=method))
        return lambda x: run(half_params, x)

    run = compiled(model)
    whole = run(x)
    assert whole.shape == ((2, 4, 6, 8) if method == "encode" else (2, 32, 48, 3))
    rows = np.concatenate([run(x[i : i + 1]) for i in range(2)])
    assert relative_l2(rows, whole) <= 1e-6
    assert relative_l2(rows[:1], whole[1:]) > 0.1

    rounded = compiled(DCAE(model.config, jnp.bfloat16))(x)
    assert whole.dtype == rounded.dtype == jnp.float32
    assert np.isfinite(rounded).all()
    assert 1e-4 < relative_l2(rounded, whole) < 0.02


@pytest.mark.parametrize("channels", [4, 8, 16, 32])
def test_on_a_tpu_the_mean_of_squares_is_a_convolution(channels, monkeypatch):
    x = jax.random.normal(jax.random.key(0), (2, 6, 4, 8))
    expected = blocks.average_groups(blocks.space_to_depth(x), channels)
    monkeypatch.setattr(blocks, "current_platform", lambda: "tpu")
    np.testing.assert_allclose(blocks.mean_of_squares(x, channels), expected, rtol=0, atol=1e-6)
    text = jax.jit(lambda x: blocks.mean_of_squares(x, channels)).lower(x).as_text()
    assert "stablehlo.convolution" in text


@pytest.mark.parametrize("platform", ["tpu", "cpu"])
@pytest.mark.parametrize(("channels", "lanes"), [(256, 128), (96, 32), (384, 128)])
def test_grouped_layers_fill_the_lanes(platform, channels, lanes, monkeypatch):
    """The same numbers from blocks of 128 channels; where these do not divide, from the groups themselves."""
    x, kernel = draw((2, 3, channels), (32, channels))
    monkeypatch.setattr(blocks, "current_platform", lambda: "gpu")
    expected = blocks.grouped_dense(x, kernel)
    monkeypatch.setattr(blocks, "current_platform", lambda: platform)
    np.testing.assert_allclose(blocks.grouped_dense(x, kernel), expected, rtol=0, atol=1e-5)
    text = jax.jit(blocks.grouped_dense).lower(x, kernel).as_text()
    assert (f"tensor<{lanes}x{lanes}xf32>" in text) == (lanes == 128)


@pytest.mark.parametrize(
    ("rows", "width", "count"),
    [(2, 64, 4), (6, 96, 4), (3, 64, 8), (4, 48, 2), (8, 64, 1), (2, 40, 1)],
)
def test_on_a_tpu_a_device_convolves_eight_strips_or_more(small, rows, width, count, monkeypatch):
    """The same latents; eight rows need no strips, and 40 columns are no four strips that can be halved twice."""
    model, params = small
    pixels = draw((rows, 24, width, 3))[0]
    expected = model.apply({"params": params}, pixels, method="encode")
    monkeypatch.setattr(strips, "current_platform", lambda: "tpu")
    cut = mock.Mock(side_effect=strips.cut)
    monkeypatch.setattr(modeling, "cut", cut)
    found = model.apply({"params": params}, pixels, method="encode")
    assert cut.call_args.args[1] == count
    assert relative_l2(found, expected) <= 1e-6


def test_strips_are_counted_on_a_device_and_stay_there(small, monkeypatch):
    """16 rows on 8 devices are two on each."""
    model, params = small
    pixels = draw((16, 24, 64, 3))[0]
    expected = model.apply({"params": params}, pixels, method="encode")
    monkeypatch.setattr(strips, "current_platform", lambda: "tpu")
    mesh = make_mesh(data=2, fsdp=4, sequence=1, tensor=1)
    rows = rows_sharding(mesh)

    def encode(params, pixels):
        with placed(mesh):
            return model.apply({"params": params}, pixels, method="encode")

    with placed(mesh):
        assert strips.count_strips(pixels.shape, 4) == 4
    program = jax.jit(encode, in_shardings=(None, rows), out_shardings=rows)
    compiled = program.lower(params, pixels).compile()
    assert relative_l2(compiled(params, pixels), expected) <= 1e-6
    assert not re.search("all-gather|all-to-all|collective-permute|all-reduce", compiled.as_text())


def draw(*shapes: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
