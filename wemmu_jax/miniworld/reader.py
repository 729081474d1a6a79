"""Reads a picture back into what it shows: background, and for each object shape, colour and place.

Every pixel is taken as a mixture of the background and the object colour that explains it best; connected pixels
that are more object than background make a blob; a blob's shape is that whose drawing of equal area overlaps it
best. What else is not of the background's colour is something without a name. Sizes are shares of the picture, so any
height and width can be read.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from wemmu_jax.miniworld.renderer import RADIUS, coverage
from wemmu_jax.miniworld.scene import BACKGROUNDS, COLOURS, GRID, PLACES, SHAPES, Object, Scene

_COLOUR_NAMES, _COLOUR_RGB = tuple(COLOURS), np.float32(list(COLOURS.values()))
_BACKGROUND_NAMES, _BACKGROUND_RGB = tuple(BACKGROUNDS), np.float32(list(BACKGROUNDS.values()))
# Half the smallest distance between two names of a palette: beyond it, no name is the right one.
_COLOUR_REACH, _BACKGROUND_REACH = 50.0, 38.0
_FINE = 64  # pixels of the shorter side from which a picture is shrunk by whole factors before it is read
_FOREIGN = 70.0  # farther than this from every mixture, a pixel is something else than background
_SPECK = 0.15  # blobs below this share of a disc's area are dirt
_LEAST_OVERLAP, _LEAST_LEAD = 0.6, 0.02
_LEAST_RADIUS, _MOST_RADIUS = 0.6, 1.5  # of a drawn shape's
_SOFT = np.exp(-0.5 * np.arange(-3, 4) ** 2)  # a Gaussian of sigma 1 pixel
_SOFT /= _SOFT.sum()
_EDGE = 3  # pixels around a blob that may be of any colour
_SECOND_COLOUR = 0.25  # share of a blob from which a second colour makes a second blob


@dataclasses.dataclass(frozen=True)
class Seen:
    """One object as read. `shape` and `colour` are None where no name fits. `middle` and `extent` are (x, y)
    shares of width and height; `confidence` is the overlap with the best shape, 0 to 1."""

    shape: str | None
    colour: str | None
    place: str
    middle: tuple[float, float]
    extent: tuple[float, float]
    confidence: float


@dataclasses.dataclass(frozen=True)
class Reading:
    """A picture as read; `background` is None where no name fits."""

    background: str | None
    objects: tuple[Seen, ...]

    @property
    def confidence(self) -> float:
        """That of the worst object; 0 where something has no name."""
        named = self.background and all(o.shape and o.colour for o in self.objects)
        return min((o.confidence for o in self.objects), default=1.0) if named else 0.0

    @property
    def scene(self) -> Scene | None:
        """The scene, or None where the picture shows none: something without a name, no object or too many."""
        if not self.confidence:
            return None
        try:
            objects = tuple(Object(o.shape, o.colour, o.place) for o in self.objects)
            return Scene(self.background, objects)
        except ValueError:
            return None

    def attributes(self) -> dict[tuple[str, str], str | None]:
        """As `Scene.attributes`; None for what has no name and for a place with several objects."""
        facts = {("background", "colour"): self.background}
        for item in self.objects:
            alone = (item.place, "shape") not in facts
            facts[item.place, "shape"] = item.shape if alone else None
            facts[item.place, "colour"] = item.colour if alone else None
        return facts


def _shrink(image: np.ndarray) -> np.ndarray:
    """float32[h, w, 3] with a shorter side of less than twice `_FINE`: means of square blocks, what is left
    over at the far edges cut off."""
    factor = max(min(image.shape[:2]) // _FINE, 1)
    height, width = (n // factor for n in image.shape[:2])
    whole = image[: height * factor, : width * factor].astype(np.float32)
    return whole.reshape(height, factor, width, factor, 3).mean(axis=(1, 3))


def _nearest(
    rgb: np.ndarray, palette: np.ndarray, names: tuple[str, ...], reach: float
) -> str | None:
    """The name of the nearest colour of a palette, None beyond `reach`."""
    distances = np.linalg.norm(palette - rgb, axis=1)
    best = int(np.argmin(distances))
    return names[best] if distances[best] <= reach else None


def _unmix(pixels: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each pixel of float32[H, W, 3] the object colour that explains it best as a mixture with the
    background, int[H, W], and whether it is more object than background, bool[H, W]."""
    delta = pixels - background
    directions = _COLOUR_RGB - background
    length2 = np.sum(directions**2, axis=1)
    along = delta @ directions.T
    share = np.clip(along / length2, 0, 1.1)
    residual2 = np.sum(delta**2, axis=-1, keepdims=True) - share * (2 * along - share * length2)
    colour = np.argmin(residual2, axis=-1)
    best = np.take_along_axis(share, colour[..., None], axis=-1)[..., 0]
    return colour, (best > 0.5) | (np.min(residual2, axis=-1) > _FOREIGN**2)


