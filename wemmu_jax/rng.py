"""Named random streams. All randomness of the project is a pure function of (seed, stream, number).

    root = jax.random.key(seed);  stream = fold_in(root, stream id);  key = fold_in(stream, number)

`number` is the global sample number (samples seen before this one), or the step where something belongs to a
step. So a sample's noise does not depend on the mesh, the micro-batch or the host that computes it.
"""

import enum
from collections.abc import Callable

import jax
import jax.numpy as jnp


class Stream(enum.IntEnum):
    """Stream ids; appended to, never renumbered, or old seeds stop giving the same numbers."""

    INIT = 0
    QUERY_NOISE = 1
    FLOW_NOISE = 2
    FLOW_TIME = 3
    NEGATIVES = 4
    SAMPLER = 5


def stream_key(seed: int | jax.Array, stream: Stream) -> jax.Array:
    """The key of a stream. `seed` is an integer or an already typed root key."""
    is_key = isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)
    return jax.random.fold_in(seed if is_key else jax.random.key(seed), stream)


def per_sample(
    key: jax.Array, numbers: jax.Array, draw: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """`draw(key of sample n)` for every n in `numbers` uint32[B]; returns [B, ...]."""
    return jax.vmap(lambda number: draw(jax.random.fold_in(key, number)))(numbers)
