"""From bytes or a file to an RGB picture, and from that to an array of the size that is asked for.

Whatever a camera, a scanner or a paint program writes becomes 8-bit RGB as it is looked at; whatever is not a
whole picture is one ValueError that names the file. Used by training and by inference.
"""

import dataclasses
import functools
import io
import pathlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from wemmu_jax.data.records import Picture
from wemmu_jax.data.resize import lanczos

# PIL warns from here on and refuses twice as many; a data set has no use for either.
MAX_PIXELS = 89_478_485

# The part of a composition's picture that may be cropped away.
MOST_CROPPED = 0.1

_EXIF_ORIENTATION = 0x0112
_EXIF_SIDEWAYS = (5, 6, 7, 8)


def open_picture(data: bytes | str | pathlib.Path, *, name: str) -> Image.Image:
    """A decoded picture, upright and in RGB.

    EXIF rotation is applied; transparent pixels show white; 16-bit grey keeps its range; of an animation, the
    first frame.

    Args:
      data: the file's content, or its path.
      name: what errors call it.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is empty, cut, no picture, larger than MAX_PIXELS, or of a kind that has no fixed range.
    """
    try:
        with _open(data, name) as image:
            image.load()
            return upright_rgb(image, name=name)
    except (FileNotFoundError, _PictureError):
        raise
    except Exception as error:  # PIL's plugins raise nearly anything on bytes that are not theirs
        raise _PictureError(f"{name}: cannot be decoded: {error}") from error


def upright_rgb(image: Image.Image, *, name: str) -> Image.Image:
    """A picture that is open already, as `open_picture` gives it.

    Raises:
      ValueError: its pixels have no fixed range.
    """
    # Both functions would copy a picture that is as it should be.
    if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    return _rgb(image, name)


def picture_size(data: bytes | str | pathlib.Path, *, name: str) -> tuple[int, int]:
    """(height, width) of the picture as it is looked at, from its header alone. Errors as `open_picture`."""
    try:
        with _open(data, name) as image:
            sideways = image.getexif().get(_EXIF_ORIENTATION) in _EXIF_SIDEWAYS
            # Of a TIFF, PIL turns the size by the file's own tag as soon as it is opened, the pixels later.
            turned = getattr(image, "tag_v2", {}).get(_EXIF_ORIENTATION) in _EXIF_SIDEWAYS
            return image.size if sideways != turned else (image.height, image.width)
    except (FileNotFoundError, _PictureError):
        raise
    except Exception as error:  # as above
        raise _PictureError(f"{name}: its header cannot be read: {error}") from error


def cover(image: Image.Image | np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8[height, width, 3]: `image`, RGB or uint8[H, W, 3], scaled to cover the size, cropped at its centre."""
    pixels = np.asarray(image)
    own_height, own_width, _ = pixels.shape
    scale = max(height / own_height, width / own_width)
    crop_height = min(height / scale, own_height)
    crop_width = min(width / scale, own_width)
    top, left = (own_height - crop_height) / 2, (own_width - crop_width) / 2
    return lanczos(pixels, height, width, (left, top, left + crop_width, top + crop_height))


def shown_whole(picture: Picture) -> Picture:
    """The same picture for a composition, whose pictures differ in size while its micro-batch has one: where scaling
    it to cover would crop away more than MOST_CROPPED of it, it is shown whole, on white."""
    if picture.height is None:
        return picture

    def load(height: int, width: int) -> np.ndarray:
        scales = height / picture.height, width / picture.width
        if min(scales) >= (1 - MOST_CROPPED) * max(scales):
            return picture.load(height, width)
        inner = [max(round(side * min(scales)), 1) for side in (picture.height, picture.width)]
        top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
        canvas = np.full((height, width, 3), 255, np.uint8)
        canvas[top : top + inner[0], left : left + inner[1]] = picture.load(*inner)
        return canvas

    identity = None if picture.identity is None else (*picture.identity, "whole")
    return dataclasses.replace(picture, load=load, identity=identity)


def lazy_picture(
    read: Callable[[], bytes],
    size: tuple[int, int],
    *,
    name: str,
    identity: tuple[int, int] | None = None,
) -> Picture:
    """The picture whose bytes `read` gives and whose (height, width) is known. Decoded on its first use and then kept,
    because a source is used twice, by the ViT and by the DC-AE; a `Picture` lives no longer than its row's encoding."""
    decoded = functools.cache(lambda: np.asarray(open_picture(read(), name=name)))
    return Picture(*size, lambda height, width: cover(decoded(), height, width), identity)


class _PictureError(ValueError):
    """A ValueError whose text is ready for the user."""


def _open(data: bytes | str | pathlib.Path, name: str) -> Image.Image:
    if not isinstance(data, bytes) and not pathlib.Path(data).exists():
        raise FileNotFoundError(f"{name}: no such file")
    if not (len(data) if isinstance(data, bytes) else pathlib.Path(data).stat().st_size):
        raise _PictureError(f"{name}: empty (zero bytes)")
    try:
        image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
    except Image.UnidentifiedImageError as error:
        raise _PictureError(f"{name}: not a picture of a known format") from error
    if image.width * image.height > MAX_PIXELS:
        pixels = f"{image.width}x{image.height} pixels"
        image.close()
        raise _PictureError(f"{name}: {pixels}, more than the limit of {MAX_PIXELS}")
    return image


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise _PictureError(
            f"{name}: floating-point pixels have no fixed range; save it with 8 or 16 bits"
        )
    if image.mode.startswith("I"):
        return _from_16_bit(image, name).convert("RGB")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_16_bit(image: Image.Image, name: str) -> Image.Image:
    # PIL's own conversion clips at 255 instead of scaling.
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise _PictureError(
            f"{name}: integer pixels from {values.min()} to {values.max()} have no fixed range; "
            "save it with 8 or 16 bits"
        )
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
