"""From a request, or a training example, to the arrays that the model reads; on the host, in numpy.

n source pictures, S source tokens, L prompt tokens.
"""

import dataclasses
import math
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from wemmu_jax.data.features import Features
from wemmu_jax.data.prompts import UNCONDITIONAL_PROMPT
from wemmu_jax.data.records import Picture
from wemmu_jax.data.tasks import Task
from wemmu_jax.files import read_object
from wemmu_jax.models.qwen2_5_vl.answers import encode_turns, target_weights
from wemmu_jax.models.qwen2_5_vl.images import pack_images, pack_pixels, patchify, slots_needed
from wemmu_jax.models.qwen2_5_vl.prompt import TEXT_LIMIT, PromptEncoder
from wemmu_jax.models.wemmu.batch import PackedImages, PromptBatch
from wemmu_jax.models.wemmu.config import WeMMUConfig


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Static sizes that all buckets of a stage share.

    Attributes:
      tokens: Q and S: queries, and tokens of one source, are padded to it.
      slots: window slots of the ViT that one source is padded to.
    """

    tokens: int
    slots: int

    @classmethod
    def of(
        cls, grids: Sequence[tuple[int, int]], config: WeMMUConfig, *, multiple: int
    ) -> "Shapes":
        """What sources and queries on `grids` need, tokens rounded up to a multiple of `multiple`."""
        longest = max((rows * columns for rows, columns in grids), default=0)
        return cls(
            tokens=-(-longest // multiple) * multiple,
            slots=max((slots_needed(*grid, config.vlm.vision) for grid in grids), default=0),
        )

    def prompt_length(self, text_length: int, sources: int, *, vae_in_prompt: bool) -> int:
        """L of `sources` pictures a row beside texts of at most `text_length` tokens."""
        return text_length + sources * self.tokens * (2 if vae_in_prompt else 1)


@dataclasses.dataclass(frozen=True)
class RowEncoder:
    """Tokenises prompts and cuts pictures into patches.

    Attributes:
      config: of the composed model.
      prompts: tokenizer and chat template.
      mean, std: of the ViT's input, for each channel.
      pixel_limits: fewest and most pixels of a picture in a chat.
      shapes: static paddings.
      features: cached latents, which then stand where the DC-AE's pixels would.
    """

    config: WeMMUConfig
    prompts: PromptEncoder
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pixel_limits: tuple[int, int]
    shapes: Shapes = Shapes(tokens=0, slots=0)
    features: Features | None = None

    @classmethod
    def load(cls, folder: str | pathlib.Path, config: WeMMUConfig) -> "RowEncoder":
        """Reads tokenizer and normalisation of the VLM from a converted folder.

        Raises:
          FileNotFoundError: a file is missing.
          ValueError: a file is damaged, or the tokenizer is not the model's.
        """
        vlm = pathlib.Path(folder) / "vlm"
        preprocessing = read_preprocessing(vlm)
        return cls(config=config, prompts=PromptEncoder.load(vlm), **preprocessing)

    def sized(self, grids: Sequence[tuple[int, int]], *, multiple: int) -> "RowEncoder":
        """The same with the paddings that sources and queries on `grids` need."""
        shapes = Shapes.of(grids, self.config, multiple=multiple)
        return dataclasses.replace(self, shapes=shapes)

    @property
    def vae_in_prompt(self) -> bool:
        """Whether VAE tokens stand in the prompt, after their picture's ViT tokens."""
        return self.config.bridge.vae_in_prompt

    def prompt_length(self, text_length: int, sources: int) -> int:
        """L of a micro-batch with `sources` pictures a row and texts of at most `text_length` tokens."""
        return self.shapes.prompt_length(text_length, sources, vae_in_prompt=self.vae_in_prompt)

    def prompt(
        self,
        text: str,
        grids: Sequence[tuple[int, int]],
        *,
        overflow: str,
        limit: int = TEXT_LIMIT,
    ):
        """The request's prompt: pictures, text, the assistant's header and the opening of a picture. A text without
        pictures is a caption, and gets the words of the bridge's template around it."""
        if not grids and text != UNCONDITIONAL_PROMPT:
            text = self.config.bridge.caption_template.replace("{caption}", text)
        return self.prompts.encode_user(
            text,
            grids,
            vae_tokens=self.vae_in_prompt,
            source_tokens=self.shapes.tokens,
            open_image=True,
            limit=limit,
            overflow=overflow,
        )

    def prompt_row(self, prompt, *, text_length: int, sources: int) -> dict[str, np.ndarray]:
        """One row of `PromptBatch`, and `place` int32[n * S], padded to its static length."""
        padded = self.prompts.pad(prompt, self.prompt_length(text_length, sources))
        place = np.full(sources * self.shapes.tokens, -1, np.int32)
        at = np.flatnonzero(padded.feature_index >= 0)
        feature = padded.feature_index[at]
        is_vit = feature < len(place)
        place[feature[is_vit]] = at[is_vit]
        return {
            "tokens": padded.tokens,
            "feature_index": padded.feature_index,
            "position_ids": padded.position_ids,
            "valid": padded.valid,
            "next_position": np.int32(prompt.next_position),
            "place": place,
        }

    def source_sizes(self, grid: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """(height, width) in pixels of what the ViT and what the DC-AE reads of a picture on `grid`."""
        unit, ratio = self.config.vlm.vision.unit, self.config.dc_ae.ratio
        return (grid[0] * unit, grid[1] * unit), (grid[0] * ratio, grid[1] * ratio)

    def pack(self, images: Sequence[np.ndarray]) -> PackedImages:
        """uint8[H, W, 3] pictures, sides multiples of the ViT's unit, as the ViT reads them."""
        vision = self.config.vlm.vision
        grids = [(i.shape[0] // vision.unit, i.shape[1] // vision.unit) for i in images]
        patches = [patchify(image, vision, self.mean, self.std) for image in images]
        return pack_images(
            patches, grids, vision, slots=self.shapes.slots, tokens=self.shapes.tokens
        )

    def pack_pixels(self, pixels: jax.Array) -> PackedImages:
        """uint8[B, H, W, 3], sides multiples of the ViT's unit, as the ViT reads them; a program for the device."""
        how = {"slots": self.shapes.slots, "tokens": self.shapes.tokens}
        return pack_pixels(pixels, self.config.vlm.vision, self.mean, self.std, **how)

    def fits(self, example) -> bool:
        """Whether the text of a training example may be a request's, which is never cut."""
        return self._cut_prompt(example.text, ((1, 1),) * len(example.sources)).cut == 0

    # -- training: what `wemmu_jax.data.pipeline` is given

    def text_length(self, example) -> int:
        """Prompt tokens of a training example that are text, after the cut to the limit."""
        grids = ((1, 1),) * len(example.sources)
        if example.task is Task.VQA:
            whole = encode_turns(self.prompts, example.turns, grids, source_tokens=1)
            return min(whole.text_tokens, TEXT_LIMIT)
        return self._cut_prompt(example.text, grids).text_tokens

    def encode_example(self, example, bucket, text_length: int) -> dict[str, np.ndarray]:
        """One training row: the prompt, the sources on the bucket's grid, the target at the bucket's size.

        Of VQA: the conversation as it fits, see `encode_turns`, its pictures for the ViT alone, and `weights`
        float32[L] of its tokens as targets.
        """
        grid = self.config.source_grid(bucket.height, bucket.width)
        count = len(example.sources)
        if example.task is Task.VQA:
            return self._conversation(example, grid, text_length)
        prompt = self._cut_prompt(example.text, (grid,) * count, limit=text_length)
        row = self.prompt_row(prompt, text_length=text_length, sources=count)
        row["cut"] = np.int32(prompt.cut)
        # What the DC-AE reads, or what it made of it.
        encoded = _pixels if self.features is None else self.features.latents
        row["target"] = encoded(example.target, bucket.height, bucket.width)
        row["picture_id"] = picture_id(row["target"])
        if count:
            vit_size, vae_size = self.source_sizes(grid)
            row["vit_pixels"] = np.stack([source.load(*vit_size) for source in example.sources])
            row["source_pixels"] = np.stack(
                [encoded(source, *vae_size) for source in example.sources]
            )
        return row

    def _conversation(self, example, grid: tuple[int, int], text_length: int) -> dict:
        count, tokens = len(example.sources), self.shapes.tokens
        length = self.shapes.prompt_length(text_length, count, vae_in_prompt=False)
        prompt = encode_turns(
            self.prompts, example.turns, (grid,) * count, source_tokens=tokens, length=length
        )
        padded = self.prompts.pad(prompt, length)
        row = {
            "tokens": padded.tokens,
            "feature_index": padded.feature_index,
            "position_ids": padded.position_ids,
            "valid": padded.valid,
            "weights": target_weights(self.prompts, padded),
        }
        if count:
            size, _ = self.source_sizes(grid)
            row["vit_pixels"] = np.stack([source.load(*size) for source in example.sources])
        return row

    def _cut_prompt(self, text: str, grids: tuple[tuple[int, int], ...], limit: int = TEXT_LIMIT):
        return self.prompt(text, grids, overflow="cut", limit=min(limit, TEXT_LIMIT))


def _pixels(picture: Picture, height: int, width: int) -> np.ndarray:
    return picture.load(height, width)


def picture_id(pixels: np.ndarray) -> np.uint32:
    """A number that tells pictures apart by what they show: data sets give one picture several captions, and two
    of them may hold the same one."""
    return np.uint32(zlib.crc32(np.ascontiguousarray(pixels)))


def read_preprocessing(vlm: pathlib.Path) -> dict[str, tuple]:
    """`mean`, `std` and `pixel_limits` of a `RowEncoder`, from a VLM's `preprocessor_config.json`, or from
    `processor_config.json`, which is all that a processor of transformers 5 writes.

    Raises:
      FileNotFoundError: it is missing.
      ValueError: one of them is not in it or cannot be; names file and key.
    """
    file, whole = vlm / "preprocessor_config.json", vlm / "processor_config.json"
    if file.exists() or not whole.exists():
        settings = read_object(file)
    else:
        file, settings = whole, read_object(whole, keys=["image_processor"])["image_processor"]
    try:
        mean, std = _channels(settings, "image_mean"), _channels(settings, "image_std")
        if min(std) <= 0:
            raise ValueError(f"image_std: expected numbers above 0, found {list(std)}")
        return {"mean": mean, "std": std, "pixel_limits": _pixel_limits(settings)}
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def read_sample_size(file: pathlib.Path) -> int:
    """Side in latents of the pictures that a DiT was made for, from diffusers' `transformer/config.json`.

    Raises:
      FileNotFoundError: it is missing.
      ValueError: it does not say; names file and key.
    """
    size = read_object(file).get("sample_size")
    if type(size) is not int or size < 1:
        raise ValueError(f"{file}: sample_size: expected a whole number above 0, found {size!r}")
    return size


def _channels(settings: Mapping[str, Any], key: str) -> tuple[float, ...]:
    values = settings.get(key)
    if not isinstance(values, list) or len(values) != 3 or not all(map(_is_number, values)):
        raise ValueError(f"{key}: expected three numbers, found {values!r}")
    return tuple(values)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _pixel_limits(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Published configs name `min_pixels` and `max_pixels`; those that transformers 5 writes have `size` instead."""
    size = settings.get("size")
    size = size if isinstance(size, dict) else {}
    named = [settings.get(key) for key in ("min_pixels", "max_pixels")]
    edges = [size.get(key) for key in ("shortest_edge", "longest_edge")]
    limits = tuple(
        edge if limit is None else limit for limit, edge in zip(named, edges, strict=True)
    )
    if None in limits:
        raise ValueError("neither min_pixels and max_pixels nor size with both edges")
    if not all(type(limit) is int for limit in limits) or not 1 <= limits[0] <= limits[1]:
        raise ValueError(
            f"min_pixels and max_pixels: expected two rising whole numbers, found {list(limits)}"
        )
    return limits


PROMPT_FIELDS = tuple(field.name for field in dataclasses.fields(PromptBatch))


def prompt_batch(arrays: dict[str, np.ndarray]) -> PromptBatch:
    """Stacked rows as `PromptBatch`; the position ids' axis of three comes first."""
    fields = {name: arrays[name] for name in PROMPT_FIELDS}
    fields["position_ids"] = np.moveaxis(fields["position_ids"], 1, 0)
    return PromptBatch(**fields)
