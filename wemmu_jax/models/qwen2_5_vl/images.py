"""Pictures on the host: resizing, patches, and the packing of attention windows. All numpy,
but for `pack_pixels`, which does the same on the device.

The vision transformer attends inside windows of 112 x 112 pixels in most layers. A window is a square of
`window_units` merged tokens, smaller at the right and bottom edge, since windows need not divide the grid. The
reference reorders tokens inside the model, by indices that depend on the picture. Here the host packs windows
into **slots** of one whole window each: small edge windows share a slot and `segments` keeps them apart. The
model then sees static shapes, attends slot by slot, and gathers once at the end.

Axes: B pictures, W slots, P patches of a slot, S merged tokens, `gh gw` the grid of merged tokens.
"""

import functools
import math
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from wemmu_jax.models.qwen2_5_vl.config import VisionConfig

MAX_ASPECT_RATIO = 200  # the reference refuses pictures longer than this

# The normalisation of every published Qwen2.5-VL (`preprocessor_config.json`): CLIP's.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@flax.struct.dataclass
class PackedImages:
    """A batch of pictures, their windows packed into slots.

    Attributes:
      patches: float32[B, W, P, patch_dim]: normalised pixels, zero where padded.
      positions: int32[B, W, P, 2]: row and column of each patch in its picture.
      segments: int32[B, W, P]: which window of its slot a patch belongs to, -1 where padded.
      order: int32[B, S]: where the s-th merged token in raster order lies among the W * P / merge**2 places; 0
        where padded.
    """

    patches: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    order: np.ndarray


