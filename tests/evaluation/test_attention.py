"""Where the queries look, on a model whose attention is known."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.wemmu_fixtures import (
    GRIDS,
    pack,
    random_params,
    request,
    row_encoder,
    small_config,
)
from wemmu_jax.evaluation.attention import GROUPS, attention_of
from wemmu_jax.models.wemmu.config import Connector, VAEStream
from wemmu_jax.models.wemmu.modeling import WeMMUModel

GRID, SOURCE_TOKENS = (2, 3), sum(h * w for h, w in GRIDS)


def measured(change=None, **bridge):
    config = small_config(**bridge)
    model, encoder = WeMMUModel(config, dtype=jnp.float32), row_encoder(config)
    params = random_params(model)
    if change:
        change(params["expert"]["layers"]["attention"])
    prompt, sources = pack(encoder, request(config), text_length=100)
    tokens = encoder.shapes.tokens
    end = encoder.prompts.turn_end_id
    asked = {"grid": GRID, "query_tokens": tokens, "turn_end": end, "seed": 0}
    return attention_of(model, params, prompt, sources, **asked)


def look_nowhere(attention):
    attention["q_proj"] = {name: leaf * 0 for name, leaf in attention["q_proj"].items()}


@pytest.mark.parametrize("stream", VAEStream)
def test_equal_attention_is_shared_by_the_number_of_tokens(stream):
    found = measured(look_nowhere, vae_stream=stream)
    queries = GRID[0] * GRID[1]
    columns = found.map.shape[1]
    assert found.groups.count("vit") == found.groups.count("vae") == SOURCE_TOKENS
    assert found.groups.count("text") > 0 and found.groups.count("rest") > 0
    np.testing.assert_allclose(found.map, 1 / (columns + queries), rtol=1e-6)
    assert found.log_ratio == pytest.approx(0, abs=1e-6)
    assert found.logit_difference == pytest.approx(0, abs=1e-6)
    assert found.mass_difference == pytest.approx(
        2 * found.mass["vit"] - found.mass["text"] - found.mass["template"], rel=1e-6
    )
    assert found.mass["vit"] == pytest.approx(found.mass["vae"], rel=1e-6)


def test_attention_adds_up_to_one_and_no_group_is_empty():
    found = measured()
    assert sum(found.mass.values()) == pytest.approx(1, abs=1e-6)
    assert set(found.mass) == set(GROUPS) and min(found.mass.values()) > 0
    assert found.map.shape == (GRID[0] * GRID[1], len(found.groups))


def test_the_users_turn_ends_where_the_template_goes_on():
    config = small_config()
    encoder = row_encoder(config)
    prompt, _ = pack(encoder, request(config), text_length=100)
    tokens = [int(token) for token in np.asarray(prompt.tokens)[0]]
    end = max(i for i, token in enumerate(tokens) if token == encoder.prompts.turn_end_id)
    groups = measured().groups
    assert groups[end] == "template" and groups[end - 1] == "text"
    assert set(groups[end:]) == {"template"} and "template" not in groups[:end]


def test_without_a_vae_branch_nothing_goes_there():
    found = measured(connector=Connector.NONE)
    assert found.mass["vae"] == 0 and "vae" not in found.groups
