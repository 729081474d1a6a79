"""The freezing table, the schedule, and AdamW against torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from wemmu_jax.conversion.memory import flatten
from wemmu_jax.sharding.mesh import make_mesh
from wemmu_jax.sharding.rules import replicated
from wemmu_jax.training.curriculum import ALL_BUT_VLM_LEARN, BRIDGE_LEARNS
from wemmu_jax.training.optimizer import (
    FreezeRule,
    Method,
    OptimizerConfig,
    count_parameters,
    decayed,
    learns,
    make_optimizer,
    merge,
    split,
)

TREE = {
    "vlm": {"text": {"layers": {"kernel": np.ones((2, 3, 4))}}},
    "dc_ae": {"conv": {"kernel": np.ones((3, 3, 2, 2)), "bias": np.ones(2)}},
    "dit": {"table": np.ones((2, 5))},
    "expert": {"layers": {"q": {"kernel": np.ones((4, 4))}, "norm": {"scale": np.ones(4)}}},
}


def rules(*pairs):
    return tuple(FreezeRule(*pair) for pair in pairs)


def test_first_rule_that_matches_decides():
    table = rules(("expert/layers/norm", False), ("expert/", True), (".*", False))
    assert learns("expert/layers/q/kernel", table)
    assert not learns("expert/layers/norm/scale", table)
    assert not learns("dit/expert/kernel", table)
    trainable, frozen = split(TREE, table)
    assert list(flatten(trainable)) == ["expert/layers/q/kernel"]
    assert merge(trainable, frozen).keys() == TREE.keys()
    assert flatten(merge(trainable, frozen)).keys() == flatten(TREE).keys()
    assert count_parameters(trainable) == 16 and count_parameters(frozen) == 24 + 38 + 10 + 4


@pytest.mark.parametrize(
    ("table", "learning"),
    [(BRIDGE_LEARNS, {"expert"}), (ALL_BUT_VLM_LEARN, {"expert", "dit"})],
)
def test_tables_of_the_curriculum(table, learning):
    trainable, frozen = split(TREE, rules(*table))
    assert trainable.keys() == learning and frozen.keys() == TREE.keys() - learning


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="no rule matches expert/layers/q/kernel"):
        split(TREE, rules(("vlm/", False), ("dc_ae/", False), ("dit/", True)))


def test_an_idle_rule_is_an_error():
    with pytest.raises(ValueError, match=r"\['dti/'\] decide for no parameter"):
        split(TREE, rules(("dti/", False), (".*", True)))
    with pytest.raises(ValueError, match=r"\['expert/'\]"):
        split(TREE, rules((".*", True), ("expert/", False)))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("(", True), r"'\(' is no regex"),
        ((1, True), "1 is no regex"),
        ((".*", "false"), "must have true or false; found 'false'"),
        ((".*", 1), "must have true or false; found 1"),
    ],
)
def test_a_bad_rule_is_an_error(rule, message):
    with pytest.raises(ValueError, match=f"trainable: .*{message}"):
        FreezeRule(*rule)


def test_weight_decay_is_on_matrices_alone():
    assert {path for path, is_on in flatten(decayed(TREE)).items() if is_on} == {
        "vlm/text/layers/kernel",
        "dc_ae/conv/kernel",
        "expert/layers/q/kernel",
    }


# -- the schedule


def test_warmup_and_cosine():
    schedule = OptimizerConfig(learning_rate=1e-4, warmup=4, steps=104).schedule()
    found = [float(schedule(step)) for step in (0, 1, 4, 29, 54, 79, 104)]
    # From a fifth of the peak by fifths; then a cosine over 100 steps, a quarter of it at a time.
    quarter = (1 + np.sqrt(0.5)) / 2
    expected = [2e-5, 4e-5, 1e-4, 1e-4 * quarter, 5e-5, 1e-4 * (1 - quarter), 0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-11)
    steps = [float(schedule(step)) for step in range(104)]
    assert min(steps) > 0 and int(np.argmax(steps)) == 4


def test_no_warmup():
    schedule = OptimizerConfig(learning_rate=1.0, warmup=0, steps=10).schedule()
    expected = [(1 + np.cos(np.pi * step / 10)) / 2 for step in range(11)]
    np.testing.assert_allclose([schedule(s) for s in range(11)], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("warmup", "steps"), [(10, 10), (0, 0), (-1, 5)])
def test_a_warmup_that_does_not_fit(warmup, steps):
    with pytest.raises(ValueError, match=f"warm-up of {warmup} steps does not fit in {steps}"):
        OptimizerConfig(learning_rate=1.0, warmup=warmup, steps=steps)


# -- AdamW


def test_ten_steps_against_torch():
    """A small least squares problem; torch is given our schedule, its own clipping and AdamW."""
    rng = np.random.default_rng(0)
    inputs, outputs = rng.standard_normal((2, 16, 5)).astype(np.float32)
    start = {"kernel": rng.standard_normal((5, 5)), "bias": rng.standard_normal(5)}
    params = {"layer": {k: jnp.asarray(v, jnp.float32) for k, v in start.items()}}
    config = OptimizerConfig(
        learning_rate=0.05, warmup=2, steps=10, weight_decay=0.1, b1=0.9, b2=0.95, clip=1.0
    )

    def loss(p):
        return jnp.sum((inputs @ p["layer"]["kernel"] + p["layer"]["bias"] - outputs) ** 2)

    optimizer = make_optimizer(config)
    state, norms = optimizer.init(params), []
    theirs = {k: torch.nn.Parameter(torch.tensor(v, dtype=torch.float32)) for k, v in start.items()}
    groups = [
        {"params": [theirs["kernel"]], "weight_decay": 0.1},
        {"params": [theirs["bias"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    schedule = config.schedule()
    for step in range(10):
        gradients = jax.grad(loss)(params)
        norms.append(float(optax.global_norm(gradients)))
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        for group in reference.param_groups:
            group["lr"] = float(schedule(step))
        reference.zero_grad()
        x, y = torch.from_numpy(inputs), torch.from_numpy(outputs)
        ((x @ theirs["kernel"] + theirs["bias"] - y) ** 2).sum().backward()
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), 1.0)
        reference.step()
    assert min(norms) > 1  # clipped at every step
    for name, leaf in params["layer"].items():
        expected = theirs[name].detach().numpy()
        assert np.linalg.norm(leaf - expected) <= 1e-6 * np.linalg.norm(expected)
        assert np.linalg.norm(leaf - start[name]) > 0.1


def test_clipping():
    gradients = {"layer": {"kernel": jnp.full((2, 2), 3.0)}}  # of norm 6
    params = jax.tree.map(jnp.zeros_like, gradients)
    moments = {}
    for clip in (1.0, 12.0, None):
        config = OptimizerConfig(learning_rate=1.0, warmup=0, steps=10, clip=clip)
        optimizer = make_optimizer(config)
        _, state = optimizer.update(gradients, optimizer.init(params), params)
        moments[clip] = float(optax.tree_utils.tree_get(state, "mu")["layer"]["kernel"][0, 0])
    assert moments[1.0] == pytest.approx(0.1 * 3 / 6)
    assert moments[12.0] == moments[None] == pytest.approx(0.1 * 3)


def test_matrices_step_by_muon_and_nothing_else():
    """A Muon step moves a matrix alike in all directions: its singular values are nearly equal."""
    shapes = {
        "dense": (6, 4),
        "stacked": (2, 6, 4),
        "conv": (3, 3, 2, 4),
        "depthwise": (3, 3, 1, 4),
    }
    keys = iter(jax.random.split(jax.random.key(0), 8))
    params = {name: {"kernel": jax.random.normal(next(keys), s)} for name, s in shapes.items()}
    params["embed"] = {"embedding": jax.random.normal(next(keys), (6, 4))}
    gradients = jax.tree.map(lambda leaf: leaf * abs(leaf), params)
    config = OptimizerConfig(
        0.1, warmup=0, steps=10, weight_decay=0.0, clip=None, method=Method.MUON
    )
    optimizer = make_optimizer(config)
    steps, _ = optimizer.update(gradients, optimizer.init(params), params)

    def spread(step):
        values = np.linalg.svd(np.asarray(step).reshape(-1, 4), compute_uv=False)
        return values.max() / values.min()

    moved = {name: next(iter(leaves.values())) for name, leaves in steps.items()}
    matrices = [moved["dense"], *moved["stacked"], moved["conv"]]
    assert max(map(spread, matrices)) < 2
    for name in ("depthwise", "embed"):  # Adam's first step has one size everywhere
        assert np.ptp(np.abs(moved[name])) < 1e-5
    assert np.ptp(np.abs(moved["dense"])) > 0.01


def test_muon_steps_alike_on_one_device_and_on_four():
    """Layers are worked on apart where their number allows it; the steps and the state are the same."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    shapes = {"apart": (4, 6, 4), "three": (3, 6, 4), "dense": (6, 4)}
    params = {name: {"kernel": jax.random.normal(next(keys), s)} for name, s in shapes.items()}
    gradients = jax.tree.map(lambda leaf: leaf * abs(leaf), params)
    config = OptimizerConfig(0.1, warmup=0, steps=10, clip=None, method=Method.MUON)

    def step(devices: int):
        mesh = make_mesh(devices=jax.devices()[:devices])
        optimizer = make_optimizer(config, mesh)
        update = jax.jit(optimizer.update, out_shardings=replicated(mesh))
        state = jax.jit(optimizer.init, out_shardings=replicated(mesh))(params)
        return update.lower(gradients, state, params), update(gradients, state, params)

    (_, one), (program, four) = step(1), step(4)
    assert "all-gather" in program.compile().as_text()  # of steps that were made apart
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, four)
