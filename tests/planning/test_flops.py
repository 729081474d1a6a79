"""Model FLOPs by formula against the numbers of the design, which were counted on the reference's modules."""

import math

import jax
import jax.numpy as jnp
import pytest

from wemmu_jax.data.buckets import Bucket
from wemmu_jax.models.wemmu.config import BridgeConfig, Connector, VAEStream, WeMMUConfig
from wemmu_jax.models.wemmu.published import published_wemmu
from wemmu_jax.models.wemmu.vae_branch import VAEBranch
from wemmu_jax.planning import flops
from wemmu_jax.planning.flops import Learns, sample_flops

TERA = 1e12
S512, S1024 = Bucket(512, 512), Bucket(1024, 1024)
MODEL = published_wemmu(BridgeConfig())
TEXT = MODEL.vlm.text
BESIDE = published_wemmu(BridgeConfig(vae_stream=VAEStream.EXPERT))
NO_VAE = published_wemmu(BridgeConfig(connector=Connector.NONE))


def near(value: float):
    """Within half of the last digit that the design prints, of three."""
    return pytest.approx(value, rel=5e-3)


@pytest.mark.parametrize(
    ("found", "printed"),
    [
        (flops.vision_flops(MODEL.vlm.vision, 324), 1.71),
        (flops.vision_flops(MODEL.vlm.vision, 1369), 7.68),
        (sum(flops.prefill_flops(TEXT, 128)), 0.71),
        (sum(flops.prefill_flops(TEXT, 128 + 324)), 2.54),
        (sum(flops.prefill_flops(TEXT, 128 + 2 * 324)), 4.40),
        (sum(flops.prefill_flops(TEXT, 128 + 1369)), 8.64),
        (sum(flops.prefill_flops(TEXT, 128 + 2 * 1369)), 17.1),
        (sum(flops.expert_flops(TEXT, 324, 128)), 1.84),
        (sum(flops.expert_flops(TEXT, 324, 128 + 2 * 324)), 1.90),
        (sum(flops.expert_flops(TEXT, 1369, 128)), 8.20),
        (sum(flops.expert_flops(TEXT, 1369, 128 + 2 * 1369)), 9.31),
        (flops.position_mlp_flops(MODEL, 324), 0.068),
        (flops.position_mlp_flops(MODEL, 1369), 0.287),
        (flops.dit_flops(MODEL.dit, 256, 324), 0.848),
        (flops.dit_flops(MODEL.dit, 1024, 1369), 3.614),
        (flops.encode_flops(MODEL.dc_ae, 512, 512), 1.29),
        (flops.encode_flops(MODEL.dc_ae, 576, 576), 1.64),
        (flops.encode_flops(MODEL.dc_ae, 1024, 1024), 5.18),
        (flops.encode_flops(MODEL.dc_ae, 1184, 1184), 6.92),
        # The design's 2.09 and 8.37, less five of the nine products over doubled pictures.
        (flops.decode_flops(MODEL.dc_ae, 512, 512), 1.85),
        (flops.decode_flops(MODEL.dc_ae, 1024, 1024), 7.38),
    ],
)
def test_forward_passes(found, printed):
    assert found / TERA == near(printed)


def sample(model: WeMMUConfig, bucket: Bucket, arity: int, *, dit=True, branch=True) -> float:
    learns = Learns(dit=dit, branch=branch)
    return sum(sample_flops(model, bucket, arity=arity, text=128, learns=learns).values()) / TERA


@pytest.mark.parametrize(
    ("bucket", "arity", "settings", "printed"),
    [
        (S512, 0, {"dit": False}, 9.4),
        (S512, 1, {"dit": False}, 18.5),
        (S512, 1, {"dit": False, "branch": False}, 16.6),
        (S1024, 0, {}, 42.2),
        (S1024, 1, {}, 85.3),
        (S1024, 1, {"branch": False}, 76.5),
        (S1024, 2, {}, 132.8),
        (S1024, 2, {"branch": False}, 113.1),
    ],
)
def test_training_samples(bucket, arity, settings, printed):
    assert sample(MODEL, bucket, arity, **settings) == near(printed)


@pytest.mark.parametrize(
    ("bucket", "arity", "dit", "printed"),
    [(S512, 1, False, 20.5), (S1024, 1, True, 96.0), (S1024, 2, True, 156.9)],
)
def test_training_samples_with_vae_tokens_beside_the_queries(bucket, arity, dit, printed):
    """The design's number lets the VAE tokens see the queries, which they do not."""
    queries = 324 if bucket == S512 else 1369
    hidden = 3 * 4 * arity * queries**2 * TEXT.hidden_size * TEXT.num_hidden_layers / TERA
    assert sample(BESIDE, bucket, arity, dit=dit) + hidden == near(printed)


