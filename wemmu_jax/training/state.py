"""What an optimizer step changes."""

from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """The trainable side of a run; frozen weights are passed beside it and never copied.

    Attributes:
      step: int32[], optimizer steps taken.
      params: the trainable tree, float32.
      opt_state: the optimizer's moments, float32.
      ema: running mean of `params`, or None.
    """

    step: jax.Array
    params: Mapping
    opt_state: optax.OptState
    ema: Mapping | None

    @classmethod
    def create(
        cls, params: Mapping, optimizer: optax.GradientTransformation, *, ema: bool
    ) -> "TrainState":
        """A fresh state at step 0."""
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            ema=jax.tree.map(jnp.copy, params) if ema else None,
        )


def running_mean(mean: Mapping, params: Mapping, step: jax.Array, decay: float) -> Mapping:
    """The mean after `params`, those of the step after `step`. Early on it follows faster than by `decay`, or it would
    hold for long what training began with."""
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return optax.incremental_update(params, mean, 1 - decay)
