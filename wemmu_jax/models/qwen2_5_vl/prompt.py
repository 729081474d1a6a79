"""From messages and the grids of their pictures to token ids, feature places and M-RoPE position ids, on the host.

L prompt tokens, S tokens of a source picture, Q query tokens, B batch. All arrays are numpy and belong to one row.
"""

import dataclasses
import itertools
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from transformers import PreTrainedTokenizerBase

from wemmu_jax.files import read_config
from wemmu_jax.models.qwen2_5_vl import tokenizer as words
from wemmu_jax.models.qwen2_5_vl.config import Qwen25VLConfig

TEXT_LIMIT = 512  # tokens of a prompt that hold no picture's feature
ROLES = ("system", "user", "assistant")

# Stands for text n while the template is rendered; the rendered string holds the template's own words and these.
_PLACE = "\ue000{}\ue001"
_PLACE_PATTERN = re.compile("\ue000(\\d+)\ue001")

Grid = tuple[int, int]
Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One row of what `read` reads.

    Attributes:
      tokens: int32[L]; the image token wherever a feature goes.
      feature_index: int32[L]; -1 for text, else which of the row's features goes there. The features of a row are
        [pictures x source_tokens] of the ViT, then as many of the VAE; a picture's own come first among its places.
      position_ids: int32[3, L]: time, row and column.
      next_position: the first id after the prompt.
      text_tokens: how many of the L positions hold no feature.
      cut: how many tokens of the caller's text were left out to keep the limit.
    """

    tokens: np.ndarray
    feature_index: np.ndarray
    position_ids: np.ndarray
    next_position: int
    text_tokens: int
    cut: int


@dataclasses.dataclass(frozen=True)
class PaddedPrompt:
    """A `Prompt` padded on the right to a fixed length; `valid` bool[L] tells its own positions from padding.

    Padding holds the pad token, feature index -1 and position 0.
    """

    tokens: np.ndarray
    feature_index: np.ndarray
    position_ids: np.ndarray
    valid: np.ndarray
    next_position: int


class PromptEncoder:
    """The chat template and the tokenizer of a checkpoint, as one function from messages to a `Prompt`.

    The reference is `Qwen2_5_VLProcessor` and `Qwen2_5_VLModel.get_rope_index` of transformers, whose ids these are
    for still pictures. One difference is wanted: what looks like a special token inside the caller's text stays text.

    Attributes:
      image_token_id, vision_start_id, turn_start_id, turn_end_id, pad_id: what their names say.
      eos_ids: the tokens that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, eos_ids: tuple[int, ...]):
        special = tokenizer.get_added_vocab()
        self._tokenizer = tokenizer
        self._plain = words.plain_tokenizer(tokenizer)
        self._rendered: dict[str, str] = {}
        self._special = special
        # Longest first, so that no special token hides one that it begins.
        names = sorted(special, key=len, reverse=True)
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        self.image_token_id: int = special[words.IMAGE_PAD]
        self.vision_start_id: int = special[words.VISION_START]
        self.turn_start_id: int = special[words.TURN_START]
        self.turn_end_id: int = special[words.TURN_END]
        self.pad_id: int = special[words.END_OF_TEXT]
        self.eos_ids = eos_ids

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> Self:
        """Reads a Hugging Face folder: `config.json`, the tokenizer's files, the chat template.

        Raises:
          FileNotFoundError: a file is missing.
          ValueError: no chat template, or `config.json` and the tokenizer do not belong together.
        """
        folder = pathlib.Path(folder)
        config = read_config(folder / "config.json", Qwen25VLConfig.from_hf)
        tokenizer = words.load_tokenizer(folder)
        words.check_agreement(tokenizer, config, folder)
        ends = tuple(
            tokenizer.get_added_vocab()[name] for name in (words.TURN_END, words.END_OF_TEXT)
        )
        return cls(tokenizer, eos_ids=words.stop_ids(folder, default=ends))

    def encode(
        self,
        messages: Sequence[Message],
        grids: Sequence[Grid],
        *,
        vae_tokens: bool,
        source_tokens: int,
        open_image: bool,
        limit: int = TEXT_LIMIT,
        overflow: Literal["error", "cut"] = "error",
    ) -> Prompt:
        """The prompt up to where the assistant begins.

        Args:
          messages: {"role": "system" | "user" | "assistant", "content": text, or a list of
            {"type": "text", "text": text} and {"type": "image"}}.
          grids: rows and columns of tokens of each picture, in the order of the messages.
          vae_tokens: each picture's ViT tokens are followed, before `<|vision_end|>`, by as many VAE tokens with the
            same position ids (design: `vae_stream: frozen`).
          source_tokens: places that each picture has among the row's features, S padded.
          open_image: end with `<|vision_start|>`: a picture is to be drawn, not an answer to be written.
          limit: greatest number of text tokens, the template's own among them.
          overflow: past the limit, "error" refuses and "cut" shortens the caller's text from its end, token by
            token; the template's tokens stay whole.

        Raises:
          ValueError: past the limit; pictures and grids that differ in number; a grid larger than `source_tokens`;
            a message that the template cannot show.
        """
        texts: list[str] = []
        placed = [_with_places(message, texts) for message in messages]
        _check_grids(grids, _count_pictures(placed), source_tokens)
        tokens = self._encode_text(placed, texts)
        if open_image:
            tokens.append(_Token(self.vision_start_id))
        tokens, cut = _keep_limit(tokens, limit + len(grids), overflow, pictures=len(grids))
        ids = np.array([token.id for token in tokens], np.int32)
        return self._place_pictures(ids, grids, vae_tokens, source_tokens, cut)

    def encode_user(self, text: str, grids: Sequence[Grid], **how: Any) -> Prompt:
        """`encode` of one user's turn, pictures before text; an empty text is the empty turn (Uncond)."""
        return self.encode([user_turn(text, images=len(grids))], grids, **how)

    def pad(self, prompt: Prompt, length: int) -> PaddedPrompt:
        """Pads on the right.

        Raises:
          ValueError: the prompt is longer than `length`.
        """
        missing = length - len(prompt.tokens)
        if missing < 0:
            raise ValueError(
                f"prompt: expected at most {length} positions, found {len(prompt.tokens)} "
                f"({prompt.text_tokens} of text)"
            )
        after = (0, missing)
        return PaddedPrompt(
            tokens=np.pad(prompt.tokens, after, constant_values=self.pad_id),
            feature_index=np.pad(prompt.feature_index, after, constant_values=-1),
            position_ids=np.pad(prompt.position_ids, ((0, 0), after)),
            valid=np.arange(length) < len(prompt.tokens),
            next_position=prompt.next_position,
        )

    def words(self, text: str) -> list[int]:
        """The ids of plain text, in which nothing is special."""
        return list(self._plain.encode(text).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Token ids as text, special tokens left out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def _encode_text(self, placed: Sequence[Message], texts: Sequence[str]) -> list["_Token"]:
        """The template's tokens around the caller's text, one image token for each picture."""
        if not placed:
            raise ValueError("messages: expected at least one message, found none")
        rendered = self._render(placed)
        shown = [int(place) for place in _PLACE_PATTERN.findall(rendered)]
        if sorted(shown) != list(range(len(texts))):
            raise ValueError(
                f"chat template: expected each of the {len(texts)} texts once, found texts {shown}"
            )
        tokens = []
        for piece in self._special_pattern.split(rendered):
            if piece in self._special:
                tokens.append(_Token(self._special[piece]))
            elif piece:
                tokens += self._encode_segment(piece, texts)
        return tokens

    def _render(self, placed: Sequence[Message]) -> str:
        # The texts are not in it, so that there are few of them, and the template takes as long as the tokenizer.
        form = repr(placed)
        if form not in self._rendered:
            self._rendered[form] = self._tokenizer.apply_chat_template(
                list(placed), tokenize=False, add_generation_prompt=True
            )
        return self._rendered[form]

    def _encode_segment(self, piece: str, texts: Sequence[str]) -> list["_Token"]:
        """Template and caller's text between two special tokens, encoded as a whole: merges cross the seam."""
        parts = _PLACE_PATTERN.split(piece)  # every second one is a place
        parts[1::2] = [texts[int(place)] for place in parts[1::2]]
        from_caller = [number % 2 for number, part in enumerate(parts) for _ in part]
        before = [0, *itertools.accumulate(from_caller)]  # the caller's characters before each
        encoding = self._plain.encode("".join(parts))
        tokens, last_end = [], 0
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            inside = start < end and before[end] - before[start] == end - start
            tokens.append(_Token(token_id, may_go=inside, starts_character=start >= last_end))
            last_end = end
        return tokens

    def _place_pictures(
        self, ids: np.ndarray, grids: Sequence[Grid], vae_tokens: bool, source_tokens: int, cut: int
    ) -> Prompt:
        """Widens each image token to its picture's tokens and counts the positions."""
        places = np.flatnonzero(ids == self.image_token_id)
        if len(places) != len(grids):
            raise ValueError(
                f"chat template: expected {len(grids)} image tokens, found {len(places)}"
            )
        tokens, features, positions = [], [], []
        next_position = 0

        def add(run: np.ndarray, feature_index: np.ndarray, offsets: np.ndarray) -> None:
            tokens.append(run)
            features.append(feature_index)
            positions.append(next_position + offsets)

        starts, ends = [0, *(places + 1)], [*places, len(ids)]
        for picture, (start, end) in enumerate(zip(starts, ends, strict=True)):
            text = ids[start:end]
            add(text, np.full(len(text), -1), np.tile(np.arange(len(text)), (3, 1)))
            next_position += len(text)
            if picture == len(grids):
                break
            offsets = _grid_offsets(grids[picture])
            own = picture * source_tokens + np.arange(offsets.shape[1])
            streams = (own, len(grids) * source_tokens + own) if vae_tokens else (own,)
            for feature_index in streams:
                add(np.full(len(own), self.image_token_id), feature_index, offsets)
            next_position += max(grids[picture])
        return Prompt(
            tokens=np.concatenate(tokens).astype(np.int32),
            feature_index=np.concatenate(features).astype(np.int32),
            position_ids=np.concatenate(positions, axis=1).astype(np.int32),
            next_position=next_position,
            text_tokens=len(ids) - len(grids),
            cut=cut,
        )


def user_turn(text: str, *, images: int) -> Message:
    """A user's message with its pictures before its text."""
    pictures = [{"type": "image"} for _ in range(images)]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}


