"""What is known of the kinds of TPU, and of GPUs their peak. Every number is of one JAX device: a whole chip, on
TPU7x half of one.

Sources. Peak, HBM, ICI and DCN: the kinds' pages in Google's Cloud TPU documentation. They print ICI as the sum over
all links and both directions; here it is one link, one way. Where a page has no DCN: v5e the pod's 6.4 Tb/s over 256
chips, v4 as v5p. Its links too are not there: half of v5p's. Memory: what libtpu 0.0.42 says that it has in the error
of a program that is too large. Clock: that at which XLA's cycles for an 8192^3 product read 93% (v4), 88% (v5e),
90% (v5p), 70% (v6e) and 81% (TPU7x) of peak, and peak / clock is a whole number of matrix units. The host's
bandwidth is a guess (PCIe).
"""

import dataclasses

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of device.

    Attributes:
      clock: cycles a second that XLA's estimates are divided by.
      peak: bfloat16 FLOP/s.
      memory: bytes that the compiler lets a program use.
      bandwidth: of HBM, bytes/s.
      link: ICI, bytes/s of one link in one direction.
      ring: a torus axis whose length is a multiple of this is closed: its ends are joined.
      network: DCN, bytes/s.
      host: between HBM and the host's memory, bytes/s.
    """

    clock: float
    peak: float
    memory: float
    bandwidth: float
    link: float
    ring: int
    network: float
    host: float


# By `device_kind`.
CHIPS = {
    "TPU v4": Chip(1.05e9, 275e12, 30.75 * GIB, 1.2e12, 50e9, 4, 6.25e9, 16e9),
    "TPU v5 lite": Chip(1.5e9, 197e12, 15.75 * GIB, 819e9, 50e9, 16, 3.125e9, 16e9),
    "TPU v5": Chip(1.75e9, 459e12, 95.74 * GIB, 2.765e12, 100e9, 4, 6.25e9, 16e9),
    "TPU v6 lite": Chip(1.75e9, 918e12, 31.25 * GIB, 1.638e12, 100e9, 16, 12.5e9, 32e9),
    "TPU7x": Chip(2.2e9, 1153.5e12, 94.75 * GIB, 3.69e12, 50e9, 4, 6.25e9, 32e9),
}


def chip_of(device: jax.Device) -> Chip:
    """The chip of a device.

    Raises:
      ValueError: nothing is known of its kind.
    """
    if device.device_kind not in CHIPS:
        raise ValueError(
            f"nothing is known of the speed of {device.device_kind!r}; known: {sorted(CHIPS)}"
        )
    return CHIPS[device.device_kind]


# bfloat16 FLOP/s of GPUs, dense, by what their kind begins with; NVIDIA's data sheets.
_GPU_PEAKS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989.5e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989.5e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 FLOP/s that a device can do at most; None where nobody says, as of CPUs and of
    parts of a GPU (MIG)."""
    if device_kind in CHIPS:
        return CHIPS[device_kind].peak
    if " MIG " in device_kind:
        return None
    return next((peak for kind, peak in _GPU_PEAKS.items() if device_kind.startswith(kind)), None)
