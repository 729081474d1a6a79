"""Fresh heads that look back: in a text to the words before, in a picture to a word for each row and column."""

import jax
import numpy as np
import pytest

from wemmu_jax.miniworld.conversations import corpus, draw_description
from wemmu_jax.models.qwen2_5_vl.text import Pattern
from wemmu_jax.models.wemmu.modeling import WeMMUModel
from wemmu_jax.tiny import vlm
from wemmu_jax.tiny.backbones import write_configs
from wemmu_jax.tiny.positions import begin_with_positions

SIZE = (48, 32)  # 3 rows and 2 columns


@pytest.fixture(scope="module")
def looks(tmp_path_factory):
    """Attention [layers, rows, heads, L, L] before and after, and which tokens are a picture's."""
    root = tmp_path_factory.mktemp("tiny")
    write_configs(root, corpus(50))
    data = vlm.Conversations(root)
    rng = np.random.default_rng(3)
    batch = data.encode([draw_description(rng, "train") for _ in range(3)], SIZE)
    model = WeMMUModel(data.config, dtype=np.float32)
    fresh = model.init_backbones(jax.random.key(0))["vlm"]

    def attention(params):
        _, seen = model.text.apply(
            {"params": params["text"]},
            model.embed_prompt(params, batch["tokens"], batch["feature_index"], batch["images"]),
            batch["position_ids"],
            valid=batch["valid"],
            pattern=Pattern.CAUSAL,
            return_key_values=False,
            mutable=["attention"],
        )
        found = seen["attention"]["layers"]["attention"]
        query, key = (np.asarray(found[name][0]) for name in ("query", "key"))
        key = np.repeat(key, query.shape[3] // key.shape[3], axis=3)
        logits = np.einsum("ybtnh,ybsnh->ybnts", query, key) / np.sqrt(query.shape[-1])
        logits = np.where(np.tri(query.shape[2], dtype=bool), logits, -np.inf)
        return np.asarray(jax.nn.softmax(logits, axis=-1))

    begun = {**fresh, "text": begin_with_positions(fresh["text"], data.config.vlm.text)}
    return attention(fresh), attention(begun), np.flatnonzero(batch["feature_index"][0] >= 0)


@pytest.mark.parametrize(("head", "distance"), [(0, 1), (2, 2)])
def test_in_a_text_two_heads_of_every_layer_look_back(looks, head, distance):
    fresh, begun, picture = looks
    words = np.arange(picture[-1] + 5, picture[-1] + 14)
    before, after = (a[:, :, head, words, words - distance].mean((1, 2)) for a in (fresh, begun))
    assert after.min() > 0.8
    assert before.max() < 0.2


def test_a_place_of_a_picture_looks_at_a_word_for_its_row_and_one_for_its_column(looks):
    """Rows have one pair of channels, which turns once in nine words: theirs are two."""
    _, begun, picture = looks
    prompt = picture[0]
    rows, columns = (begun[0, :, head][:, picture].reshape(3, 3, 2, -1) for head in (1, 3))
    for row in range(3):
        for column in range(2):
            words = [prompt - 3 + row, prompt - 12 + row]
            assert rows[:, row, column][:, words].sum(-1).min() > 0.5
            assert columns[:, row, column, prompt - 3 + column].min() > 0.5
