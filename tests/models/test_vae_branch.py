"""What a connector's parity with torch does not show."""

import jax
import jax.numpy as jnp

from wemmu_jax.models.wemmu.vae_branch import distillation_loss


def test_the_teacher_of_a_distilled_connector_learns_nothing_from_it():
    tokens, features = jax.random.normal(jax.random.key(0), (2, 2, 3, 8))
    valid = jnp.array([[True, True, False], [True, False, False]])

    def loss(tokens, features):
        return distillation_loss(tokens, features, valid).sum()

    student, teacher = jax.grad(loss, argnums=(0, 1))(tokens, features)
    assert jnp.abs(student).max() > 0.01 and not teacher.any()
