"""Lanczos resizing as Pillow does it, as products of small matrices, which takes a core half the time.

Pillow sums pixel by pixel; here BLOCK neighbouring pixels share the pixels that they are made of, and a product makes
all of them at once. Weights are multiples of 2**-BITS and add up to one. Their magnitudes add up to less than two, so
every sum of weights times bytes is a whole number of 2**-BITS below 2**24 of them, which float32 holds exactly: the
result is the same on every machine, in whatever order its library adds. Pillow's weights are finer (2**-22), so that
one value in a thousand differs from Pillow's, by one and seldom by two. Rows come before columns, as in Pillow until
13, which begins with the columns of tall pictures; both round to bytes in between.

H, W a picture's own height and width, C its channels.
"""

import functools

import numpy as np

BITS = 15
BLOCK = 8
# OpenBLAS starts threads for larger products. Every core has a worker of its own already.
_MOST_PRODUCTS = 2**18

Box = tuple[float, float, float, float]


def lanczos(pixels: np.ndarray, height: int, width: int, box: Box) -> np.ndarray:
    """uint8[height, width, C] of the part `box` of a picture: antialiased, windowed sinc of three lobes.

    Args:
      pixels: uint8[H, W, C].
      height, width: of the result.
      box: left, top, right and bottom of the part, in pixels; fractions of pixels count.
    """
    left, top, right, bottom = box
    full_height, full_width, channels = pixels.shape
    rows = pixels.reshape(full_height, full_width * channels)
    first = 0
    if (top, bottom, height) != (0, full_height, full_height):
        starts, weights = _blocks(full_height, top, bottom, height)
        first, last = starts[0], starts[-1] + weights.shape[2]
        rows = rows[first:last]
    if (left, right, width) != (0, full_width, full_width):
        rows = _along_rows(rows, full_width, left, right, width, channels)
    if (top, bottom, height) != (0, full_height, full_height):
        rows = _down_columns(rows, [start - first for start in starts], weights, height)
    return rows.reshape(height, width, channels)


def _along_rows(
    rows: np.ndarray, length: int, start: float, stop: float, size: int, channels: int
) -> np.ndarray:
    """uint8[n, length * C] -> uint8[n, size * C]."""
    starts, weights = _channel_blocks(length, start, stop, size, channels)
    count, reach, made = weights.shape
    out = np.empty((len(rows), size * channels), np.uint8)
    strip = max(_MOST_PRODUCTS // (reach * made), 1)
    sums = np.empty((min(strip, len(rows)), count * made), np.float32)
    for top in range(0, len(rows), strip):
        part = rows[top : top + strip].astype(np.float32)
        own = sums[: len(part)]
        for block, begin in enumerate(starts):
            begin *= channels
            to = own[:, block * made : (block + 1) * made]
            np.matmul(part[:, begin : begin + reach], weights[block], out=to)
        out[top : top + strip] = _rounded(own)[:, : out.shape[1]]
    return out


def _down_columns(
    rows: np.ndarray, starts: list[int], weights: np.ndarray, size: int
) -> np.ndarray:
    """uint8[n, m] -> uint8[size, m]."""
    reach = weights.shape[2]
    out = np.empty((size, rows.shape[1]), np.uint8)
    strip = max(_MOST_PRODUCTS // (BLOCK * reach), 1)
    sums = np.empty((BLOCK, rows.shape[1]), np.float32)
    for block, begin in enumerate(starts):
        part = rows[begin : begin + reach].astype(np.float32)
        for left in range(0, rows.shape[1], strip):
            right = left + strip
            np.matmul(weights[block], part[:, left:right], out=sums[:, left:right])
        top = block * BLOCK
        out[top : top + BLOCK] = _rounded(sums)[: size - top]
    return out


def _rounded(sums: np.ndarray) -> np.ndarray:
    """To bytes; changes its argument."""
    sums += np.float32(0.5)
    np.clip(sums, 0, 255, out=sums)
    return sums.astype(np.uint8)


@functools.lru_cache(maxsize=32)
def _channel_blocks(
    length: int, start: float, stop: float, size: int, channels: int
) -> tuple[list[int], np.ndarray]:
    """`_blocks` for rows in which channels lie side by side: float32[blocks, reach * C, BLOCK * C]."""
    starts, weights = _blocks(length, start, stop, size)
    count, made, reach = weights.shape
    spread = np.zeros((count, reach, channels, made, channels), np.float32)
    for channel in range(channels):
        spread[:, :, channel, :, channel] = weights.transpose(0, 2, 1)
    return starts, spread.reshape(count, reach * channels, made * channels)


@functools.lru_cache(maxsize=32)
def _blocks(length: int, start: float, stop: float, size: int) -> tuple[list[int], np.ndarray]:
    """Where each block's pixels begin, and float32[blocks, BLOCK, reach], what they count; 0 past the last pixel."""
    first, weights = pixel_weights(length, start, stop, size)
    taps = weights.shape[1]
    begins = first[::BLOCK]
    ends = first[np.minimum(np.arange(BLOCK - 1, size + BLOCK - 1, BLOCK), size - 1)] + taps
    reach = min(int((ends - begins).max()), length)
    begins = np.minimum(begins, length - reach)
    # Weights past the end of the picture are 0 and are cut away.
    matrix = np.zeros((len(begins) * BLOCK, reach + taps), np.float32)
    places = (first - np.repeat(begins, BLOCK)[:size])[:, None] + np.arange(taps)
    np.put_along_axis(matrix[:size], places, weights.astype(np.float32), axis=1)
    return begins.tolist(), np.ascontiguousarray(matrix[:, :reach]).reshape(-1, BLOCK, reach)


def pixel_weights(
    length: int, start: float, stop: float, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first pixel that each of `size` pixels is made of, int64[size], and the weights of that and the following
    ones, float64[size, taps], multiples of 2**-BITS; after Pillow's `precompute_coeffs`."""
    scale = (stop - start) / size
    wide = max(scale, 1.0)
    centre = start + (np.arange(size) + 0.5) * scale
    first = np.maximum((centre - 3 * wide + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + 3 * wide + 0.5).astype(np.int64), length)
    places = first[:, None] + np.arange((last - first).max())
    distance = (places - centre[:, None] + 0.5) / wide
    lobes = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0.0)
    lobes[places >= last[:, None]] = 0.0
    # Sums are rounded, not weights: what one loses its neighbour gains, and all together are one.
    sums = np.cumsum(lobes, axis=1)
    steps = np.diff(np.rint(sums * (2**BITS / sums[:, -1:])), axis=1, prepend=0)
    return first, steps * 2.0**-BITS
