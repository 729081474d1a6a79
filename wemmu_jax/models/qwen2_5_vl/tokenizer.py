"""The words of Qwen2.5-VL: special tokens, chat template, a checkpoint's tokenizer, a small one of its kind."""

import pathlib
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer

from wemmu_jax.files import read_object
from wemmu_jax.models.qwen2_5_vl.config import Qwen25VLConfig

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"

# In the order of their ids, which follow the vocabulary without a gap (151643 to 151664 when published).
SPECIAL_TOKENS = (
    END_OF_TEXT,
    TURN_START,
    TURN_END,
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    VISION_START,
    VISION_END,
    "<|vision_pad|>",
    IMAGE_PAD,
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)

# What a word is, before byte pairs are merged inside it: contractions, letters with one leading sign, single
# digits, runs of signs, line breaks, blanks.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Renders what the published template renders for text and pictures. Lines and indents are for the reader: the
# dashes strip them.
CHAT_TEMPLATE = r"""
{%- set pictures = namespace(seen=0) -%}
{%- for message in messages -%}
  {%- if loop.first and message.role != "system" -%}
    {{- "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" -}}
  {%- endif -%}
  {{- "<|im_start|>" + message.role + "\n" -}}
  {%- if message.content is string -%}
    {{- message.content -}}
  {%- else -%}
    {%- for part in message.content -%}
      {%- if part.type == "image" -%}
        {%- set pictures.seen = pictures.seen + 1 -%}
        {{- "Picture " ~ pictures.seen ~ ": " if add_vision_id else "" -}}
        {{- "<|vision_start|><|image_pad|><|vision_end|>" -}}
      {%- else -%}
        {{- part.text -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- "<|im_end|>\n" -}}
{%- endfor -%}
{{- "<|im_start|>assistant\n" if add_generation_prompt else "" -}}
""".strip()


def load_tokenizer(folder: str | pathlib.Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder, with the chat template that the reference's processor would use.

    Reads the folder alone, never a hub.

    Raises:
      FileNotFoundError: the folder or one of its tokenizer files is missing.
      ValueError: a damaged file, no chat template, or a special token of Qwen2.5-VL that the tokenizer does not know.
    """
    folder = pathlib.Path(folder)
    files = _tokenizer_files(folder)
    for file in (*files, folder / "config.json"):  # transformers looks into that one too
        if file.suffix == ".json" and file.is_file():
            read_object(file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # both libraries raise nearly anything on damaged files
        named = " or ".join(map(str, files))
        raise ValueError(f"{named}: no tokenizer ({type(error).__name__}: {error})") from error
    # The processor's own file goes before the tokenizer's template, as in `ProcessorMixin` of transformers.
    legacy = folder / "chat_template.json"
    if legacy.is_file():
        tokenizer.chat_template = read_object(legacy).get("chat_template")
    if not tokenizer.chat_template:
        raise ValueError(
            f"{folder}: expected a chat template in chat_template.jinja, chat_template.json or "
            "tokenizer_config.json, found none"
        )
    known = tokenizer.get_added_vocab()
    used = (END_OF_TEXT, TURN_START, TURN_END, VISION_START, VISION_END, IMAGE_PAD)
    missing = [name for name in used if name not in known]
    if missing:
        raise ValueError(
            f"{folder}: expected a tokenizer of Qwen2.5-VL, its special tokens {missing} are not there"
        )
    return tokenizer


def check_agreement(
    tokenizer: PreTrainedTokenizerBase, config: Qwen25VLConfig, folder: pathlib.Path
) -> None:
    """Raises a ValueError where the ids of `config.json` are not the tokenizer's, or its vocabulary is smaller."""
    path, special = folder / "config.json", tokenizer.get_added_vocab()
    for key, name in (
        ("image_token_id", IMAGE_PAD),
        ("vision_start_token_id", VISION_START),
        ("vision_end_token_id", VISION_END),
    ):
        if getattr(config, key) != special[name]:
            raise ValueError(
                f"{path}: {key}: expected {special[name]} ({name} of the tokenizer), "
                f"found {getattr(config, key)}"
            )
    if len(tokenizer) > config.text.vocab_size:
        raise ValueError(
            f"{path}: vocab_size: expected at least {len(tokenizer)} (the tokenizer's), "
            f"found {config.text.vocab_size}"
        )


def plain_tokenizer(tokenizer: PreTrainedTokenizerBase) -> tokenizers.Tokenizer:
    """The same vocabulary without any special token: what it encodes is text, whatever it looks like."""
    backend = tokenizer.backend_tokenizer
    plain = tokenizers.Tokenizer(backend.model)
    plain.normalizer = backend.normalizer
    plain.pre_tokenizer = backend.pre_tokenizer
    return plain


def stop_ids(folder: str | pathlib.Path, *, default: tuple[int, ...]) -> tuple[int, ...]:
    """The tokens that end an answer, as `generation_config.json` names them; `default` where there is no such file
    or it names none, as in `generate` of transformers."""
    path = pathlib.Path(folder) / "generation_config.json"
    ids = read_object(path).get("eos_token_id") if path.is_file() else None
    if ids is None:
        return default
    ids = ids if isinstance(ids, list) else [ids]
    if not all(type(one) is int for one in ids):
        raise ValueError(f"{path}: eos_token_id: expected token ids, found {ids}")
    return tuple(ids)


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, folder: str | pathlib.Path
) -> PreTrainedTokenizerBase:
    """Learns a small byte-level BPE in Qwen's manner and saves it as a Hugging Face folder.

    Same words, normal form, special tokens and chat template as Qwen2.5-VL, so that everything that reads the
    published tokenizer reads this one. The same texts give the same files.

    Args:
      texts: what to learn from.
      vocab_size: of the whole, the 22 special tokens with it; they come last. Too few texts give a smaller one.
      folder: where the files go; made if absent, other files in it stay.

    Returns:
      The tokenizer; `len()` of it is the true size, `convert_tokens_to_ids` gives what `config.json` wants.

    Raises:
      ValueError: `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size: expected at least {smallest} ({len(alphabet)} bytes and {len(SPECIAL_TOKENS)} "
            f"special tokens), found {vocab_size}"
        )
    learned = byte_level_bpe(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    learned.train_from_iterator(texts, trainer=trainer)
    learned.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer = Qwen2Tokenizer(
        tokenizer_object=learned,
        unk_token=None,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def byte_level_bpe(model: models.BPE) -> tokenizers.Tokenizer:
    """Qwen's way around a BPE: normal form C, words by `WORD_PATTERN`, bytes as letters; no special token yet."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(tokenizers.Regex(WORD_PATTERN), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _tokenizer_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that the tokenizer will be read from; raises FileNotFoundError naming all that are missing."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected a checkpoint folder, found none")
    found = {path.name for path in folder.iterdir()}
    words = ("tokenizer.json",) if "tokenizer.json" in found else ("vocab.json", "merges.txt")
    missing = []
    if "tokenizer_config.json" not in found:
        missing.append("a tokenizer_config.json, found none")
    if not found.issuperset(words):
        missing.append("tokenizer.json, or vocab.json and merges.txt, found neither")
    if missing:
        raise FileNotFoundError(f"{folder}: expected {'; expected '.join(missing)}")
    return [folder / name for name in ("tokenizer_config.json", *words)]
