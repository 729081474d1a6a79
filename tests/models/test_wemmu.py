"""Properties of the bridge and of the composed model; parity is in `tests/parity/cases_bridge.py`."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.wemmu_3b import get_config
from tests.models import wemmu_fixtures as fixtures
from wemmu_jax.conversion.memory import flatten
from wemmu_jax.models.qwen2_5_vl.decode import Sampling, generate
from wemmu_jax.models.qwen2_5_vl.text import DecoderStack
from wemmu_jax.models.wemmu.config import (
    Connector,
    Pathway,
    QueryKind,
    VAEStream,
)
from wemmu_jax.models.wemmu.inputs import Shapes
from wemmu_jax.models.wemmu.modeling import Condition, WeMMUModel
from wemmu_jax.models.wemmu.queries import Queries, draw_noise
from wemmu_jax.sharding.mesh import make_mesh
from wemmu_jax.sharding.rules import rows_sharding
from wemmu_jax.training.optimizer import FreezeRule, merge, split

HEIGHT, WIDTH = 48, 32  # six rows and four columns of queries, three and two of latents
PADDING = 4  # queries of padding
SEED = 3
NUMBERS = np.array([7, 1000], np.uint32)
TIMESTEPS = np.array([371.37, 912.781], np.float32)
CLOSE = {"rtol": 0, "atol": 2e-5}

# Each kind of query with a connector and a stream; `vit_6` is `vit_6_distilled` without its loss. The slow test has
# all that are left.
COVERING = {
    (QueryKind.NOISY, Connector.LINEAR, VAEStream.FROZEN),
    (QueryKind.NOISY_SCALED, Connector.VIT_6_DISTILLED, VAEStream.EXPERT),
    (QueryKind.LEARNABLE_FIXED, Connector.NONE, VAEStream.EXPERT),
    (QueryKind.LEARNABLE_DYNAMIC, Connector.VIT_2, VAEStream.FROZEN),
}
ALL = set(itertools.product(QueryKind, Connector, VAEStream))


def model_of(*, remat: str = "none", **bridge) -> WeMMUModel:
    return WeMMUModel(fixtures.small_config(**bridge), dtype=jnp.float32, remat=remat)


def write_and_watch(
    model: WeMMUModel, params, prompt, sources, noise, *, padding: int
) -> tuple[Condition, jax.Array]:
    """Read and write: the condition, and the expert's hidden states [B, n * S + Q or Q, D]."""
    hidden = []

    def watch(call, args, kwargs, where):
        out = call(*args, **kwargs)
        if type(where.module) is DecoderStack and where.method_name == "__call__":
            hidden.append(out[0])
        return out

    grid = model.config.query_grid(HEIGHT, WIDTH)
    context = model.read(params, prompt, sources)
    with nn.intercept_methods(watch):
        condition = model.write(
            params, context, noise, grid=grid, query_tokens=grid[0] * grid[1] + padding
        )
    return condition, hidden[0]


def noise_of(model: WeMMUModel, numbers: np.ndarray = NUMBERS) -> jax.Array:
    return draw_noise(SEED, numbers, grid=model.config.query_grid(HEIGHT, WIDTH), width=model.width)


def stage_rules(stage: str) -> tuple[FreezeRule, ...]:
    return tuple(FreezeRule(*rule) for rule in get_config(stage).trainable)


@functools.cache
def outcome(model: WeMMUModel):
    """(condition, velocity, gradient of what learns in stage 2) of two rows with a source each."""
    request = fixtures.request(model.config, fixtures.GRIDS[:1])
    prompt, sources = fixtures.pack(fixtures.row_encoder(model.config), request)
    trainable, frozen = split(fixtures.random_params(model), stage_rules("stage2"))
    latents = np.random.default_rng(5).standard_normal((2, 3, 2, fixtures.LATENT_CHANNELS))

    def loss(trainable, frozen, prompt, sources, noise, latents):
        params = merge(trainable, frozen)
        context = model.read(params, prompt, sources)
        grid = model.config.query_grid(HEIGHT, WIDTH)
        condition = model.write(
            params, context, noise, grid=grid, query_tokens=grid[0] * grid[1] + PADDING
        )
        velocity = model.paint(params, latents, TIMESTEPS, condition)
        total = jnp.sum(jnp.square(velocity))
        if context.distillation is not None:
            total += jnp.sum(context.distillation)
        return total, (condition, velocity)

    gradient, (condition, velocity) = fixtures.quick_jit(jax.grad(loss, has_aux=True))(
        trainable, frozen, prompt, sources, noise_of(model), latents.astype(np.float32)
    )
    return condition, velocity, gradient


