"""The paper's model at its real size: no weights are made, every program of training is lowered for eight devices,
and, in the slow tests, compiled for a TPU that is not there."""

import jax
import pytest

from benchmarks.compile_tpu import compiled, programs
from configs.wemmu_3b import STAGES
from wemmu_jax.models.wemmu.config import VAEStream
from wemmu_jax.sharding.topology import topology_devices

V5P_BYTES = 95.74e9  # what the compiler lets a program use of a v5p chip
ROWS = {512: 32, 1024: 16}
STREAMS = [stream.value for stream in VAEStream]


def programs_of(stage: str, stream: str, devices: list):
    return list(programs(stage, stream, devices, rows=ROWS, fsdp=8, text_length=128))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("stream", STREAMS)
def test_every_program_of_a_stage_lowers(stage, stream):
    found = programs_of(stage, stream, jax.devices())
    wanted = {"stage4": {0, 1, 2}}.get(stage, {0, 1})
    assert {p.arity for p in found if p.name == "accumulate"} == wanted
    assert {p.name for p in found} == {"encode", "encode src", "accumulate", "update"}
    accumulated = [p for p in found if p.name == "accumulate"]
    assert len({p.fingerprint for p in accumulated}) == len(accumulated)


COMPILED = {}  # stages 2 and 3 run the same program


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("stream", STREAMS)
def test_the_widest_step_of_a_stage_compiles_for_a_v5p_and_fits(stage, stream):
    """`python -m benchmarks.compile_tpu v5p:2x2x2` compiles the narrower micro-batches and the encoder too."""
    with jax.default_matmul_precision("default"):
        found = programs_of(stage, stream, topology_devices("v5p:2x2x2"))
        *_, widest, update = found
        assert (widest.name, update.name) == ("accumulate", "update")
        for program in (widest, update):
            key = program.fingerprint
            if key not in COMPILED:
                COMPILED[key] = compiled(program.lowered).memory
            peak = COMPILED[key].argument_size_in_bytes + COMPILED[key].temp_size_in_bytes
            assert 0 < peak < V5P_BYTES, (program.name, program.arity, peak)


@pytest.mark.parametrize("name", ["v5p-8", "v5p", "v5p:", "5p:2x2x2 "])
def test_what_is_no_name_of_a_topology_is_an_error(name):
    with pytest.raises(ValueError, match="expected generation:chips"):
        topology_devices(name)


def test_without_libtpu_the_error_says_what_to_install(monkeypatch):
    def missing(*_, **__):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", missing)
    with pytest.raises(ModuleNotFoundError, match=r"requirements-tpu\.txt"):
        topology_devices("v5p:2x2x2")


@pytest.mark.slow
def test_a_topology_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="no TPU topology 'v9:2x2'"):
        topology_devices("v9:2x2")
