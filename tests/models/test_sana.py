"""Sana's config, its conversion table and the properties of the transformer. Parity is in tests/parity."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SanaTransformer2DModel

from tests.models.wemmu_fixtures import quick_jit
from wemmu_jax.conversion.memory import flatten, nest
from wemmu_jax.conversion.sana import table
from wemmu_jax.models.sana import SanaConfig, SanaTransformer

# The published `transformer/config.json` of Sana 1.0 1.6B; 1.5 adds the newer keys.
SANA_1_0 = {
    "_class_name": "SanaTransformer2DModel",
    "_diffusers_version": "0.32.0.dev0",
    "attention_bias": False,
    "attention_head_dim": 32,
    "caption_channels": 2304,
    "cross_attention_dim": 2240,
    "cross_attention_head_dim": 112,
    "dropout": 0.0,
    "in_channels": 32,
    "mlp_ratio": 2.5,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "num_attention_heads": 70,
    "num_cross_attention_heads": 20,
    "num_layers": 20,
    "out_channels": 32,
    "patch_size": 1,
    "sample_size": 32,
}
SANA_1_5 = {
    **SANA_1_0,
    "guidance_embeds": False,
    "guidance_embeds_scale": 0.1,
    "interpolation_scale": None,
    "qk_norm": "rms_norm_across_heads",
    "timestep_scale": 1.0,
}
SANA_4_8B = {**SANA_1_5, "num_layers": 60}

SMALL = SanaConfig(
    in_channels=4,
    out_channels=4,
    num_layers=2,
    num_attention_heads=4,
    attention_head_dim=8,
    num_cross_attention_heads=2,
    cross_attention_head_dim=8,
    caption_channels=12,
)


def reference_shapes(hf: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of diffusers' tensors, without their memory."""
    sizes = {key: value for key, value in hf.items() if not key.startswith("_")}
    with torch.device("meta"):
        state = SanaTransformer2DModel(**sizes).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def our_shapes(config: SanaConfig) -> dict[str, tuple[int, ...]]:
    """Paths and shapes of our parameters, without their memory."""
    params = jax.eval_shape(
        SanaTransformer(config).init,
        jax.random.key(0),
        jnp.zeros((1, 2, 3, config.in_channels)),
        jnp.zeros((1,)),
        jnp.zeros((1, 5, config.caption_channels)),
        jnp.ones((1, 5), bool),
    )["params"]
    return {path: leaf.shape for path, leaf in flatten(params).items()}


# -- config


def test_the_published_configs_load():
    assert SanaConfig.from_hf(SANA_1_5) == SanaConfig()
    assert SanaConfig.from_hf(SANA_1_0) == SanaConfig(qk_norm=False)
    assert SanaConfig.from_hf(SANA_4_8B) == SanaConfig(num_layers=60)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", "PixArtTransformer2DModel"),
        ("attention_bias", True),
        ("cross_attention_dim", 2048),
        ("guidance_embeds", True),
        ("interpolation_scale", 2.0),
        ("norm_elementwise_affine", True),
        ("num_layers", 0),
        ("num_layers", "20"),
        ("mlp_ratio", None),
        ("norm_eps", -1e-6),
        ("out_channels", None),
        ("patch_size", 2),
        ("qk_norm", "layer_norm"),
        ("timestep_scale", 0.001),
        ("a_new_key", 1),
    ],
)
def test_an_unsupported_value_is_named(key, value):
    with pytest.raises(ValueError, match=f"^{key}: .*found {value!r}$"):
        SanaConfig.from_hf({**SANA_1_5, key: value})


@pytest.mark.parametrize("key", ["num_layers", "mlp_ratio", "cross_attention_dim"])
def test_a_missing_size_is_named(key):
    with pytest.raises(ValueError, match=f"^{key}: .*not found"):
        SanaConfig.from_hf({k: v for k, v in SANA_1_5.items() if k != key})


# -- sizes and names


@pytest.mark.parametrize("hf", [SANA_1_0, SANA_1_5], ids=["1.0", "1.5"])
def test_the_table_covers_the_reference_and_us(hf):
    config = SanaConfig.from_hf(hf)
    rows = table(config)
    covered = [(name, row.shape) for row in rows for name in row.sources()]
    assert len(covered) == len(dict(covered))
    assert dict(covered) == reference_shapes(hf)
    targets = [(row.target, row.target_shape) for row in rows]
    assert len(targets) == len(dict(targets))
    assert dict(targets) == our_shapes(config)