def smart_size(
    height: int, width: int, *, unit: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The size in pixels that the reference gives a picture: sides are multiples of `unit`, the area lies within
    the two bounds, the ratio changes as little as that allows. Equals transformers' `smart_resize`.

    Raises:
      ValueError: an empty picture, or one side more than 200 times the other.
    """
    if min(height, width) < 1:
        raise ValueError(f"picture of {height} x {width}: expected at least one pixel a side")
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise ValueError(
            f"picture of {height} x {width}: expected an aspect ratio of at most {MAX_ASPECT_RATIO}, "
            f"found {ratio:.0f}"
        )
    area = round(height / unit) * round(width / unit) * unit**2
    if area > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        units = [max(1, math.floor(side / shrink / unit)) for side in (height, width)]
    elif area < min_pixels:
        stretch = math.sqrt(min_pixels / (height * width))
        units = [math.ceil(side * stretch / unit) for side in (height, width)]
    else:
        units = [round(side / unit) for side in (height, width)]
    return units[0] * unit, units[1] * unit


def resize_rgb(image: Image.Image, height: int, width: int) -> np.ndarray:
    """An RGB picture as uint8[height, width, 3], bicubic as in the reference's processor."""
    return np.asarray(image.resize((width, height), resample=Image.Resampling.BICUBIC))


def patchify(
    image: np.ndarray,
    config: VisionConfig,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> np.ndarray:
    """Normalised, flattened patches; bit-equal to `Qwen2VLImageProcessorPil` with `do_resize=False`.

    Args:
      image: uint8[H, W, 3], H and W multiples of `config.unit`.
      config: sizes of patches and merge blocks.
      mean: of each channel, on the scale 0 to 1.
      std: of each channel, on the same scale.

    Returns:
      float32[P, patch_dim]: merge blocks in raster order, the patches of a block in raster order inside it. A row
      runs over channels, frames (the still picture, repeated), rows, columns.

    Raises:
      ValueError: another type or shape than the above.
    """
    unit = config.unit
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != config.in_channels:
        raise ValueError(
            f"picture: expected uint8 [H, W, {config.in_channels}], "
            f"found {image.dtype} {list(image.shape)}"
        )
    height, width, channels = image.shape
    if height % unit or width % unit or 0 in image.shape:
        raise ValueError(
            f"picture: expected sides in multiples of {unit}, found {height} x {width}"
        )
    # Only 256 values can occur in a channel, so they are normalised once, in the reference's order of rounding.
    levels = (np.arange(256) * (1 / 255)).astype(np.float32)[:, None]
    levels = (levels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    patches = _in_patches(levels[image, np.arange(channels)][None], config)[0]
    frames = np.repeat(patches[:, :, None], config.temporal_patch_size, axis=2)
    return frames.reshape(-1, config.patch_dim)


def pack_pixels(
    pixels: jax.Array,
    config: VisionConfig,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    slots: int,
    tokens: int,
) -> PackedImages:
    """What `patchify` and `pack_images` make of pictures of one size, on the device: the host then hands over bytes,
    an eighth of what patches take. Equal to them up to a rounding of the normalisation.

    Args:
      pixels: uint8[B, H, W, 3], H and W multiples of `config.unit`.
      config, mean, std: as in `patchify`.
      slots, tokens: as in `pack_images`.
    """
    batch, height, width = pixels.shape[:3]
    grid = (height // config.unit, width // config.unit)
    count = grid[0] * grid[1] * config.spatial_merge_size**2
    # Where each patch goes is found by packing their numbers, from 1, so that 0 is padding.
    numbers = np.arange(1, count + 1, dtype=np.float32)[:, None]
    layout = pack_images([numbers], [grid], config, slots=slots, tokens=tokens)
    number = layout.patches[0, ..., 0].astype(np.int32)
    patches = jnp.pad(_in_patches(pixels, config), ((0, 0), (1, 0), (0, 0), (0, 0)))[:, number]
    levels = patches.astype(jnp.float32) / 255
    levels = (levels - jnp.asarray(mean, jnp.float32)[:, None]) / jnp.asarray(std, jnp.float32)[
        :, None
    ]
    levels = jnp.where(number[..., None, None] > 0, levels, 0)
    frames = jnp.repeat(levels[..., None, :], config.temporal_patch_size, axis=-2)
    return PackedImages(
        patches=frames.reshape(batch, *number.shape, config.patch_dim),
        **{
            name: jnp.repeat(jnp.asarray(getattr(layout, name)), batch, axis=0)
            for name in ("positions", "segments", "order")
        },
    )


def _in_patches(pixels, config: VisionConfig):
    """[B, H, W, C], numpy or jax -> [B, P, C, patch**2]: merge blocks in raster order, patches in raster order."""
    batch, height, width, channels = pixels.shape
    unit, merge, patch = config.unit, config.spatial_merge_size, config.patch_size
    blocks = pixels.reshape(
        batch, height // unit, merge, patch, width // unit, merge, patch, channels
    )
    # [B, gh, gw, merge, merge, C, patch, patch]
    return blocks.transpose(0, 1, 4, 2, 5, 7, 3, 6).reshape(batch, -1, channels, patch * patch)


def slots_needed(gh: int, gw: int, config: VisionConfig) -> int:
    """How many slots a picture of gh x gw merged tokens takes."""
    return len(_layout(gh, gw, config.window_units)[0])


def pack_images(
    images: Sequence[np.ndarray],
    grids: Sequence[tuple[int, int]],
    config: VisionConfig,
    *,
    slots: int | None = None,
    tokens: int | None = None,
) -> PackedImages:
    """Packs the windows of each picture into slots, largest window first into the first slot with room.

    Args:
      images: for each picture float32[gh * gw * merge**2, patch_dim], as `patchify` orders them.
      grids: for each picture (gh, gw) in merged tokens.
      config: sizes of windows and merge blocks.
      slots: W, by default the most that a picture of the batch needs.
      tokens: S, by default the most merged tokens that a picture of the batch has.

    Raises:
      ValueError: nothing to pack, patches that are not those of the grid, or a picture that does not fit.
    """
    if not images or len(images) != len(grids):
        raise ValueError(f"expected a grid for each picture, found {len(images)} and {len(grids)}")
    merge_area = config.spatial_merge_size**2
    for number, (image, (gh, gw)) in enumerate(zip(images, grids, strict=True)):
        if len(image) != gh * gw * merge_area:
            raise ValueError(
                f"picture {number}: expected {gh * gw * merge_area} patches for a grid of {gh} x {gw}, "
                f"found {len(image)}"
            )
    slots = _padded_size("slots", [slots_needed(*grid, config) for grid in grids], slots)
    tokens = _padded_size("tokens", [gh * gw for gh, gw in grids], tokens)

    batch, places = len(images), slots * config.slot_units
    patches = np.zeros((batch, places, merge_area, images[0].shape[-1]), np.float32)
    positions = np.zeros((batch, places, merge_area, 2), np.int32)
    segments = np.full((batch, places, merge_area), -1, np.int32)
    order = np.zeros((batch, tokens), np.int32)
    for row, (image, (gh, gw)) in enumerate(zip(images, grids, strict=True)):
        windows, place = _layout(gh, gw, config.window_units)
        patches[row, place] = image.reshape(gh * gw, merge_area, -1)
        positions[row, place] = _patch_positions(gh, gw, config.spatial_merge_size)
        segments[row, : windows.size] = windows.reshape(-1, 1)
        order[row, : gh * gw] = place
    slot = (batch, slots, config.slot_units * merge_area)
    return PackedImages(
        patches=patches.reshape(*slot, -1),
        positions=positions.reshape(*slot, 2),
        segments=segments.reshape(slot),
        order=order,
    )


def _padded_size(name: str, needed: list[int], given: int | None) -> int:
    size = max(needed) if given is None else given
    if size < max(needed):
        raise ValueError(
            f"{name}: picture {needed.index(max(needed))} needs {max(needed)}, found room for {size}"
        )
    return size


def _patch_positions(gh: int, gw: int, merge: int) -> np.ndarray:
    """int32[gh * gw, merge**2, 2]: row and column of each patch, merge blocks in raster order."""
    rows, columns = np.indices((gh * merge, gw * merge), dtype=np.int32)
    positions = np.stack([rows, columns], axis=-1).reshape(gh, merge, gw, merge, 2)
    return positions.transpose(0, 2, 1, 3, 4).reshape(gh * gw, merge**2, 2)


@functools.lru_cache(maxsize=4096)
def _layout(gh: int, gw: int, window_units: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the windows of a grid go.

    Returns:
      windows int32[slots, window_units**2]: number of the window inside its slot that a place belongs to, -1 free;
      place int32[gh * gw]: the place of each merged token in raster order.
    """
    token = np.arange(gh * gw).reshape(gh, gw)
    windows = [
        token[top : top + window_units, left : left + window_units].ravel()
        for top in range(0, gh, window_units)
        for left in range(0, gw, window_units)
    ]
    capacity = window_units**2
    slots: list[list[np.ndarray]] = []
    for window in sorted(windows, key=len, reverse=True):
        room = (slot for slot in slots if sum(map(len, slot)) + len(window) <= capacity)
        slot = next(room, None)
        if slot is None:
            slots.append(slot := [])
        slot.append(window)

    numbers = np.full((len(slots), capacity), -1, np.int32)
    place = np.empty(gh * gw, np.int32)
    for i, slot in enumerate(slots):
        filled = np.concatenate(slot)
        numbers[i, : len(filled)] = np.repeat(np.arange(len(slot)), [len(w) for w in slot])
        place[filled] = i * capacity + np.arange(len(filled))
    numbers.setflags(write=False)  # shared by every caller of the cache
    place.setflags(write=False)
    return numbers, place
