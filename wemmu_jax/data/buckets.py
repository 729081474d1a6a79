"""Aspect-ratio buckets: the few picture sizes that a base resolution is trained at.

XLA compiles a program for each shape, so a picture goes to the bucket whose aspect is nearest to its own, and a
micro-batch has one bucket.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

# Sizes that are looked at together, so that twenty-five million take little memory.
_AT_ONCE = 1 << 20


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """A picture size in pixels."""

    height: int
    width: int

    @property
    def log_aspect(self) -> float:
        """log(height / width), the measure in which portrait and landscape are alike."""
        return float(np.log(self.height / self.width))


def make_buckets(
    base: int, *, multiple: int, count: int = 9, max_ratio: float = 4.0
) -> tuple[Bucket, ...]:
    """Buckets of about base^2 pixels with log-spaced aspects, from wide to tall, the square among them.

    Args:
      base: side of the square bucket.
      multiple: both sides are multiples of it (the DC-AE's ratio).
      count: how many, odd; 1 is the square alone. Sizes that rounding makes equal are one bucket.
      max_ratio: aspect of the outermost ones.
    """
    if base % multiple or base <= 0:
        near = max(round(base / multiple), 1) * multiple
        raise ValueError(
            f"base resolution {base} is no multiple of {multiple}; the nearest is {near}"
        )
    if count < 1 or count % 2 == 0:
        raise ValueError(
            f"the number of buckets must be odd, so that the square is one; found {count}"
        )
    if max_ratio < 1:
        raise ValueError(
            f"max_ratio is height / width of the tallest bucket, >= 1; found {max_ratio}"
        )
    roots = max_ratio ** np.linspace(-0.5, 0.5, count) if count > 1 else np.ones(1)
    found = {
        Bucket(_round_to(base * root, multiple), _round_to(base / root, multiple)) for root in roots
    }
    return tuple(sorted(found, key=lambda bucket: bucket.log_aspect))


def nearest_indices(buckets: Sequence[Bucket], sizes: np.ndarray) -> np.ndarray:
    """For pictures of `sizes` [N, 2] (height, width): int16[N], the index of the bucket nearest in log aspect."""
    order = np.argsort([bucket.log_aspect for bucket in buckets], kind="stable")
    aspects = np.array([bucket.log_aspect for bucket in buckets])[order]
    middles = (aspects[1:] + aspects[:-1]) / 2
    found = np.empty(len(sizes), np.int16)
    for start in range(0, len(sizes), _AT_ONCE):
        part = sizes[start : start + _AT_ONCE]
        found[start : start + len(part)] = np.searchsorted(middles, np.log(part[:, 0] / part[:, 1]))
    return order.astype(np.int16)[found]


def nearest(buckets: Sequence[Bucket], height: int, width: int) -> Bucket:
    """The bucket whose aspect is nearest to height x width."""
    return buckets[nearest_indices(buckets, np.array([[height, width]]))[0]]


def merge(counts: np.ndarray, minimum: np.ndarray) -> np.ndarray:
    """Which bucket each bucket's pictures go to, so that no bucket that is left is short of pictures.

    The emptiest bucket that is short joins the fuller one of its neighbours, until none is short or one is left.

    Args:
      counts: int[G, N], pictures of each of G groups in each of N buckets, which lie in the order of their aspect.
      minimum: int[G], what each group must have in every bucket.

    Returns:
      int64[N]; a bucket that is left maps to itself.
    """
    counts, home = counts.copy(), np.arange(counts.shape[1])
    left = list(home)
    while len(left) > 1:
        short = [bucket for bucket in left if (counts[:, bucket] < minimum).any()]
        if not short:
            break
        poor = min(short, key=lambda bucket: counts[:, bucket].sum())
        place = left.index(poor)
        neighbours = left[max(place - 1, 0) : place] + left[place + 1 : place + 2]
        into = max(neighbours, key=lambda bucket: counts[:, bucket].sum())
        counts[:, into] += counts[:, poor]
        home[home == poor] = into
        left.remove(poor)
    return home


def _round_to(value: float, multiple: int) -> int:
    return max(round(value / multiple), 1) * multiple