def query_position_ids(next_position, grid: Grid):
    """The queries' M-RoPE ids: those of a still picture that follows the prompt (design, section 3).

    Args:
      next_position: int32[B], numpy or jax: the first id after each prompt.
      grid: rows and columns of queries.

    Returns:
      int32[3, B, Q], of the kind of `next_position`.
    """
    return _grid_offsets(grid)[:, None, :] + next_position[None, :, None]


class _Token(NamedTuple):
    """`may_go`: wholly the caller's text. `starts_character`: no token before it holds a byte of its first one."""

    id: int
    may_go: bool = False
    starts_character: bool = True


def _grid_offsets(grid: Grid) -> np.ndarray:
    """int32[3, rows * columns], raster order: time 0, row, column."""
    rows, columns = np.indices(grid, np.int32).reshape(2, -1)
    return np.stack([np.zeros_like(rows), rows, columns])


def _count_pictures(messages: Sequence[Message]) -> int:
    parts = [
        part
        for message in messages
        if isinstance(message["content"], list)
        for part in message["content"]
    ]
    return sum(part["type"] == "image" for part in parts)


def _check_grids(grids: Sequence[Grid], pictures: int, source_tokens: int) -> None:
    if pictures != len(grids):
        raise ValueError(
            f"grids: expected one for each of the {pictures} pictures of the messages, found {len(grids)}"
        )
    for picture, (rows, columns) in enumerate(grids):
        if rows < 1 or columns < 1 or rows * columns > source_tokens:
            raise ValueError(
                f"picture {picture}: expected 1 to {source_tokens} tokens, found a grid of {rows} x {columns}"
            )


