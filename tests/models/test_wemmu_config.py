"""Sizes of the published model, and what its config refuses."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest

from configs.wemmu_3b import STAGES, get_config
from tests.models import wemmu_fixtures as fixtures
from wemmu_jax.data.buckets import make_buckets
from wemmu_jax.models.dc_ae.config import DCAEConfig
from wemmu_jax.models.qwen2_5_vl.config import qwen2_5_vl_3b
from wemmu_jax.models.sana.config import SanaConfig
from wemmu_jax.models.wemmu.config import (
    BridgeConfig,
    Connector,
    Pathway,
    QueryKind,
    VAEStream,
    WeMMUConfig,
)
from wemmu_jax.models.wemmu.modeling import WeMMUModel
from wemmu_jax.training.optimizer import FreezeRule, count_parameters, split


@functools.cache
def real_config(**bridge) -> WeMMUConfig:
    return WeMMUConfig(qwen2_5_vl_3b(), SanaConfig(), DCAEConfig(), BridgeConfig(**bridge))


@functools.cache
def real_shapes(**bridge) -> dict:
    model = WeMMUModel(real_config(**bridge))

    def init(key):
        backbones = model.init_backbones(key)
        return {**backbones, **model.init_bridge(key, backbones["vlm"]["text"])}

    return jax.eval_shape(init, jax.random.key(0))


def billions(tree) -> float:
    return round(count_parameters(tree) / 1e9, 3)


def test_parameter_counts_at_the_real_sizes():
    """Those of design, section 2, to the last digit that it gives."""
    shapes = real_shapes()
    assert set(shapes) == {"vlm", "dit", "dc_ae", "expert", "vae_branch", "position_mlp"}
    assert billions(shapes["vlm"]) == 3.755
    assert billions(shapes["vlm"]["vision"]) == 0.669
    assert billions(shapes["expert"]) == 2.775
    assert billions(shapes["position_mlp"]) == 0.116
    assert billions(shapes["dit"]) == 1.605
    assert billions(shapes["dc_ae"]) == 0.312
    assert count_parameters(shapes["vae_branch"]) == 32 * 2048 + 2048
    assert round(count_parameters(shapes) / 1e9, 2) == 8.56


@pytest.mark.parametrize("stage", STAGES)
def test_trainable_counts_at_the_real_sizes(stage):
    rules = [FreezeRule(*rule) for rule in get_config(stage).trainable]
    trainable, frozen = split(real_shapes(), rules)
    learns = {"expert", "vae_branch", "position_mlp"}
    learns |= {"dit"} if stage != "stage1" else set()
    assert set(trainable) == learns and not learns & set(frozen)
    assert round(count_parameters(trainable) / 1e9, 2) == (2.89 if stage == "stage1" else 4.50)


@pytest.mark.parametrize(
    ("connector", "millions"), [(Connector.VIT_2, 116), (Connector.VIT_6, 318)]
)
def test_parameter_counts_of_the_simple_vit(connector, millions):
    model = WeMMUModel(real_config(connector=connector))
    shapes = jax.eval_shape(
        model.vae_branch.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1, 1, 32), jnp.float32)
    )
    assert round(count_parameters(shapes) / 1e6) == millions


def test_grids_at_the_real_sizes():
    config = real_config()
    assert config.query_grid(512, 512) == (18, 18)
    assert config.query_grid(1024, 1024) == (37, 37)
    assert config.query_grid(2048, 512) == (73, 18)
    assert config.source_grid(500, 333) == (18, 12)
    assert config.source_grid(5, 3) == (1, 1)
    for base, most in ((512, 384), (1024, 1408)):
        grids = [config.query_grid(b.height, b.width) for b in make_buckets(base, multiple=32)]
        assert max(map(math.prod, grids)) <= most


def test_sizes_that_cannot_be_drawn():
    config = real_config()
    with pytest.raises(ValueError, match=r"multiples of 32, found 500 x 512.*512 x 512"):
        config.query_grid(500, 512)
    with pytest.raises(ValueError, match="found 0 x 512"):
        config.query_grid(0, 512)
    with pytest.raises(ValueError, match=r"512 x 2112 pixels need a grid of 18 x 75 .* end at 74"):
        config.query_grid(512, 2112)
    with pytest.raises(ValueError, match="end at 74"):
        config.source_grid(4000, 10)


def test_bridge_config_there_and_back():
    config = BridgeConfig(queries=QueryKind.NOISY_SCALED, vae_stream=VAEStream.EXPERT)
    values = config.to_dict()
    assert values["queries"] == "noisy_scaled" and type(values["vae_stream"]) is str
    assert BridgeConfig.from_dict(values) == config


def test_features_straight_to_the_dit_go_with_nothing_else():
    with pytest.raises(ValueError, match="connector=none; found queries=noisy, connector=linear"):
        BridgeConfig(pathway=Pathway.VIT)


@pytest.mark.parametrize(
    "fields",
    [{"queries": "learnable_dynamic"}, {"pathway": "vit", "connector": "none"}],
)
def test_a_scale_of_noise_that_is_not_there(fields):
    BridgeConfig.from_dict(fields)
    with pytest.raises(ValueError, match="noise_scale is of noisy queries"):
        BridgeConfig.from_dict({**fields, "noise_scale": 0.3})


def test_bridge_config_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"unknown keys \['conector'\]; known: .*connector"):
        BridgeConfig.from_dict({"conector": "linear"})
    with pytest.raises(ValueError, match=r"vae_stream='llm'; expected one of .*frozen.*expert"):
        BridgeConfig.from_dict({"vae_stream": "llm"})


def test_backbones_that_do_not_fit_each_other():
    config = fixtures.small_config()
    dit = dataclasses.replace(config.dit, in_channels=5)
    with pytest.raises(ValueError, match="DiT reads 5 latent channels, the autoencoder writes 6"):
        dataclasses.replace(config, dit=dit)
