"""Prompts and pictures for both libraries. B rows, L prompt tokens, S tokens of a source.

A prompt is [text | ViT tokens | VAE tokens | text], as long in every row, and padded only where the caller asks.
"""

import dataclasses
import functools

import numpy as np
import torch

from benchmarks.side_by_side.sizes import Sizes
from wemmu_jax.models.qwen2_5_vl.images import PackedImages, pack_images, patchify
from wemmu_jax.models.qwen2_5_vl.prompt import query_position_ids
from wemmu_jax.models.wemmu.batch import PromptBatch


@dataclasses.dataclass(frozen=True)
class Prompt:
    """B equal prompts.

    Attributes:
      tokens: int32[B, L].
      feature: int32[L], see `PromptBatch.feature_index`.
      position_ids: int32[3, B, L].
      next_position: the first id after it.
    """

    tokens: np.ndarray
    feature: np.ndarray
    position_ids: np.ndarray
    next_position: int

    @property
    def length(self) -> int:
        """L."""
        return self.tokens.shape[1]

    @functools.cached_property
    def place(self) -> np.ndarray:
        """int32[B, S], as `Sources.place`."""
        vit = (self.feature >= 0).sum() // 2
        at = np.flatnonzero((self.feature >= 0) & (self.feature < vit)).astype(np.int32)
        return np.broadcast_to(at, (len(self.tokens), len(at)))

    def ours(self, length: int | None = None) -> PromptBatch:
        """Padded to `length`."""
        rows, spare = len(self.tokens), (length or self.length) - self.length
        feature = np.pad(self.feature, (0, spare), constant_values=-1)
        valid = np.arange(self.length + spare) < self.length
        return PromptBatch(
            tokens=np.pad(self.tokens, ((0, 0), (0, spare))),
            feature_index=np.broadcast_to(feature, (rows, len(feature))),
            position_ids=np.pad(self.position_ids, ((0, 0), (0, 0), (0, spare))),
            valid=np.broadcast_to(valid, (rows, len(valid))),
            next_position=np.full(rows, self.next_position, np.int32),
        )


def prompt(sizes: Sizes, *, rows: int, text: int, sources: int = 0, seed: int = 0) -> Prompt:
    """With `text` tokens of text and, if `sources` is 1, a picture between its halves."""
    rng = np.random.default_rng(seed)
    before = text // 2
    places = np.arange(before, dtype=np.int32)[None].repeat(3, 0)
    parts, features, start = [places], [np.full(before, -1, np.int32)], before
    if sources:
        grid = sizes.grid
        image = query_position_ids(np.array([start], np.int32), grid)[:, 0]
        tokens = image.shape[1]
        parts += [image, image]  # VAE tokens stand where their picture's ViT tokens do
        features.append(np.arange(2 * tokens, dtype=np.int32))
        start += max(grid)
    after = text - before
    parts.append(start + np.arange(after, dtype=np.int32)[None].repeat(3, 0))
    features.append(np.full(after, -1, np.int32))
    ids = np.concatenate(parts, axis=1)
    vocabulary = sizes.text["vocab_size"]
    tokens = rng.integers(6, vocabulary, (rows, ids.shape[1]), dtype=np.int32)
    ids = np.repeat(ids[:, None], rows, axis=1)
    return Prompt(tokens, np.concatenate(features), ids, start + after)


def pictures(rows: int, height: int, width: int, seed: int) -> np.ndarray:
    """uint8[B, H, W, 3], smooth enough that an autoencoder has something to do."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (rows, height // 8, width // 8, 3))
    fine = coarse.repeat(8, 1).repeat(8, 2) + rng.integers(-20, 20, (rows, height, width, 3))
    return fine.clip(0, 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Source:
    """One source picture for each row.

    Attributes:
      packed: what our ViT reads.
      patches: what transformers' ViT reads, float32[all patches, patch_dim].
      grid_thw: int64[B, 3].
      pixels: what the DC-AE reads, uint8[B, H, W, 3].
    """

    packed: PackedImages
    patches: np.ndarray | torch.Tensor
    grid_thw: torch.Tensor
    pixels: np.ndarray


def source(sizes: Sizes, rows: int, seed: int = 5) -> Source:
    """Random pictures on the grid of `sizes.side`."""
    config, grid = sizes.config, sizes.grid
    vision, unit, ratio = config.vlm.vision, config.vlm.vision.unit, config.dc_ae.ratio
    drawn = pictures(rows, grid[0] * unit, grid[1] * unit, seed)
    patches = [patchify(picture, vision) for picture in drawn]
    merge = vision.spatial_merge_size
    return Source(
        packed=pack_images(patches, [grid] * rows, vision),
        patches=np.concatenate(patches),
        grid_thw=torch.tensor([(1, merge * grid[0], merge * grid[1])] * rows),
        pixels=pictures(rows, grid[0] * ratio, grid[1] * ratio, seed + 1),
    )


def normal(*shape: int, seed: int) -> np.ndarray:
    """float32 N(0, 1)."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)