def check_combination(queries: QueryKind, connector: Connector, stream: VAEStream) -> None:
    model = model_of(queries=queries, connector=connector, vae_stream=stream)
    condition, velocity, gradient = outcome(model)
    count = 16 if queries is QueryKind.LEARNABLE_FIXED else 24
    assert condition.tokens.shape == (2, count + PADDING, 20)
    assert condition.valid.sum(axis=1).tolist() == [count, count]
    assert velocity.shape == (2, 3, 2, fixtures.LATENT_CHANNELS)
    assert np.isfinite(condition.tokens).all() and np.isfinite(velocity).all()
    parts = {"expert", "position_mlp", "dit"}
    parts |= {"queries"} if queries is not QueryKind.NOISY else set()
    parts |= {"vae_branch"} if connector is not Connector.NONE else set()
    assert set(gradient) == parts
    flat = flatten(gradient)
    bad = [path for path, leaf in flat.items() if not np.isfinite(leaf).all() or not leaf.any()]
    assert not bad, f"a gradient is zero or not finite: {bad}"


@pytest.mark.parametrize("combination", sorted(COVERING), ids="-".join)
def test_combination_runs_and_every_leaf_learns(combination):
    check_combination(*combination)


@pytest.mark.slow
@pytest.mark.parametrize("combination", sorted(ALL - COVERING), ids="-".join)
def test_all_other_combinations_too(combination):
    check_combination(*combination)


def test_features_straight_to_the_dit_hear_no_text_and_no_noise():
    model = model_of(connector=Connector.NONE, pathway=Pathway.VIT)
    params, grid = fixtures.random_params(model), model.config.query_grid(HEIGHT, WIDTH)
    assert "expert" not in params and "queries" not in params
    encoder = fixtures.row_encoder(model.config, (grid,))
    tokens = encoder.shapes.tokens

    def condition(texts, seed, numbers=NUMBERS):
        request = fixtures.request(model.config, (grid,), texts, seed=seed)
        context = model.read(params, *fixtures.pack(encoder, request, text_length=100))
        noise = noise_of(model, numbers)
        return model.write(params, context, noise, grid=grid, query_tokens=tokens)

    first = condition(fixtures.TEXTS, seed=0)
    assert first.valid.sum(axis=1).tolist() == [24, 24] and np.std(first.tokens[:, :24]) > 0.01
    same = condition(fixtures.TEXTS[::-1], seed=0, numbers=NUMBERS + 5)
    np.testing.assert_array_equal(first.tokens, same.tokens)
    other = condition(fixtures.TEXTS, seed=1)
    assert np.abs(first.tokens - other.tokens)[:, :24].max(axis=-1).min() > 1e-3

    prompt, _ = fixtures.pack(encoder, fixtures.request(model.config, ()), text_length=100)
    alone = model.write(
        params, model.read(params, prompt), noise_of(model), grid=grid, query_tokens=tokens
    )
    assert np.isfinite(alone.tokens).all()
    context = model.read(
        params, *fixtures.pack(encoder, fixtures.request(model.config, (grid, grid)))
    )
    with pytest.raises(ValueError, match="24 tokens; found 48"):
        model.write(params, context, noise_of(model), grid=grid, query_tokens=tokens)


