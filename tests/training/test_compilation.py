"""What a launch compiles, the next one finds."""

import jax
import pytest

from tests.training.members import ended, start, train_words
from wemmu_jax.cli import train

# One program for the gradient instead of two: text to picture alone.
SHORT = {"data.mixture.Rec": 0.0, "data.mixture.Uncond": 0.0, "batch.micro_batches": 1}
VARIABLES = (
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES",
)


@pytest.mark.slow
def test_the_next_launch_compiles_none(config_of, tmp_path):
    """Beside the workdir lies every program, those of a millisecond too, and the second run adds none."""
    config = config_of("stage1", **SHORT, **{"optimizer.steps": 1, "optimizer.warmup": 0})
    found = []
    for name in ("one", "two"):
        words = train_words(config, tmp_path / name)
        [(code, _, error)] = ended(start([words], devices=1, unset=VARIABLES))
        assert code == 0, error
        found.append({file.name for file in (tmp_path / "compilation_cache").iterdir()})
    assert found[0] == found[1]
    for program in ("jit_step", "jit_encode", "jit_update", "jit_zeros", "jit__create"):
        assert any(file.startswith(f"{program}-") for file in found[0]), program


def test_what_the_environment_says_goes_first(tmp_path, monkeypatch):
    set_ = {}
    monkeypatch.setattr(jax.config, "update", lambda name, value: set_.update({name: value}))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    train._keep_programs(tmp_path)
    assert set_ == {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    set_.clear()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    train._keep_programs(tmp_path)
    assert "jax_compilation_cache_dir" not in set_ and len(set_) == 2
