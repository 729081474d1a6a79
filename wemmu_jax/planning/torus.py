"""Where the devices of a mesh sit, and how long a collective between some of them takes."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from wemmu_jax.planning.chips import Chip
from wemmu_jax.planning.collectives import Collective

# Times that a device sends the array, on its way through all but one n-th of the group.
_PASSES = {"all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "all-reduce": 2}


@dataclasses.dataclass(frozen=True, eq=False)
class Torus:
    """Devices in the order of the mesh.

    Attributes:
      places: int[devices, axes], of each device in its slice; the last axis runs inside a chip.
      slices: int[devices].
      chip: their kind.
    """

    places: np.ndarray
    slices: np.ndarray
    chip: Chip

    @classmethod
    def of(cls, devices: Sequence[jax.Device], chip: Chip) -> "Torus":
        """Of TPU devices; the two of a TPU7x chip count as neighbours along one more axis."""
        places = np.array([(*one.coords, one.core_on_chip) for one in devices])
        slices = np.array([getattr(one, "slice_index", None) or 0 for one in devices])
        return cls(places, slices, chip)

    @functools.cached_property
    def sides(self) -> np.ndarray:
        """Devices along each axis of a slice."""
        return self.places.max(axis=0) - self.places.min(axis=0) + 1

    @functools.cached_property
    def _rings(self) -> np.ndarray:
        """Whether the ends of each axis are joined. Chips that are cabled in cubes of 4 x 4 x 4 (v4, v5p, TPU7x) join
        none in a slice that is less than a cube along any axis."""
        rings = self.sides % self.chip.ring == 0
        in_cubes = self.chip.ring == 4
        return rings & rings[:3].all() if in_cubes else rings

    @property
    def chips(self) -> int:
        """Chips that the devices are on."""
        return len(np.unique(np.column_stack([self.slices, self.places[:, :-1]]), axis=0))

    def bandwidth(self, group: Sequence[int]) -> float:
        """ICI bytes/s of a device towards the others of its group: one link for each axis along which the group
        lies, two where the group fills a closed axis."""
        places = self.places[list(group)]
        extent = np.array([len(np.unique(column)) for column in places.T])
        closed = (extent == self.sides) & self._rings
        return float(((extent > 1) * (1 + closed)).sum()) * self.chip.link

    def seconds(self, collective: Collective) -> float:
        """Without latency, and with every link free.

        Between slices, the devices of a slice share the work: each sends its part of the array over DCN.
        """
        if collective.kind == "collective-permute":
            # All wait for the slowest pair.
            crosses = np.diff(self.slices[collective.pairs], axis=1).any()
            return collective.bytes / (self.chip.network if crosses else self.chip.link)
        group = np.array(collective.group)
        slices = self.slices[group]
        count, inside = len(np.unique(slices)), group[slices == slices[0]]
        moved = _PASSES[collective.kind] * collective.bytes
        seconds = 0.0
        if len(inside) > 1:
            seconds += moved * (1 - 1 / len(inside)) / self.bandwidth(inside)
        if count > 1:
            seconds += moved / len(inside) * (1 - 1 / count) / self.chip.network
        return seconds