def test_without_a_connector_no_source_is_encoded_and_the_prompt_is_shorter():
    learns = Learns(dit=False, branch=False)
    found = sample_flops(NO_VAE, S512, arity=1, text=128, learns=learns)
    assert found["VAE branch"] == 0
    assert found["DC-AE encode"] / TERA == near(1.29)
    assert found["LLM prefill"] / TERA == near(2.54)


def test_parts_are_the_real_ones_and_grow_with_sources():
    learns = Learns(dit=True, branch=True)
    one, two = (sample_flops(MODEL, S1024, arity=n, text=128, learns=learns) for n in (1, 2))
    assert two["ViT"] == 2 * one["ViT"] and two["DiT"] == one["DiT"]
    assert two["LLM prefill"] > one["LLM prefill"] and two["expert"] > one["expert"]


def test_what_is_frozen_has_no_gradients_of_its_weights():
    """Queries alone learn: through all else gradients pass. The ViT learns: the prompt's gradients lead to it."""
    queries = Learns(dit=False, branch=False, expert=False, position_mlp=False)
    cases = (Learns(dit=True, branch=False), queries, Learns(dit=True, branch=False, vision=True))
    usual, frozen, seeing = (
        sample_flops(NO_VAE, S1024, arity=1, text=128, learns=learns) for learns in cases
    )
    weights, seen = flops.expert_flops(TEXT, 1369, 128 + 1369)
    assert usual["expert"] - frozen["expert"] == weights and frozen["expert"] > 3 * seen
    assert 3 * frozen["Position MLP"] == 2 * usual["Position MLP"]
    assert 3 * frozen["DiT"] == 2 * usual["DiT"]
    assert seeing["ViT"] == 3 * usual["ViT"]
    linear, attention = flops.prefill_flops(TEXT, 128 + 1369)
    more = seeing["LLM prefill"] - usual["LLM prefill"]
    assert more == pytest.approx((linear + 2 * attention) * 1369 / (128 + 1369))


def test_draws_are_the_dits_alone_and_share_a_condition():
    bucket = {"arity": 1, "text": 128}
    one, four = (
        sample_flops(MODEL, S512, learns=Learns(dit=True, branch=True, draws=n), **bucket)
        for n in (1, 4)
    )
    rows, columns = MODEL.query_grid(512, 512)
    condition = 3 * flops.dit_flops(MODEL.dit, 0, rows * columns, draws=0)
    assert 0 < condition < 0.3 * one["DiT"]
    assert four == {**one, "DiT": pytest.approx(4 * one["DiT"] - 3 * condition)}


def test_buckets_of_a_stage_cost_about_the_same():
    wide = sample(MODEL, Bucket(512, 2048), 1)
    assert wide == pytest.approx(sample(MODEL, S1024, 1), rel=0.05) and wide != sample(
        MODEL, S1024, 1
    )


def products(jaxpr) -> int:
    """FLOPs of all products, those of a scan as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (summed, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in summed)
        inner = [
            one for one in jax.tree.leaves(list(equation.params.values())) if hasattr(one, "eqns")
        ]
        total += equation.params.get("length", 1) * sum(map(products, inner))
    return total


@pytest.mark.parametrize("connector", [Connector.LINEAR, Connector.VIT_2, Connector.VIT_6])
def test_the_branchs_gradient_is_all_products_of_its_own(connector):
    """Those of the weights and of every layer's input but the latents; the real module's, traced and not run."""
    model = published_wemmu(BridgeConfig(connector=connector))
    rows, columns, channels = 5, 7, model.dit.in_channels
    branch = VAEBranch(connector, TEXT.hidden_size, heads=16, max_grid=8)
    latents = jax.ShapeDtypeStruct((1, rows, columns, channels), jnp.float32)
    params = jax.eval_shape(branch.init, jax.random.key(0), latents)

    def loss(params, latents):
        return jnp.sum(jnp.sin(branch.apply(params, latents)))

    forward = products(jax.make_jaxpr(branch.apply)(params, latents).jaxpr)
    gradient = products(jax.make_jaxpr(jax.grad(loss))(params, latents).jaxpr)
    assert flops.branch_flops(model, rows * columns, learns=False) == forward
    assert flops.branch_flops(model, rows * columns, learns=True) == gradient
