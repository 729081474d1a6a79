"""Settings shared by all tests: CPU, eight devices, float32 products in full, a compilation cache on disk."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
_CACHE = pathlib.Path(__file__).parent.parent / ".jax_cache"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(autouse=True, scope="session")
def _index(tmp_path_factory):
    """Indexes of data sets go where the tests' own files go."""
    os.environ["WEMMU_INDEX"] = str(tmp_path_factory.mktemp("index"))


@contextlib.contextmanager
def unoptimised() -> Iterator[None]:
    """Programs that XLA does not optimise, which are compiled three times faster than others."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
