"""Tokenizer folders: what a broken one says, the chat template, the small tokenizer."""

import json
import shutil

import pytest

from tests.models import qwen_vocabulary
from tests.models.qwen_vocabulary import small_config
from wemmu_jax.models.qwen2_5_vl import tokenizer as words
from wemmu_jax.models.qwen2_5_vl.prompt import PromptEncoder, user_turn

CHAT = {"vae_tokens": False, "source_tokens": 4, "open_image": False}
TURNS = [
    user_turn("\nfirst", images=1),
    {"role": "assistant", "content": "A dog.\n"},
    {"role": "user", "content": [{"type": "text", "text": "and "}, {"type": "image"}]},
]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2_5_vl")
    qwen_vocabulary.write_tokenizer(folder)
    small_config().save_pretrained(folder)
    return folder


def test_bad_folders(checkpoint, tmp_path):
    def broken(name):
        folder = shutil.copytree(checkpoint, tmp_path / name)
        return folder, json.loads((folder / "tokenizer_config.json").read_text())

    with pytest.raises(FileNotFoundError, match="nowhere"):
        PromptEncoder.load(tmp_path / "nowhere")
    for missing in ("config.json", "tokenizer_config.json", "merges.txt"):
        folder, _ = broken(missing)
        (folder / missing).unlink()
        with pytest.raises(FileNotFoundError, match=missing):
            PromptEncoder.load(folder)
    folder, config = broken("template")
    template = config.pop("chat_template")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="expected a chat template"):
        PromptEncoder.load(folder)
    (folder / "chat_template.json").write_text("{")
    with pytest.raises(ValueError, match=r"chat_template\.json: expected JSON"):
        PromptEncoder.load(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0] }}"}))
    with pytest.raises(ValueError, match="each of the 2 texts once"):
        PromptEncoder.load(folder).encode([SYSTEM, user_turn("x", images=0)], [], **CHAT)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert PromptEncoder.load(folder).encode_user("", [], **CHAT).text_tokens == 19
    (folder / "chat_template.json").rename(folder / "chat_template.jinja")
    (folder / "chat_template.jinja").write_text(template)
    loaded = PromptEncoder.load(folder)
    assert loaded.encode_user("", [], **CHAT).text_tokens == 19
    assert loaded.eos_ids == (151645, 151643)
    (folder / "generation_config.json").write_text('{"eos_token_id": [151645, 7]}')
    small_config(image_token_id=5).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"image_token_id: expected 151655 .* found 5"):
        PromptEncoder.load(folder)
    small = small_config()
    small.text_config.vocab_size = 151_664
    small.save_pretrained(folder)
    with pytest.raises(ValueError, match="vocab_size: expected at least 151665"):
        PromptEncoder.load(folder)
    small_config().save_pretrained(folder)
    assert PromptEncoder.load(folder).eos_ids == (151645, 7)


@pytest.mark.parametrize("own_system", [False, True])
def test_template_renders_what_the_published_renders(checkpoint, own_system):
    """What Qwen2.5-VL's model card and transformers' test of it show of the published template."""
    tokenizer = words.load_tokenizer(checkpoint)
    messages = [SYSTEM, *TURNS] if own_system else TURNS
    system = "Be brief." if own_system else "You are a helpful assistant."
    closed = (
        f"<|im_start|>system\n{system}<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>\nfirst<|im_end|>\n"
        "<|im_start|>assistant\nA dog.\n<|im_end|>\n"
        "<|im_start|>user\nand <|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(messages, tokenize=False) == closed
    opened = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert opened == closed + "<|im_start|>assistant\n"


def test_template_numbers_pictures(checkpoint):
    numbered = words.load_tokenizer(checkpoint).apply_chat_template(
        [user_turn("x", images=2)],
        tokenize=False,
        add_vision_id=True,
    )
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    assert f"user\nPicture 1: {picture}Picture 2: {picture}x<|im_end|>\n" in numbered


CAPTIONS = [
    f"{count} {colour} {shape}s on a {ground} background."
    for count in ("one", "two", "three")
    for colour in ("red", "green", "blue", "yellow")
    for shape in ("circle", "square", "star")
    for ground in ("white", "grey")
]


def test_small_tokenizer(tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    sizes = [
        len(words.train_tokenizer(texts, vocab_size=320, folder=folder))
        for texts, folder in zip([iter(CAPTIONS), CAPTIONS], folders, strict=True)
    ]
    assert sizes == [320, 320]
    names = sorted(path.name for path in folders[0].iterdir())
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    tokenizer = words.load_tokenizer(folders[0])
    specials = [320 - 22 + number for number in range(22)]
    assert tokenizer.convert_tokens_to_ids(qwen_vocabulary.SPECIAL_TOKENS) == specials
    ids = {
        "image_token_id": tokenizer.convert_tokens_to_ids(words.IMAGE_PAD),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids(words.VISION_START),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids(words.VISION_END),
    }
    small_config(**ids).save_pretrained(folders[0])
    encoder = PromptEncoder.load(folders[0])
    assert encoder.eos_ids == tuple(
        tokenizer.convert_tokens_to_ids([words.TURN_END, words.END_OF_TEXT])
    )
    empty = encoder.encode_user("", [(2, 2)], **CHAT)
    for text in (*CAPTIONS, "<|im_end|> Ünïcödé 画 🦖 <|image_pad|>"):
        prompt = encoder.encode_user(text, [(2, 2)], **CHAT)
        assert (prompt.feature_index >= 0).sum() == 4
        end = encoder.decode(empty.tokens).removeprefix("system\nYou are a helpful assistant.\n")
        assert encoder.decode(prompt.tokens).endswith(end.replace("user\n", f"user\n{text}"))
    assert len(encoder.encode_user(CAPTIONS[0], [(2, 2)], **CHAT).tokens) < len(empty.tokens) + 20
    with pytest.raises(ValueError, match="vocab_size: expected at least 278"):
        words.train_tokenizer(CAPTIONS, vocab_size=277, folder=tmp_path / "third")
    assert not (tmp_path / "third").exists()
