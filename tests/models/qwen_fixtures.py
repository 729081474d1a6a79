"""A random language model of two layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from wemmu_jax.conversion.memory import flatten, nest
from wemmu_jax.models.qwen2_5_vl.config import TextConfig
from wemmu_jax.models.qwen2_5_vl.text import TextModel

CONFIG = TextConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    mrope_section=(1, 1, 2),
    tie_word_embeddings=True,
)
MODEL = TextModel(CONFIG)
BATCH = 2
CLOSE = {"rtol": 0, "atol": 2e-5}


def normal(shape, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def random_params(model: TextModel, seed: int = 0) -> dict:
    """Random parameters, none of them constant; a matrix keeps the size of its input."""
    ids, valid = jnp.zeros((3, 1, 4), jnp.int32), jnp.ones((1, 4), bool)
    init = functools.partial(model.init, valid=valid, method="score")
    shapes = jax.eval_shape(init, jax.random.key(0), ids[0], ids)["params"]
    generator, leaves = np.random.default_rng(seed), {}
    for path, leaf in flatten(shapes).items():
        noise = generator.standard_normal(leaf.shape).astype(np.float32)
        if path.endswith("scale"):
            leaves[path] = 1 + 0.2 * noise
        else:
            size = leaf.shape[-2] ** -0.5 if path.endswith("kernel") else 0.3
            leaves[path] = np.float32(size) * noise
    return nest(leaves)


@functools.cache
def model_params() -> dict:
    return random_params(MODEL)


def picture_ids(length: int) -> jax.Array:
    """Ids whose three axes differ, as in a picture: int32[3, BATCH, length]."""
    place = np.arange(length)
    ids = np.stack([place, place // 3, place % 5]).astype(np.int32)
    return jnp.asarray(np.tile(ids[:, None], (1, BATCH, 1)))
