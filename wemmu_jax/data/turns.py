"""Who is next: the order in which classes with given shares take turns, so that at no time is one more than a
turn ahead of its share or behind it.

Giving the next turn to whoever is furthest behind does not keep that bound with three classes or more. This does:
turn k of a class with share w (k = 0, 1, ...) is due in the window of slots floor(k / w) .. ceil((k + 1) / w) - 1,
and each slot goes to the open turn whose window ends first. A turn inside its window means exactly that the class
is off by less than one; and since the fluid schedule, which gives every class w of each slot, fits all turns into
their windows, unit jobs by earliest deadline fit too (Baruah et al., "Proportionate progress", 1996).
"""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

# A longer period than this is rounded to it: shares are then off by at most 1e-5.
MAX_PERIOD = 2**17


def exact(weight: float | Fraction) -> Fraction:
    """The fraction that a weight in a config means: 0.1 is a tenth."""
    return Fraction(weight).limit_denominator(10**6)


def whole_shares(weights: Sequence[Fraction], max_period: int = MAX_PERIOD) -> tuple[int, ...]:
    """Whole numbers in the proportion of `weights` (all positive), by largest remainder where that needs more than
    `max_period` in all; none becomes zero."""
    total = sum(weights)
    shares = [weight / total for weight in weights]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= max_period:
        return tuple(int(share * period) for share in shares)
    whole = [max(math.floor(share * max_period), 1) for share in shares]
    short = sorted(range(len(shares)), key=lambda i: (whole[i] - shares[i] * max_period, i))
    for i in short[: max(max_period - sum(whole), 0)]:
        whole[i] += 1
    return tuple(whole)


class Turns:
    """The endless order of turns of classes 0..K-1. Any slot and any count is had in constant time: the order has
    the period sum(shares), after which every class has had exactly its share."""

    def __init__(self, weights: Sequence[Fraction], max_period: int = MAX_PERIOD):
        self.shares = whole_shares(weights, max_period)
        self._period = sum(self.shares)
        self._owners = _one_period(self.shares)
        taken = self._owners[:, None] == np.arange(len(self.shares))
        self._before = np.zeros((self._period + 1, len(self.shares)), np.int32)
        np.cumsum(taken, axis=0, out=self._before[1:])

    def owner(self, slots: np.ndarray) -> np.ndarray:
        """The class that each of `slots` (int64, any shape) belongs to."""
        return self._owners[slots % self._period]

    def counts(self, slots: np.ndarray) -> np.ndarray:
        """int64[..., K]: how many slots before each of `slots` belong to each class."""
        periods, rest = np.divmod(np.asarray(slots, np.int64), self._period)
        return periods[..., None] * np.array(self.shares) + self._before[rest]


def _one_period(shares: Sequence[int]) -> np.ndarray:
    period = sum(shares)
    closed = [(0, i) for i in range(len(shares))]  # heaps: (first slot of the window, class)
    open_turns: list[tuple[int, int]] = []  # and (end of the window, class)
    taken = [0] * len(shares)
    owners = np.empty(period, np.int32)
    for slot in range(period):
        while closed and closed[0][0] <= slot:
            i = heapq.heappop(closed)[1]
            heapq.heappush(open_turns, (-(-(taken[i] + 1) * period // shares[i]), i))
        i = heapq.heappop(open_turns)[1]
        owners[slot] = i
        taken[i] += 1
        heapq.heappush(closed, (taken[i] * period // shares[i], i))
    return owners
