"""A fresh language model some of whose heads look a few tokens back, whatever stands there.

To tell which colour belongs to which shape, one layer has to bring words that stand together into one token, and a
later one has to find that token again; and to tell where a shape is, a picture's token has to know its own place, which
rotary positions give it only against others. Each is worth nothing without the rest, so that gradients hardly point to
any of it. Qwen2.5's biases of queries and keys are turned like all else, and can hold the positions from the beginning.
"""

import enum
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from wemmu_jax.models.qwen2_5_vl.config import TextConfig
from wemmu_jax.ops.rotary import inverse_frequencies


class Along(enum.Enum):
    """Which coordinates of M-RoPE count; in a text all are the same."""

    ALL = (0, 1, 2)
    ROWS = (1,)
    COLUMNS = (2,)


class Look(NamedTuple):
    """Where a head looks: `distance` positions back."""

    distance: int
    along: Along = Along.ALL


# Of each query head; None begins with content alone. Three rows, or columns, before a place of a picture, or of the
# queries' grid, there is a word of the prompt, another one for each row and column.
FIRST_LAYER = (Look(1), Look(3, Along.ROWS), Look(2), Look(3, Along.COLUMNS))
OTHER_LAYERS = (Look(1), None, Look(2), None)
# Channel pairs of a head, the fastest, that begin without content; the length of the keys' biases there; and how much
# larger the logit is at the distance than beside it.
FAST, LENGTH, MARGIN = 6, 6.0, 4.0


def begin_with_positions(text: Mapping, config: TextConfig) -> dict:
    """Fresh parameters of `TextModel` with heads that look back.

    Args:
      text: the tree, {'layers': {'attention': {'q_proj', 'k_proj', ...}, ...}, ...}; kernels [layers, D, heads * H].
      config: of the language model, with as many query heads as there are looks.

    Returns:
      The tree in which the fast channels of queries and keys have biases and no content.
    """
    others = [_biases(OTHER_LAYERS, config)] * (config.num_hidden_layers - 1)
    queries = jnp.stack([_biases(FIRST_LAYER, config), *others])
    keys = jnp.zeros((config.num_key_value_heads, 2, FAST)).at[:, 0].set(LENGTH)
    layers = text["layers"]
    attention = {
        **layers["attention"],
        "q_proj": _with_fast_biases(layers["attention"]["q_proj"], queries),
        "k_proj": _with_fast_biases(layers["attention"]["k_proj"], keys),
    }
    return {**text, "layers": {**layers, "attention": attention}}


def _biases(looks: tuple[Look | None, ...], config: TextConfig) -> jax.Array:
    """[heads, 2, FAST], of the queries of a layer."""
    speeds = inverse_frequencies(config.head_dim, theta=config.rope_theta)[:FAST]
    axis = jnp.repeat(jnp.arange(3), jnp.asarray(config.mrope_section), total_repeat_length=FAST)
    found = []
    for look in looks:
        if look is None:
            found.append(jnp.zeros((2, FAST)))
            continue
        counts = jnp.isin(axis, jnp.asarray(look.along.value))
        # A pair adds length * LENGTH * cos(speed * (distance - look.distance)) / sqrt(head_dim) to the logit.
        falls = jnp.sum(counts * (1 - jnp.cos(speeds)))
        length = MARGIN * math.sqrt(config.head_dim) / (LENGTH * falls)
        turned = -speeds * look.distance
        found.append(length * counts * jnp.stack([jnp.cos(turned), jnp.sin(turned)]))
    return jnp.stack(found)


def _with_fast_biases(projection: Mapping, fast: jax.Array) -> dict[str, jax.Array]:
    """`fast` [..., heads, 2, FAST] as biases of the fast pairs, whose kernels become zero."""

    def place(leaf: jax.Array, value: jax.Array | float) -> jax.Array:
        pairs = leaf.reshape(*leaf.shape[:-1], fast.shape[-3], 2, -1)
        return pairs.at[..., :FAST].set(value).reshape(leaf.shape)

    return {"kernel": place(projection["kernel"], 0.0), "bias": place(projection["bias"], fast)}
