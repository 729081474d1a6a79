"""Resizing: Pillow's pixels, exactly summed."""

import numpy as np
import pytest
from PIL import Image

from wemmu_jax.data.resize import BITS, lanczos, pixel_weights

# (height, width) before, after, and (left, top, right, bottom) in parts of the whole.
CASES = [
    ((90, 120), (64, 48), (0, 0, 1, 1)),
    ((90, 120), (64, 48), (0.13, 0, 0.87, 1)),
    ((200, 77), (31, 33), (0, 0.21, 1, 0.8)),
    ((40, 30), (133, 97), (0.1, 0.1, 0.9, 0.7)),
    ((300, 500), (24, 40), (0, 0, 1, 1)),
    ((64, 48), (64, 96), (0, 0, 1, 1)),  # one pass each
    ((64, 48), (128, 48), (0, 0, 1, 1)),
    ((7, 3), (20, 90), (0, 0, 1, 1)),
    ((1, 900), (5, 30), (0, 0, 1, 1)),
    ((3000, 40), (30, 20), (0, 0, 1, 1)),  # several strips
]


def picture(size, seed=0, channels=3):
    """Smooth shapes with hard edges and a little noise, so that sums leave 0 to 255 on both sides."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices(size)
    planes = [np.sin(rows / f) + np.cos(columns / g) for f, g in rng.uniform(2, 30, (channels, 2))]
    values = np.stack(planes, -1) * 200 + 128 + rng.normal(0, 5, (*size, channels))
    return values.clip(0, 255).astype(np.uint8)


def box_of(size, parts):
    return tuple(part * side for part, side in zip(parts, (size[1], size[0]) * 2, strict=True))


@pytest.mark.parametrize(("size", "wanted", "parts"), CASES)
def test_pillows_pixels(size, wanted, parts):
    pixels, box = picture(size), box_of(size, parts)
    left, top, right, bottom = box
    theirs = Image.fromarray(pixels)
    # One pass after the other, because Pillow 13 begins with the columns of tall pictures.
    for wide, tall, part in (
        (wanted[1], size[0], (left, 0, right, size[0])),
        (wanted[1], wanted[0], (0, top, wanted[1], bottom)),
    ):
        theirs = theirs.resize((wide, tall), Image.Resampling.LANCZOS, box=part)
    apart = np.abs(lanczos(pixels, *wanted, box).astype(int) - np.asarray(theirs).astype(int))
    assert apart.shape == (*wanted, 3) and apart.max() <= 2
    assert np.mean(apart > 0) < 0.01


@pytest.mark.parametrize(("size", "wanted", "parts"), CASES)
def test_sums_are_exact(size, wanted, parts):
    """The same with whole numbers of 64 bits, and in another order."""
    pixels, (left, top, right, bottom) = picture(size, 1), box_of(size, parts)

    def along(rows, length, start, stop, wide):
        if (start, stop, wide) == (0, length, length):
            return rows
        first, weights = pixel_weights(length, start, stop, wide)
        steps = (weights * 2**BITS).astype(np.int64)
        out = np.full((wide, *rows.shape[1:]), 2 ** (BITS - 1), np.int64)
        for tap in reversed(range(steps.shape[1])):
            place = np.minimum(first + tap, length - 1)
            out += steps[:, tap, None, None] * rows[place]
        return (out >> BITS).clip(0, 255)

    half = along(pixels.astype(np.int64).transpose(1, 0, 2), size[1], left, right, wanted[1])
    whole = along(half.transpose(1, 0, 2), size[0], top, bottom, wanted[0])
    found = lanczos(pixels, *wanted, (left, top, right, bottom))
    np.testing.assert_array_equal(found, whole)


def test_weights_add_up_to_one_and_their_magnitudes_to_less_than_two():
    rng = np.random.default_rng(2)
    for length, size in [(1, 9), (9, 1), (768, 504), *rng.integers(1, 2000, (300, 2)).tolist()]:
        start, stop = rng.uniform(0, length / 3), length - rng.uniform(0, length / 3)
        first, weights = pixel_weights(length, start, stop, size)
        assert (weights.sum(axis=1) == 1).all() and (np.abs(weights).sum(axis=1) < 2).all()
        assert (weights * 2**BITS % 1 == 0).all() and (first >= 0).all() and (first < length).all()
        places = first[:, None] + np.arange(weights.shape[1])
        assert not weights[places >= length].any(), "nothing outside of the picture counts"


@pytest.mark.parametrize("channels", [1, 4])
def test_channels_stay_apart(channels):
    pixels = picture((50, 70), 3, channels)
    whole = lanczos(pixels, 33, 41, (0, 0, 70, 50))
    assert whole.shape == (33, 41, channels)
    for channel in range(channels):
        alone = lanczos(pixels[..., [channel]], 33, 41, (0, 0, 70, 50))
        np.testing.assert_array_equal(whole[..., [channel]], alone)


def test_what_is_the_size_already_is_left_alone():
    pixels = picture((20, 30))
    np.testing.assert_array_equal(lanczos(pixels, 20, 30, (0, 0, 30, 20)), pixels)
    even = np.full((20, 30, 3), (255, 0, 7), np.uint8)
    assert (lanczos(even, 71, 13, (1.5, 2.5, 28, 19)) == (255, 0, 7)).all()
