"""Devices of a TPU that is not there: programs compile for it on any machine that has libtpu (requirements-tpu.txt).

What compiles is what runs: layouts, memory a chip and collectives are the real ones. Only time is not measured.
"""

import os
import re

import jax
from jax.experimental import topologies

# libtpu asks the machine which TPU it sits on; on one without a TPU it must be told. The topology's name overrules
# the accelerator's type. Several processes may compile at once.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# One device a chip, as programs see them; libtpu takes the two cores of a v4 for two devices unless told.
_CHIP_OPTIONS = {"v4": {"chip_config_name": "megacore"}}

_EXAMPLES = ("v4:2x2x4", "v5e:4x4", "v5p:2x2x1", "v5p:4x4x8", "v6e:16x16", "tpu7x:4x4x4")

_NAME = re.compile(r"(?P<generation>[a-z0-9]+):\d+(x\d+){1,2}")


def topology_devices(name: str, *, slices: int = 1) -> list[jax.Device]:
    """Devices to make a mesh of and to compile for; nothing can run on them.

    Args:
      name: generation and chips along each axis: "v5p:2x2x2", "v6e:16x16", "v5e:4x4", "tpu7x:2x2x2".
      slices: how many such; the devices of a slice follow one another.

    Raises:
      ValueError: no such topology, or fewer slices than one.
      ModuleNotFoundError: libtpu is not installed.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"no TPU topology {name!r}; expected generation:chips, like v5p:2x2x2 or v6e:4x4 "
            "(v5p-8 is the name of a machine, not of a topology)"
        )
    if slices < 1:
        raise ValueError(f"expected at least 1 slice, found {slices}")
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    options = _CHIP_OPTIONS.get(match["generation"], {}) | {"num_slices": slices}
    try:
        return list(topologies.get_topology_desc(name, platform="tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"no TPU topology {name!r}: {error}; these exist, among others: {', '.join(_EXAMPLES)}"
        ) from error
    except RuntimeError as error:
        raise ModuleNotFoundError(
            "compiling for a TPU needs libtpu: pip install -r requirements-tpu.txt"
        ) from error