def test_remat_changes_nothing():
    _, velocity, gradient = outcome(model_of())
    _, again, gradient_again = outcome(model_of(remat="full"))
    np.testing.assert_allclose(again, velocity, **CLOSE)
    for path, leaf in flatten(gradient).items():
        difference = np.abs(flatten(gradient_again)[path] - leaf).max()
        assert difference <= 2e-5 * np.abs(leaf).max(), path


# -- padding and batches


@functools.cache
def _padding_bench(stream: VAEStream):
    model = model_of(vae_stream=stream)
    params = fixtures.random_params(model)
    run = fixtures.quick_jit(functools.partial(write_and_watch, model), static_argnames="padding")
    request = fixtures.request(model.config)
    encoder = fixtures.row_encoder(model.config)
    prompt, sources = fixtures.pack(encoder, request, text_length=90)
    condition, _ = run(params, prompt, sources, noise_of(model), padding=0)
    return model, params, run, request, encoder, condition


@pytest.mark.parametrize("stream", VAEStream)
def test_padding_of_prompts_sources_and_queries_changes_nothing(stream):
    model, params, run, request, encoder, condition = _padding_bench(stream)
    wide = dataclasses.replace(
        encoder, shapes=Shapes(encoder.shapes.tokens + 5, encoder.shapes.slots + 2)
    )
    prompt, sources = fixtures.pack(wide, request, text_length=101)
    padded, _ = run(params, prompt, sources, noise_of(model), padding=7)
    count = condition.tokens.shape[1]
    assert padded.valid.tolist() == [[True] * count + [False] * 7] * 2
    np.testing.assert_allclose(padded.tokens[:, :count], condition.tokens, **CLOSE)


@pytest.mark.parametrize("stream", VAEStream)
def test_a_batch_equals_its_rows(stream):
    model, params, run, request, encoder, condition = _padding_bench(stream)
    for row in range(2):
        prompt, sources = fixtures.pack(encoder, request.rows(row), text_length=90)
        alone, _ = run(params, prompt, sources, noise_of(model, NUMBERS[[row]]), padding=0)
        np.testing.assert_allclose(alone.tokens[0], condition.tokens[row], **CLOSE)
    assert np.abs(condition.tokens[0] - condition.tokens[1]).max() > 0.01


def test_vae_tokens_do_not_depend_on_the_queries():
    """In the expert; in the LLM there are no queries."""
    model, params, run, request, encoder, _ = _padding_bench(VAEStream.EXPERT)
    inputs = fixtures.pack(encoder, request, text_length=90)
    (_, first), (_, second) = (
        run(params, *inputs, noise_of(model, numbers), padding=0)
        for numbers in (NUMBERS, NUMBERS + 1)
    )
    queries, vae = 24, 2 * encoder.shapes.tokens
    assert first.shape[1] == vae + queries
    np.testing.assert_array_equal(first[:, :vae], second[:, :vae])
    assert np.abs(first[:, vae:] - second[:, vae:]).max() > 0.1


def _forward(part: str, model: WeMMUModel):
    """(a part of the model that a program begins with, its arguments); shapes for those that other parts give."""
    params = fixtures.random_params(model)
    request = fixtures.request(model.config, fixtures.GRIDS[:1])
    prompt, sources = fixtures.pack(fixtures.row_encoder(model.config), request)
    grid = model.config.query_grid(HEIGHT, WIDTH)
    write = functools.partial(model.write, grid=grid, query_tokens=grid[0] * grid[1])
    noise = noise_of(model)
    context = jax.eval_shape(model.read, params, prompt, sources)
    condition = jax.eval_shape(write, params, context, noise)
    latents = jnp.ones((2, 3, 2, fixtures.LATENT_CHANNELS))
    vlm = params["vlm"]
    embed = (vlm, prompt.tokens, prompt.feature_index, sources.images)
    embeds = jax.eval_shape(model.embed_prompt, *embed)
    answer = functools.partial(
        generate,
        model.text,
        max_new_tokens=3,
        eos_ids=(),
        sampling=Sampling(),
        key=jax.random.key(0),
    )
    said = (prompt.position_ids, prompt.valid, prompt.next_position)
    return {
        "read": (model.read, (params, prompt, sources)),
        "write": (write, (params, context, noise)),
        "paint": (model.paint, (params, latents, TIMESTEPS, condition)),
        "encode": (model.encode, (params, np.zeros((1, HEIGHT, WIDTH, 3), np.uint8))),
        "decode": (model.decode, (params, latents)),
        "embed_prompt": (model.embed_prompt, embed),
        "generate": (answer, (vlm["text"], embeds, *said)),
    }[part]