def _keep_limit(
    tokens: list[_Token], limit: int, overflow: str, *, pictures: int
) -> tuple[list[_Token], int]:
    """At most `limit` tokens, and how many were cut. Both counts include one token for each of the pictures."""
    if overflow not in ("error", "cut"):
        raise ValueError(f'overflow: expected "error" or "cut", found {overflow!r}')
    excess = len(tokens) - limit
    if excess <= 0:
        return tokens, 0
    found = f"expected at most {limit - pictures} text tokens, found {len(tokens) - pictures}"
    if overflow == "error":
        raise ValueError(f"prompt: {found}")
    callers = [place for place, token in enumerate(tokens) if token.may_go]
    kept = len(callers) - excess
    if kept < 0:
        raise ValueError(f"prompt: {found}, of which only {len(callers)} may be cut")
    # A character of several tokens goes as a whole: half of one is no text.
    while kept > 0 and not tokens[callers[kept]].starts_character:
        kept -= 1
    gone = set(callers[kept:])
    return [token for place, token in enumerate(tokens) if place not in gone], len(gone)


def _with_places(message: Message, texts: list[str]) -> Message:
    """The message with a place instead of each of its texts, which are appended to `texts`."""

    def place(text: Any) -> str:
        if not isinstance(text, str):
            raise ValueError(f"message: expected text, found {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"message: expected Unicode text, found {text!r}: {error}") from error
        texts.append(text)
        return _PLACE.format(len(texts) - 1)

    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"message: expected a role of {', '.join(ROLES)}, found {role!r}")
    if isinstance(content, str):
        return {"role": role, "content": place(content)}
    if not isinstance(content, Sequence):
        raise ValueError(
            f"message: expected text or a list of parts, found {type(content).__name__}"
        )
    parts = []
    for part in content:
        match part.get("type"):
            case "text":
                parts.append({"type": "text", "text": place(part.get("text"))})
            case "image":
                parts.append({"type": "image"})
            case kind:
                raise ValueError(f'message: expected parts "text" and "image", found {kind!r}')
    return {"role": role, "content": parts}
