"""Plans of a TPU on a machine whose libtpu is not there."""

import jax
import pytest

from tests.planning.samples import torus
from wemmu_jax.planning import programs
from wemmu_jax.planning.chips import CHIPS


@pytest.fixture
def cpu_for_tpu(monkeypatch):
    """Eight CPU devices for those of a v5e, and a version for libtpu."""
    monkeypatch.setattr(programs.importlib.metadata, "version", lambda name: "1")
    monkeypatch.setattr(programs, "topology_devices", lambda name, slices: jax.devices())
    monkeypatch.setattr("wemmu_jax.planning.plan.chip_of", lambda device: CHIPS["TPU v5 lite"])
    monkeypatch.setattr(
        "wemmu_jax.planning.plan.Torus.of", lambda devices, chip: torus(2, 2, cores=2)
    )
