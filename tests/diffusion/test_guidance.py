"""Guidance of the three kinds against the paper's sums. B rows of h x w x C."""

import jax.numpy as jnp
import numpy as np
import pytest

from wemmu_jax.diffusion.guidance import Branch, edit_guidance, guided, request_guidance

SHAPE = (2, 3, 4, 5)
VELOCITIES = dict(
    zip(
        Branch,
        np.random.default_rng(0).standard_normal((3, *SHAPE)).astype(np.float32),
        strict=True,
    )
)
U, REC, C = (VELOCITIES[b] for b in (Branch.NOTHING, Branch.SOURCE, Branch.REQUEST))


def combine(guidance):
    """The guided velocity, where each branch has its own velocity whatever the latents are; and rows asked for."""
    rows = []

    def velocity(latents, timestep):
        rows.append(len(latents))
        np.testing.assert_array_equal(latents, np.concatenate([LATENTS] * len(guidance.branches)))
        return jnp.concatenate([VELOCITIES[branch] for branch in guidance.branches])

    return np.asarray(guided(velocity, guidance)(jnp.asarray(LATENTS), jnp.float32(500))), rows


LATENTS = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)


@pytest.mark.parametrize("scale", [4.0, 3.0, 0.5])
def test_text_to_image_and_several_images(scale):
    """Eq. 5 and 7."""
    found, rows = combine(request_guidance(scale))
    np.testing.assert_allclose(found, U + scale * (C - U), rtol=1e-5, atol=1e-5)
    assert rows == [4]


@pytest.mark.parametrize(("image", "edit"), [(2.0, 3.0), (1.5, 4.0), (3.0, 3.0)])
def test_edit(image, edit):
    """Eq. 6."""
    found, _ = combine(edit_guidance(image=image, edit=edit))
    expected = U + image * (REC - U) + edit * (C - REC)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance", [request_guidance(1.0), edit_guidance(image=1.0, edit=1.0)])
def test_scale_one_is_the_conditional_alone(guidance):
    assert guidance.branches == (Branch.REQUEST,)
    found, rows = combine(guidance)
    np.testing.assert_array_equal(found, C)
    assert rows == [2]


def test_branches_of_no_weight_are_left_out():
    assert edit_guidance(image=1.0, edit=3.0).branches == (Branch.SOURCE, Branch.REQUEST)
    assert edit_guidance(image=2.0, edit=2.0).branches == (Branch.NOTHING, Branch.REQUEST)
    assert request_guidance(0.0).branches == (Branch.NOTHING,)


@pytest.mark.parametrize("guidance", [request_guidance(4.0), edit_guidance(image=2.0, edit=3.0)])
def test_weights_add_up_to_one(guidance):
    assert sum(weight for _, weight in guidance.weights) == pytest.approx(1)


def test_the_sum_is_in_float32():
    guidance = request_guidance(4.0)
    near = [jnp.full(SHAPE, value, jnp.bfloat16) for value in (1.0, 1.0078125)]
    found = guided(lambda *_: jnp.concatenate(near), guidance)(jnp.zeros(SHAPE), jnp.float32(0))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 1 + 4 * 0.0078125, rtol=1e-6)