PARTS = ("read", "write", "paint", "encode", "decode", "embed_prompt", "generate")


@pytest.mark.parametrize(("dtype", "full"), [(jnp.float32, True), (jnp.bfloat16, False)])
@pytest.mark.parametrize("part", PARTS)
def test_products_in_float32_are_multiplied_in_full(part, dtype, full):
    """On a TPU they would not be; which the program's text tells without one."""
    function, arguments = _forward(part, WeMMUModel(fixtures.small_config(), dtype=dtype))
    with jax.default_matmul_precision("default"):
        text = jax.jit(function).lower(*arguments).as_text()
    products = text.count("stablehlo.convolution") + text.count("stablehlo.dot_general")
    assert products > 10 and ("DEFAULT" in text) is not full


def test_so_are_those_of_their_gradients():
    model = WeMMUModel(fixtures.small_config(), dtype=jnp.float32)
    paint, (params, *others) = _forward("paint", model)

    def size(dit, others):
        return (paint({"dit": dit}, *others) ** 2).sum()

    with jax.default_matmul_precision("default"):
        forward, backward = (
            jax.jit(one).lower(params["dit"], others).as_text() for one in (size, jax.grad(size))
        )
    assert backward.count("dot_general") > 2 * forward.count("dot_general") > 20
    assert "DEFAULT" not in backward


# -- queries


def test_noise_depends_on_seed_and_sample_number_alone():
    numbers = np.array([5, 0, 2**31, 17, 3, 4, 9, 8], np.uint32)
    draw = functools.partial(draw_noise, grid=(3, 5), width=16)
    noise = draw(SEED, numbers)
    assert noise.shape == (8, 15, 16) and noise.dtype == jnp.float32
    np.testing.assert_array_equal(draw(SEED, numbers[::-1]), noise[::-1])
    np.testing.assert_array_equal(draw(SEED, numbers[2:3]), noise[2:3])
    np.testing.assert_array_equal(draw(jax.random.key(SEED), numbers), noise)
    assert np.isclose(draw(SEED + 1, numbers), noise).mean(axis=(1, 2)).max() < 0.02
    flat = np.asarray(noise).reshape(8, -1)
    assert np.abs(np.corrcoef(flat) - np.eye(8)).max() < 0.25
    assert abs(flat.mean()) < 0.05 and abs(flat.std() - 1) < 0.05


def test_noise_does_not_depend_on_the_mesh():
    numbers = np.arange(100, 116, dtype=np.uint32)
    draw = functools.partial(draw_noise, SEED, grid=(3, 5), width=16)
    assert len(jax.devices()) == 8
    for fsdp in (1, 4, 8):
        rows = rows_sharding(make_mesh(fsdp=fsdp))
        sharded = jax.jit(draw, out_shardings=rows)(jax.device_put(numbers, rows))
        np.testing.assert_array_equal(sharded, draw(numbers))


def test_scaled_noise_is_scaled_by_channel():
    noise = noise_of(model_of())
    queries = Queries(QueryKind.NOISY_SCALED, 32, fixed_grid=4, max_grid=11)
    start = queries.init(jax.random.key(0), noise, grid=(6, 4))
    np.testing.assert_array_equal(queries.apply(start, noise, grid=(6, 4)), noise)
    scale = np.linspace(0.5, 2, 32, dtype=np.float32)
    scaled = queries.apply({"params": {"scale": scale}}, noise, grid=(6, 4))
    np.testing.assert_array_equal(scaled, noise * scale)