def label(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Four-connected components of bool[H, W]: int32[H, W], 0 outside and 1..n inside, and n. Works on the runs
    of each row, joined to those that they touch in the row above."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    (rows, starts), (_, stops) = np.nonzero(edges == 1), np.nonzero(edges == -1)
    parents = list(range(len(rows)))

    def root(run: int) -> int:
        while parents[run] != run:
            parents[run] = parents[parents[run]]
            run = parents[run]
        return run

    runs = list(zip(rows.tolist(), starts.tolist(), stops.tolist(), strict=True))
    above = 0
    for run, (row, start, stop) in enumerate(runs):
        while runs[above][0] < row - 1 or (runs[above][0] == row - 1 and runs[above][2] <= start):
            above += 1
        touching = above
        while runs[touching][0] == row - 1 and runs[touching][1] < stop:
            parents[root(touching)] = root(run)
            touching += 1
    roots = [root(run) for run in range(len(runs))]
    numbers = {number: i + 1 for i, number in enumerate(dict.fromkeys(roots))}
    labels = np.zeros(mask.shape, np.int32)
    for (row, start, stop), number in zip(runs, roots, strict=True):
        labels[row, start:stop] = numbers[number]
    return labels, len(numbers)


def _blobs(colour: np.ndarray, foreground: np.ndarray, least: float) -> list[np.ndarray]:
    """Masks bool[H, W] of the connected blobs of at least `least` pixels; one that touches another of a
    different colour is told from it."""
    labels, _ = label(foreground)
    sizes = np.bincount(labels.ravel())
    blobs = []
    for number in np.nonzero(sizes >= least)[0]:
        if number == 0:
            continue
        mask = labels == number
        shares = np.bincount(colour[mask], minlength=len(_COLOUR_NAMES)) / sizes[number]
        several = np.nonzero(shares > _SECOND_COLOUR)[0]
        blobs += [mask & (colour == c) for c in several] if len(several) > 1 else [mask]
    return blobs


def _grown(mask: np.ndarray, by: int) -> np.ndarray:
    """bool[H, W] with all that lies at most `by` pixels from it along both axes."""
    for axis in (0, 1):
        wide = np.pad(mask, [(by, by) if axis == a else (0, 0) for a in (0, 1)])
        mask = np.lib.stride_tricks.sliding_window_view(wide, 2 * by + 1, axis).any(-1)
    return mask


class _Fit(NamedTuple):
    overlap: float
    shape: str
    x: float
    y: float
    radius: float
    gain: float


def _moments(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Area and centroid of weights [h, w] at x [w] and y [h]."""
    area = float(weights.sum())
    return area, float(weights.sum(0) @ x) / area, float(weights.sum(1) @ y) / area


def _unit_moments(shape: str) -> tuple[float, float, float]:
    """Area, x and y of the centroid of a shape of radius 1."""
    axis = (np.arange(320) + 0.5 - 160) / 128
    area, x, y = _moments(coverage(shape, axis[None] * 128, axis[:, None] * 128, 128.0), axis, axis)
    return area / 128**2, x, y


_UNIT = {shape: _unit_moments(shape) for shape in SHAPES}


def _softened(drawn: np.ndarray) -> np.ndarray:
    """The same [h, w] under a Gaussian of sigma 1 pixel."""
    padded = np.pad(drawn, 3)
    rows = sum(weight * padded[i : len(padded) - 6 + i] for i, weight in enumerate(_SOFT))
    return sum(weight * rows[:, i : rows.shape[1] - 6 + i] for i, weight in enumerate(_SOFT))


def _fits(weights: np.ndarray) -> list[_Fit]:
    """Each shape drawn with the area and centroid of weights [h, w], as sharp or soft as overlaps better; best
    overlap first."""
    x, y = (np.arange(n) + 0.5 for n in weights.shape[::-1])
    area, middle_x, middle_y = _moments(weights, x, y)
    fits = []
    for shape, (unit_area, unit_x, unit_y) in _UNIT.items():
        for soft in (False, True):
            gain = 1.0
            for _ in range(1 + soft):
                radius = (area / gain / unit_area) ** 0.5
                x0, y0 = middle_x - unit_x * radius, middle_y - unit_y * radius
                drawn = coverage(shape, x[None] - x0, y[:, None] - y0, radius)
                if soft:
                    drawn = _softened(drawn)
                    gain = max(float((drawn * weights).sum() / (drawn * drawn).sum()), 1.0)
            drawn = gain * drawn
            overlap = np.minimum(drawn, weights).sum() / np.maximum(drawn, weights).sum()
            fits.append(_Fit(float(overlap), shape, x0, y0, radius, gain))
    best = {fit.shape: fit for fit in sorted(fits)}
    return sorted(best.values(), reverse=True)


def _place(x: float, y: float) -> str:
    """Where shares of width and height lie."""
    row, column = (min(max(int(share * GRID), 0), GRID - 1) for share in (y, x))
    return PLACES[row * GRID + column]


def _see(pixels: np.ndarray, background: np.ndarray, mask: np.ndarray, others: np.ndarray) -> Seen:
    """The object whose pixels are bool[H, W] `mask`; `others` marks the pixels of other objects."""
    height, width = mask.shape
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    top, left = max(rows[0] - 2, 0), max(columns[0] - 2, 0)
    window = np.s_[top : rows[-1] + 3, left : columns[-1] + 3]
    delta = pixels[window] - background
    inside = delta[mask[window]]
    strength = np.linalg.norm(inside, axis=1)
    core = np.median(inside[strength >= np.median(strength)], axis=0)
    weights = np.clip(delta @ core / (core @ core), 0, 1) * ~others[window]
    best, second, *_ = _fits(weights)
    scale = best.radius / (RADIUS * min(height, width))
    clear = best.overlap >= _LEAST_OVERLAP and best.overlap - second.overlap >= _LEAST_LEAD
    middle = ((left + best.x) / width, (top + best.y) / height)
    return Seen(
        shape=best.shape if clear and _LEAST_RADIUS <= scale <= _MOST_RADIUS else None,
        colour=_nearest(best.gain * core + background, _COLOUR_RGB, _COLOUR_NAMES, _COLOUR_REACH),
        place=_place(*middle),
        middle=middle,
        extent=((columns[-1] + 1 - columns[0]) / width, (rows[-1] + 1 - rows[0]) / height),
        confidence=best.overlap,
    )


def _left_over(
    pixels: np.ndarray, background: np.ndarray, taken: np.ndarray, least: float
) -> list[Seen]:
    """Parts of the background of at least `least` pixels that are not of its colour, away from all blobs: another
    background, or what still shines through of an object. They have no name."""
    height, width = taken.shape
    other = np.linalg.norm(pixels - background, axis=-1) > _BACKGROUND_REACH
    labels, count = label(other & ~_grown(taken, _EDGE))
    found = []
    for number in range(1, count + 1):
        rows, columns = np.nonzero(labels == number)
        if len(rows) >= least:
            x, y = (columns.mean() + 0.5) / width, (rows.mean() + 0.5) / height
            extent = (np.ptp(columns) + 1) / width, (np.ptp(rows) + 1) / height
            found.append(Seen(None, None, _place(x, y), (x, y), extent, 0.0))
    return found


def read(image: np.ndarray) -> Reading:
    """Reads a picture uint8[H, W, 3]. Raises ValueError for anything else."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(
            f"picture: expected uint8[H, W, 3], found {image.dtype}{list(image.shape)}"
        )
    pixels = _shrink(image)
    background = np.median(pixels.reshape(-1, 3), axis=0)
    colour, foreground = _unmix(pixels, background)
    radius = RADIUS * min(foreground.shape)
    blobs = _blobs(colour, foreground, _SPECK * np.pi * radius**2)
    taken = np.sum(blobs, axis=0) if blobs else np.zeros(foreground.shape)
    seen = [_see(pixels, background, mask, taken > mask) for mask in blobs]
    seen += _left_over(pixels, background, taken > 0, _SPECK * np.pi * radius**2)
    name = _nearest(background, _BACKGROUND_RGB, _BACKGROUND_NAMES, _BACKGROUND_REACH)
    return Reading(name, tuple(seen))
