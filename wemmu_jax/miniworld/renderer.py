"""Draws scenes: signed distances in units of a shape's radius, antialiased over one pixel.

Outside a corner the distances are those to the nearest line, not to the corner, so corners stay sharp.

Image coordinates, y downwards; a shape reaches about 1 from its middle. Its radius is a share of the picture's
shorter side, so shapes are never stretched, while places follow width and height.
"""

import functools
from collections.abc import Callable

import numpy as np

from wemmu_jax.miniworld.scene import BACKGROUNDS, COLOURS, GRID, Object, Scene, cell

RADIUS = 0.135
Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _disc(radius: float, x0: float = 0.0, y0: float = 0.0) -> Distance:
    return lambda x, y: np.hypot(x - x0, y - y0) - radius


def _ring(outer: float, inner: float) -> Distance:
    return lambda x, y: np.abs(np.hypot(x, y) - (outer + inner) / 2) - (outer - inner) / 2


def _convex(*corners: tuple[float, float]) -> Distance:
    """Inside all of its edges' lines; the corners go clockwise as seen."""
    start = np.array(corners, np.float32)
    edge = np.roll(start, -1, axis=0) - start
    normal = np.stack([edge[:, 1], -edge[:, 0]]) / np.linalg.norm(edge, axis=1)
    (normal_x, normal_y), reach = normal[..., None, None], np.sum(normal.T * start, axis=1)
    return lambda x, y: np.max(normal_x * x + normal_y * y - reach[:, None, None], axis=0)


def _star(outer: float, y0: float) -> Distance:
    """A pentagram: inside at least four of its five lines."""
    turns = np.arange(5) * 0.4 * np.pi
    normal_x, normal_y = np.float32([np.sin(turns), -np.cos(turns)])[..., None, None]
    reach = outer * np.cos(0.4 * np.pi)
    return lambda x, y: np.sort(normal_x * x + normal_y * (y - y0) - reach, axis=0)[-2]


def _box(half_width: float, half_height: float) -> Distance:
    return lambda x, y: np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _union(*parts: Distance) -> Distance:
    return lambda x, y: functools.reduce(np.minimum, [part(x, y) for part in parts])


def _heart(side: float, y0: float) -> Distance:
    """A square on its corner with a disc on each of the two upper sides."""
    corner, middle = side / np.sqrt(2), side / np.sqrt(8)
    return _union(
        _convex((0, y0 - corner), (corner, y0), (0, y0 + corner), (-corner, y0)),
        _disc(side / 2, -middle, y0 - middle),
        _disc(side / 2, middle, y0 - middle),
    )


_DISTANCES: dict[str, Distance] = {
    "circle": _disc(0.92),
    "square": _box(0.8, 0.8),
    "triangle": _convex((0, -0.9), (0.98, 0.8), (-0.98, 0.8)),
    "star": _star(outer=1.1, y0=0.1),
    "cross": _union(_box(0.95, 0.33), _box(0.33, 0.95)),
    "diamond": _convex((0, -1), (0.85, 0), (0, 1), (-0.85, 0)),
    "ring": _ring(outer=0.97, inner=0.5),
    "heart": _heart(side=1.13, y0=0.12),
}


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """How much of each pixel a shape covers, float32 in [0, 1]. x and y: pixel middles as seen from the
    shape's middle, in pixels, broadcast against each other; radius in pixels."""
    x, y = np.float32(x / radius), np.float32(y / radius)
    return np.clip(np.float32(0.5) - np.float32(radius) * _DISTANCES[shape](x, y), 0, 1)


def place_middle(place: str) -> tuple[float, float]:
    """Middle of a place as shares (x, y) of width and height."""
    row, column = cell(place)
    return (column + 0.5) / GRID, (row + 0.5) / GRID


def _draw(canvas: np.ndarray, item: Object) -> None:
    height, width = canvas.shape[:2]
    short = min(height, width)
    radius = RADIUS * short
    x_share, y_share = place_middle(item.place)
    x = x_share * width + item.offset[0] * short
    y = y_share * height + item.offset[1] * short
    reach = 1.1 * radius + 1
    left, right = max(int(x - reach), 0), min(int(x + reach) + 1, width)
    top, bottom = max(int(y - reach), 0), min(int(y + reach) + 1, height)
    columns = np.arange(left, right) + 0.5 - x
    rows = np.arange(top, bottom) + 0.5 - y
    alpha = coverage(item.shape, columns[None, :], rows[:, None], radius)[..., None]
    window = canvas[top:bottom, left:right]
    window += alpha * (np.float32(COLOURS[item.colour]) - window)


def render(scene: Scene, height: int, width: int) -> np.ndarray:
    """The scene as uint8[height, width, 3], RGB; the same bytes for the same arguments."""
    canvas = np.empty((height, width, 3), np.float32)
    canvas[:] = BACKGROUNDS[scene.background]
    for item in scene.objects:
        _draw(canvas, item)
    return np.rint(canvas).astype(np.uint8)
