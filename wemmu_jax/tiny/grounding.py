"""What the reading of an instruction has to tell: where the objects are that it names. B batch, L tokens.

A large VLM knows which object "the red star" is when it has read the words. The tiny one learns from answers, finds the
object while it answers, and leaves nothing of it to the expert, which sees what was read and no answer. So a linear map
of the values of its last layers, which does not ship, is asked for the place at the words and at the instruction's end.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wemmu_jax.miniworld.language import Named
from wemmu_jax.miniworld.scene import PLACES
from wemmu_jax.models.qwen2_5_vl.answers import TARGET_WEIGHTS
from wemmu_jax.models.qwen2_5_vl.config import TextConfig
from wemmu_jax.models.qwen2_5_vl.prompt import PromptEncoder

PICTURES = 2  # that an instruction may speak of
# The expert's layers can use what those of the VLM tell in the same or an earlier one, so the last alone is late.
LAYERS = 2
UNKNOWN = -1


def init_places(config: TextConfig) -> dict[str, jax.Array]:
    """A linear map of each of the last layers' values: kernel [LAYERS, K * H, PICTURES * places], and a bias."""
    values, told = config.num_key_value_heads * config.head_dim, PICTURES * len(PLACES)
    return {"kernel": jnp.zeros((LAYERS, values, told)), "bias": jnp.zeros((LAYERS, told))}


def place_labels(
    tokens: np.ndarray,
    weights: np.ndarray,
    named: Sequence[Sequence[Named | None]],
    prompts: PromptEncoder,
) -> np.ndarray:
    """Where what a row's turns name is, at the tokens that are asked for it.

    Of one picture the words tell it, and the end of the instruction tells it again; of two, only the whole instruction
    tells which picture they are of. What stands between is not asked: it may be words for another place.

    Args:
      tokens: int[L].
      weights: float[L], as targets (`models.qwen2_5_vl.answers`).
      named: of each turn, for each picture; turns that do not fit the row have no tokens.
      prompts: whose tokens they are.

    Returns:
      int32[L, PICTURES], numbers of places: at the last token of the words, and from the last one of the instruction to
      the answer; UNKNOWN elsewhere, and where nothing is named.

    Raises:
      ValueError: the words are not in their turn.
    """
    labels = np.full((len(tokens), PICTURES), UNKNOWN, np.int32)
    answers = np.pad(weights == TARGET_WEIGHTS["assistant"], 1)
    begins, ends = np.flatnonzero(np.diff(answers.astype(np.int8))).reshape(-1, 2).T
    for turn, since, until in zip(named, [0, *ends[:-1]], begins, strict=False):
        said = since + np.flatnonzero(weights[since:until] == TARGET_WEIGHTS["user"])
        for picture, one in enumerate(turn):
            if one is not None:
                place = PLACES.index(one.place)
                labels[said[-1] : until, picture] = place
                if len(turn) == 1:
                    labels[said[_last(tokens[said], one.words, prompts)], picture] = place
    return labels


def _last(tokens: np.ndarray, words: str, prompts: PromptEncoder) -> int:
    """The place of the words' last token, where they are said for the last time."""
    for text in (f" {words}", words):  # at the beginning of a text a word has another token
        sought = prompts.words(text)
        for start in range(len(tokens) - len(sought), -1, -1):
            if (tokens[start : start + len(sought)] == sought).all():
                return start + len(sought) - 1
    raise ValueError(f"expected {words!r} in {prompts.decode(tokens)!r}")


def place_losses(
    places: Mapping[str, jax.Array], values: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy, the mean over labels and layers, and the share that the last layer tells rightly.

    Args:
      places: of `init_places`.
      values: [layers, B, L, K, H] of the language model.
      labels: int32[B, L, PICTURES].
    """
    values = values[-LAYERS:].reshape(LAYERS, *labels.shape[:2], -1)
    told = jnp.einsum("nblv,nvp->nblp", values, places["kernel"])
    told = (told + places["bias"][:, None, None]).reshape(LAYERS, *labels.shape, len(PLACES))
    known = labels != UNKNOWN
    wanted = jnp.broadcast_to(jnp.where(known, labels, 0), told.shape[:-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(told, wanted)
    count = jnp.maximum(jnp.sum(known), 1)
    right = (jnp.argmax(told[-1], axis=-1) == labels) & known
    return jnp.sum(losses * known) / (LAYERS * count), jnp.sum(right) / count
