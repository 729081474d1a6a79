"""Qwen2.5-VL's configuration and conversion table against what transformers reads and writes."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from wemmu_jax.conversion import qwen2_5_vl as conversion
from wemmu_jax.conversion.memory import flatten, params_from_tensors
from wemmu_jax.files import read_config
from wemmu_jax.models.qwen2_5_vl.config import Qwen25VLConfig, qwen2_5_vl_3b

# `config.json` of Qwen2.5-VL-3B-Instruct as it is published.
PUBLISHED_3B = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}


def changed(config: dict, **changes) -> dict:
    """A deep copy with keys replaced; `vision_...` goes into `vision_config`, None removes the key."""
    config = copy.deepcopy(config)
    for key, value in changes.items():
        place = config["vision_config"] if key.startswith("vision_") else config
        key = key.removeprefix("vision_")
        if value is None:
            del place[key]
        else:
            place[key] = value
    return config


PUBLISHED_7B = changed(
    PUBLISHED_3B,
    hidden_size=3584,
    intermediate_size=18944,
    max_window_layers=28,
    num_attention_heads=28,
    num_hidden_layers=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
    vision_out_hidden_size=3584,
    vocab_size=152064,
)
TINY = changed(
    PUBLISHED_3B,
    hidden_size=32,
    intermediate_size=40,
    num_attention_heads=4,
    num_hidden_layers=3,
    num_key_value_heads=2,
    rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]},
    vocab_size=60,
    bos_token_id=1,
    eos_token_id=2,
    vision_depth=2,
    vision_hidden_size=16,
    vision_intermediate_size=20,
    vision_num_heads=2,
    vision_out_hidden_size=32,
    vision_fullatt_block_indexes=[1],
)


def reference_model(config: dict, *, device: str) -> Qwen2_5_VLForConditionalGeneration:
    with torch.device(device):
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**copy.deepcopy(config)))


def count(table) -> int:
    return sum(math.prod(entry.shape) * len(entry.sources()) for entry in table)


def test_published_config_is_read():
    assert Qwen25VLConfig.from_hf(PUBLISHED_3B) == qwen2_5_vl_3b()
    seven = Qwen25VLConfig.from_hf(PUBLISHED_7B)
    assert (seven.text.head_dim, seven.text.tie_word_embeddings) == (128, False)
    assert (seven.vision.unit, seven.vision.window_units, seven.vision.patch_dim) == (28, 4, 1176)


@pytest.mark.parametrize("published", [PUBLISHED_3B, PUBLISHED_7B], ids=["3b", "7b"])
def test_both_forms_of_a_config_say_the_same(published, tmp_path):
    Qwen2_5_VLConfig(**copy.deepcopy(published)).save_pretrained(tmp_path)
    assert "text_config" in json.loads((tmp_path / "config.json").read_text())
    saved = read_config(tmp_path / "config.json", Qwen25VLConfig.from_hf)
    assert saved == Qwen25VLConfig.from_hf(published)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2_vl"}, r"model_type: expected 'qwen2_5_vl', found 'qwen2_vl'"),
        ({"use_sliding_window": True}, r"use_sliding_window: expected False, found True"),
        ({"hidden_act": "gelu"}, r"hidden_act: expected 'silu', found 'gelu'"),
        ({"vision_hidden_act": "quick_gelu"}, r"vision_config.hidden_act: expected 'silu'"),
        ({"rope_scaling": {"type": "yarn"}}, r"rope_scaling: expected type 'mrope'.*found 'yarn'"),
        (
            {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 23]}},
            r"mrope_section: expected three numbers that add up to 64 .*found \[16, 24, 23\]",
        ),
        ({"num_attention_heads": 15}, r"hidden_size: expected a multiple .*\(15\), found 2048"),
        ({"num_key_value_heads": 3}, r"num_attention_heads: expected a multiple .*\(3\), found 16"),
        ({"head_dim": 64}, r"head_dim: expected 128, found 64"),
        ({"num_hidden_layers": None}, r"num_hidden_layers: expected in the configuration"),
        ({"vision_depth": None}, r"vision_config.depth: expected in the configuration"),
        ({"vision_in_chans": None}, r"vision_config.in_channels: expected in the configuration"),
        ({"vision_num_heads": 7}, r"vision_config.hidden_size: expected a multiple .*\(7\)"),
        ({"vision_num_heads": 128}, r"expected a multiple of 4 .*found 10"),
        ({"vision_window_size": 20}, r"window_size: expected at least 28 pixels .*found 20"),
        ({"vision_fullatt_block_indexes": [7, 32]}, r"expected layers 0 to 31, found \[32\]"),
        ({"vision_patch_size": [14, 14]}, r"patch_size: expected one whole number"),
        ({"vision_out_hidden_size": 3584}, r"out_hidden_size: expected 2048, found 3584"),
        ({"vision_rope_parameters": {"rope_theta": 5e3}}, r"rope_theta: expected 10000.0, found"),
    ],
)
def test_what_the_model_does_not_do_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        Qwen25VLConfig.from_hf(changed(PUBLISHED_3B, **changes))


@pytest.mark.parametrize("published", [PUBLISHED_3B, PUBLISHED_7B], ids=["3b tied", "7b untied"])
def test_table_covers_the_real_models(published):
    config = Qwen25VLConfig.from_hf(published)
    state = reference_model(published, device="meta").state_dict()
    assert conversion.naming(state) is conversion.Naming.MODULES
    table = conversion.table(config, conversion.Naming.MODULES)
    named = {name: entry.shape for entry in table for name in entry.sources()}
    left = {name: tuple(t.shape) for name, t in state.items() if name not in named}
    assert named == {name: tuple(state[name].shape) for name in named}
    assert set(left) == ({"lm_head.weight"} if config.text.tie_word_embeddings else set())
    assert set(left) <= set(conversion.IGNORED)
    assert len({entry.target for entry in table}) == len(table)


def test_parameter_counts_of_the_3b():
    config = qwen2_5_vl_3b()
    assert count(conversion.table(config)) == 3_754_622_976
    assert count(conversion.vision_table(config.vision)) == 668_684_288
    reference = reference_model(PUBLISHED_3B, device="meta")
    assert count(conversion.table(config)) == sum(p.numel() for p in reference.parameters())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_table_reads_what_save_pretrained_writes(tied, tmp_path):
    published = TINY | {"tie_word_embeddings": tied}
    model = reference_model(published, device="cpu").float()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    config = read_config(tmp_path / "config.json", Qwen25VLConfig.from_hf)
    assert conversion.naming(tensors) is conversion.Naming.FILES
    params = flatten(params_from_tensors(tensors, conversion.table(config)))
    assert ("text/lm_head/kernel" in params) is not tied

    in_memory = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    table = conversion.table(config, conversion.naming(in_memory))
    if tied:
        del in_memory["lm_head.weight"]
    for path, leaf in flatten(params_from_tensors(in_memory, table)).items():
        np.testing.assert_array_equal(leaf, params[path], err_msg=path)


def test_table_goes_there_and_back():
    rng = np.random.default_rng(0)
    for entry in conversion.table(Qwen25VLConfig.from_hf(TINY | {"tie_word_embeddings": False})):
        tensor = rng.standard_normal(entry.shape, np.float32)
        back = entry.layout.to_reference(entry.layout.to_ours(tensor), entry.shape)
        np.testing.assert_array_equal(back, tensor)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"found neither among 1 names"):
        conversion.naming(["transformer.wte.weight"])
    both = ["model.embed_tokens.weight", "model.language_model.embed_tokens.weight"]
    with pytest.raises(ValueError, match=r"found both among 2 names"):
        conversion.naming(both)


def test_configs_are_frozen_and_hashable():
    config = qwen2_5_vl_3b()
    assert hash(config) == hash(qwen2_5_vl_3b())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.text.vocab_size = 3
