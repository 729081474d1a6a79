"""One step: its gradient, its loss on a fixed batch, and what a row's noise depends on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.conftest import last_state
from wemmu_jax.conversion.memory import flatten, nest
from wemmu_jax.models.wemmu.modeling import WeMMUModel
from wemmu_jax.training import step as step_lib
from wemmu_jax.training.curriculum import Loss
from wemmu_jax.training.optimizer import merge
from wemmu_jax.training.step import Trainer, row_losses


def relative(found, expected) -> float:
    """The largest relative L2 error of any leaf."""
    return max(
        float(np.linalg.norm(a - b) / np.linalg.norm(b))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    )


def batches(seen, count=2):
    """The first micro-batches of a run, on the device."""
    return [seen.run.batch(seen.run.data[number]) for number in range(count)]


def train_on(seen, state, fixed, steps: int) -> list[float]:
    """The loss of each of `steps` steps on the same micro-batches."""
    trainer, means = seen.run.trainer, []
    update = type(trainer).update.func(trainer)
    first = int(state.step)
    for step in range(first + 1, first + 1 + steps):
        gradients, losses = trainer.zero_gradients(), []
        for batch in fixed:
            gradients, found, _ = trainer.accumulate(
                gradients, state.params, seen.run.frozen, batch
            )
            losses.append(found)
        state, _ = update(state, gradients, losses, np.int32(step))
        means.append(float(np.mean(losses)))
    return means


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_loss_falls_on_a_fixed_batch(stage, request, config_of):
    """Contrastive in stage 1, plain in stage 2."""
    seen, _ = request.getfixturevalue(stage)
    stage = dataclasses.replace(
        seen.run.stage,
        optimizer=dataclasses.replace(seen.run.stage.optimizer, steps=1000, warmup=1),
    )
    trainer = Trainer(
        seen.run.trainer.model, stage, seen.run.trainer.mesh, seen.run.trainer.abstract
    )
    # The compiled gradient is the same: nothing of the schedule is in it.
    trainer.__dict__["accumulate"] = seen.run.trainer.accumulate
    fixed, params = batches(seen), jax.tree.map(jnp.asarray, nest(seen.trainable))
    watched = dataclasses.replace(seen, run=dataclasses.replace(seen.run, trainer=trainer))
    losses = train_on(watched, trainer.init_state(params), fixed, 20)
    assert losses[-1] < 0.9 * losses[0], losses
    assert np.mean(losses[-5:]) < np.mean(losses[5:10]) < np.mean(losses[:5])


@pytest.fixture(scope="module")
def accumulated(stage1):
    """(params, two micro-batches, accumulated gradients, losses) of stage 1."""
    seen, _ = stage1
    state = last_state(*stage1)
    both = batches(seen)
    gradients, losses = seen.run.trainer.zero_gradients(), []
    for batch in both:
        gradients, found, plain = seen.run.trainer.accumulate(
            gradients, state.params, seen.run.frozen, batch
        )
        losses.append((found, plain))
    return state.params, both, gradients, losses


def gradient_of_the_mean(model, seen, params, both):
    """(mean loss over the rows of all micro-batches, its gradient), as one differentiated program."""

    def mean(params, frozen, both):
        rows = [row_losses(model, seen.run.stage, merge(params, frozen), b)[0] for b in both]
        return jnp.mean(jnp.concatenate(rows))

    return jax.jit(jax.value_and_grad(mean))(params, seen.run.frozen, both)


def test_two_micro_batches_give_the_gradient_of_the_mean_and_remat_changes_nothing(
    stage1, accumulated
):
    """One program for both: the plain sum over 16 rows, with nothing recomputed in the backward pass."""
    seen, _ = stage1
    params, both, gradients, losses = accumulated
    assert [batch.images is None for batch in both] == [True, False]
    model = seen.run.trainer.model
    assert model.remat == "full"
    kept = WeMMUModel(model.config, dtype=model.dtype, remat="unrolled")
    value, expected = gradient_of_the_mean(kept, seen, params, both)
    assert float(np.mean([found for found, _ in losses])) == pytest.approx(float(value), rel=1e-6)
    assert relative(gradients, expected) < 1e-5


def test_contrastive_rows(stage1, accumulated):
    """What is minimised against the plain loss and literal negatives, rows of both micro-batches; of several noises the
    mean, each with the negative of its own number, behind one condition."""
    seen, _ = stage1
    params, both, _, losses = accumulated
    stage, contrasted = seen.run.stage, 0
    assert stage.draws == 4
    velocity_of = jax.jit(
        lambda tree, batch, noisy, sigma: step_lib.predicted_velocity(
            seen.run.trainer.model, tree, batch, noisy=noisy, sigma=sigma, seed=stage.seed
        )[0]
    )
    for batch, (found, plain) in zip(both, losses, strict=True):
        tree = merge(params, seen.run.frozen)
        shift = int(step_lib.partners(stage.seed, batch.number, 8))
        assert 1 <= shift < 8
        pulls, pushes = np.zeros((2, 8, stage.draws))
        for draw in range(stage.draws):
            numbers = stage.draws * batch.sample_numbers + jnp.uint32(draw)
            noise = step_lib.draw_flow_noise(stage.seed, numbers, batch.target.shape[1:])
            sigma = step_lib.draw_sigma(stage.seed, numbers, law=stage.time_law, shift=stage.shift)
            noisy = step_lib.noised(batch.target, noise, sigma)
            velocity = np.asarray(velocity_of(tree, batch, noisy, sigma))
            target = np.asarray(noise - batch.target)
            for row in range(8):
                pulls[row, draw] = np.mean((velocity[row] - target[row]) ** 2)
                other = (row + shift) % 8
                same = batch.picture_ids[other] == batch.picture_ids[row]
                if not same and not batch.unconditional[row]:
                    pushes[row, draw] = np.mean((velocity[row] - target[other]) ** 2)
        contrasted += int(np.sum(pushes > 0)) // stage.draws
        assert np.ptp(pulls, axis=1).min() > 1e-3, "the noises are the same"
        assert np.asarray(plain) == pytest.approx(pulls.mean(1), rel=1e-5)
        assert np.asarray(found) == pytest.approx((pulls - 0.05 * pushes).mean(1), rel=1e-5)
    assert contrasted >= 12


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_distillation_is_added_by_its_weight(stage1, monkeypatch, weight):
    """To what is minimised, and not to the flow matching part that logs show."""
    seen, _ = stage1
    told = np.linspace(0.5, 1.5, 8).astype(np.float32)

    def predicted(*_, noisy, **__):
        return noisy, told

    monkeypatch.setattr(step_lib, "predicted_velocity", predicted)
    stage = seen.run.stage
    bridge = dataclasses.replace(stage.bridge, distillation=weight)
    stage = dataclasses.replace(stage, loss=Loss.FLOW_MATCHING, bridge=bridge)
    losses, plain = row_losses(seen.run.trainer.model, stage, {}, batches(seen, 1)[0])
    np.testing.assert_allclose(losses - plain, weight * told, rtol=1e-4, atol=1e-5)


def test_rows_that_draw_the_same_picture_are_never_contrasted(stage1):
    """Whatever their tasks, captions and records: a data set may give one picture several captions."""
    seen, _ = stage1
    micro_batch = seen.run.data[0]
    assert len(set(micro_batch.keys)) == 8
    arrays = {name: micro_batch.arrays[name].copy() for name in micro_batch.arrays}
    for name in ("target", "picture_id"):
        arrays[name][1] = arrays[name][0]
    batch = seen.run.batch(dataclasses.replace(micro_batch, arrays=arrays))
    ids = np.asarray(batch.picture_ids)
    assert ids[0] == ids[1] and len(set(ids.tolist())) == 7
    for by in range(1, 8):
        _, contrasted = step_lib.negatives(batch.target, batch.picture_ids, batch.unconditional, by)
        pairs = {(row, (row + by) % 8) for row in range(8) if contrasted[row]}
        assert not pairs & {(0, 1), (1, 0)} and pairs


def test_gradients_flow_only_through_the_trainable_tree(stage1, accumulated):
    seen, _ = stage1
    assert flatten(accumulated[2]).keys() == seen.trainable.keys()