@pytest.mark.parametrize(
    ("hf", "count"),
    [(SANA_1_0, 1_604_462_752), (SANA_1_5, 1_604_641_952), (SANA_4_8B, 4_721_825_952)],
    ids=["1.0", "1.5", "4.8B"],
)
def test_real_sizes_have_the_reference_number_of_parameters(hf, count):
    assert sum(map(math.prod, reference_shapes(hf).values())) == count
    assert sum(map(math.prod, our_shapes(SanaConfig.from_hf(hf)).values())) == count


# -- properties


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def velocity(params, inputs, *, config=SMALL, dtype=jnp.float32):
    return SanaTransformer(config, dtype=dtype).apply({"params": params}, *inputs)


@functools.partial(quick_jit, static_argnames="remat")
@functools.partial(jax.value_and_grad, argnums=0)
def loss_and_gradient(params, inputs, remat):
    out = SanaTransformer(SMALL, remat=remat).apply({"params": params}, *inputs)
    return jnp.mean(jnp.square(out))


@functools.cache
def small() -> tuple[dict, tuple]:
    """Parameters without constants, and latents, timesteps, condition and its mask of three rows."""
    rng = np.random.default_rng(0)
    inputs = (
        rng.standard_normal((3, 4, 6, 4), np.float32),
        np.array([12.5, 480.25, 990.75], np.float32),
        rng.standard_normal((3, 7, 12), np.float32),
        np.arange(7) < np.array([[3], [7], [5]]),
    )
    params = jax.jit(SanaTransformer(SMALL).init)(jax.random.key(0), *inputs)["params"]
    params = jax.tree.map(
        lambda leaf: leaf + 0.2 * rng.standard_normal(leaf.shape, np.float32), params
    )
    return params, inputs


def relative(found, expected) -> float:
    found, expected = np.asarray(found), np.asarray(expected)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_padding_changes_nothing():
    params, (latents, timestep, condition, valid) = small()
    longer = np.pad(condition, ((0, 0), (0, 4), (0, 0)))
    longer_valid = np.pad(valid, ((0, 0), (0, 4)))
    longer[~longer_valid] = 5.0
    found = velocity(params, (latents, timestep, longer, longer_valid))
    assert relative(found, velocity(params, (latents, timestep, condition, valid))) < 1e-6


def test_a_batch_equals_its_rows():
    params, inputs = small()
    rows = [velocity(params, tuple(x[i : i + 1] for x in inputs))[0] for i in range(3)]
    assert relative(np.stack(rows), velocity(params, inputs)) < 1e-5


def test_each_input_matters():
    params, (latents, timestep, condition, valid) = small()
    before = velocity(params, (latents, timestep, condition, valid))
    for changed in (
        (latents[:, ::-1], timestep, condition, valid),
        (latents, timestep + 0.5, condition, valid),
        (latents, timestep, condition[::-1], valid),
        (latents, timestep, condition, valid[::-1]),
    ):
        moved = np.abs(velocity(params, changed) - before).max(axis=(1, 2, 3))
        assert (moved[[0, 2]] > 1e-3).all(), moved


def test_remat_changes_neither_value_nor_gradient():
    params, inputs = small()
    plain = loss_and_gradient(params, inputs, "none")
    for policy in ("full", "named", "without_up", "offload"):
        again = loss_and_gradient(params, inputs, policy)
        errors = jax.tree.map(relative, again, plain)
        assert max(jax.tree.leaves(errors)) < 1e-5, (policy, errors)


def test_unknown_remat_policy_is_named():
    params, inputs = small()
    with pytest.raises(ValueError, match="'some'"):
        loss_and_gradient(params, inputs, "some")


def test_gradients_are_finite_where_linear_attention_sees_nothing():
    """All queries zero: numerator and denominator vanish together."""
    params, inputs = small()
    blind = flatten(params)
    blind["blocks/self_attention/q_norm/scale"] = jnp.zeros((2, SMALL.width))
    loss, gradient = loss_and_gradient(nest(blind), inputs, "none")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((loss, gradient)))


@pytest.mark.parametrize(
    ("qk_norm", "weights"),
    [(True, jnp.float32), (False, jnp.bfloat16)],
    ids=["1.5, trained", "1.0, frozen"],
)
def test_bfloat16_stays_near_float32(qk_norm, weights):
    params, inputs = small()
    config = dataclasses.replace(SMALL, qk_norm=qk_norm)
    stored = jax.tree.map(lambda leaf: leaf.astype(weights), params)
    half = velocity(stored, inputs, config=config, dtype=jnp.bfloat16)
    assert half.dtype == jnp.float32
    assert 1e-4 < relative(half, velocity(params, inputs, config=config)) < 3e-2