def test_noise_has_the_scale_that_is_asked_for():
    noise = noise_of(model_of())
    for kind in (QueryKind.NOISY, QueryKind.NOISY_SCALED):
        queries = Queries(kind, 32, fixed_grid=4, max_grid=11, noise_scale=0.25)
        variables = queries.init(jax.random.key(0), noise, grid=(6, 4))
        np.testing.assert_array_equal(queries.apply(variables, noise, grid=(6, 4)), 0.25 * noise)
    model = model_of(noise_scale=0.25)
    np.testing.assert_array_equal(model.queries.apply({}, noise, grid=(6, 4)), 0.25 * noise)


def test_dynamic_learnable_queries_are_the_centre_of_their_table():
    noise = noise_of(model_of())
    table = np.random.default_rng(0).standard_normal((11, 11, 32)).astype(np.float32)
    queries = Queries(QueryKind.LEARNABLE_DYNAMIC, 32, fixed_grid=4, max_grid=11)
    drawn = queries.apply({"params": {"table": table}}, noise, grid=(6, 4))
    wanted = table[2:8, 3:7].reshape(24, 32)
    np.testing.assert_array_equal(drawn, np.stack([wanted, wanted]))


def test_fixed_learnable_queries_keep_their_grid():
    config = fixtures.small_config(queries=QueryKind.LEARNABLE_FIXED)
    assert config.query_grid(48, 32) == config.query_grid(16, 80) == (4, 4)
    assert config.source_grid(48, 32) == (6, 4)
    table = np.random.default_rng(0).standard_normal((4, 4, 32)).astype(np.float32)
    queries = Queries(QueryKind.LEARNABLE_FIXED, 32, fixed_grid=4, max_grid=11)
    drawn = queries.apply({"params": {"table": table}}, np.zeros((2, 16, 32)), grid=(4, 4))
    np.testing.assert_array_equal(drawn[1], table.reshape(16, 32))


# -- weights


def test_the_expert_starts_as_the_llm():
    model = model_of()
    llm = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.bfloat16), fixtures.random_params(model)["vlm"]["text"]
    )
    expert = fixtures.quick_jit(model.init_bridge)(jax.random.key(0), llm)["expert"]
    assert set(llm) - set(expert) == {"embed_tokens"}
    for path, leaf in flatten(expert).items():
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf, flatten(llm)[path].astype(jnp.float32))


def test_pictures_go_through_the_autoencoder_as_bytes():
    """0 to 255 becomes -1 to 1 and back, rounded and clipped; the autoencoder itself has its own tests."""
    model, seen = model_of(), []
    decoded = jnp.array([-3.0, -1.0, -1 + 1.4 / 127.5, 0.2, 1.0, 1.7])

    def stand_in(call, args, kwargs, where):
        if where.method_name not in ("encode", "decode"):
            return call(*args, **kwargs)
        seen.append(args[0])
        return decoded if where.method_name == "decode" else args[0][:, ::16, ::16]

    pixels = np.random.default_rng(0).integers(0, 256, (2, HEIGHT, WIDTH, 3), np.uint8)
    with nn.intercept_methods(stand_in):
        latents = model.encode({"dc_ae": {}}, pixels)
        drawn = model.decode({"dc_ae": {}}, latents)
    np.testing.assert_allclose(seen[0], pixels / 127.5 - 1, atol=1e-6)
    assert latents.shape == (2, 3, 2, 3) and seen[1] is latents
    assert drawn.dtype == jnp.uint8 and drawn.tolist() == [0, 0, 1, 153, 255, 255]


def test_a_grid_past_the_position_table_is_an_error():
    model = model_of()
    mlp = fixtures.random_params(model)["position_mlp"]
    with pytest.raises(ValueError, match="12 x 2 passes the learned 11 x 11 table"):
        model.position_mlp.apply({"params": mlp}, np.zeros((1, 24, 32)), grid=(12, 2))
    with pytest.raises(ValueError, match="24 tokens do not fit in 20"):
        model.position_mlp.apply({"params": mlp}, np.zeros((1, 20, 32)), grid=(6, 4))
