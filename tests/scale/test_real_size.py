"""The paper's model at its real size: no weights are made, every program of training is lowered for eight devices,
and, in the slow tests, compiled for a TPU that is not there."""

import jax
import pytest

from configs.wemmu_3b import STAGES
from wemmu_jax.models.wemmu.config import VAEStream
from wemmu_jax.planning import programs
from wemmu_jax.planning.chips import CHIPS
from wemmu_jax.planning.memory import memory
from wemmu_jax.planning.plan import ONCE
from wemmu_jax.planning.programs import Key, Setting, compile_program
from wemmu_jax.planning.shapes import shares, squarest
from wemmu_jax.sharding.topology import topology_devices

ROWS = {512: 32, 1024: 16}
STREAMS = [stream.value for stream in VAEStream]


def setting(stage: str, stream: str, topology: str = "v5p:2x2x2") -> Setting:
    rows = ROWS[STAGES[stage]["data.resolution"]]
    overrides = {"batch.rows": rows, "mesh.fsdp": 8, "model.bridge.vae_stream": stream}
    return Setting.of(f"configs/wemmu_3b.py:{stage}", overrides, topology=topology)


def keys(of: Setting) -> list[Key]:
    """The programs of a stage at its square bucket."""
    found = shares(of)
    squares = {squarest(found, shape.arity) for shape in found}
    return [*dict.fromkeys(key for shape in squares for key in shape.programs), *ONCE]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("stream", STREAMS)
def test_every_program_of_a_stage_lowers(stage, stream, monkeypatch):
    monkeypatch.setattr(programs, "topology_devices", lambda name, slices: jax.devices())
    of = setting(stage, stream)
    lowered = {key: of.lower(key).as_text() for key in keys(of)}
    wanted = {"stage4": {0, 1, 2}}.get(stage, {0, 1})
    assert {key.arity for key in lowered if key.name == "accumulate"} == wanted
    names = {"encode target", "encode source", "accumulate", "update", "zero"}
    assert {key.name for key in lowered} == names
    accumulated = [text for key, text in lowered.items() if key.name == "accumulate"]
    assert len(set(accumulated)) == len(accumulated)


COMPILED = {}  # stages 2 and 3 run the same program


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("stream", STREAMS)
def test_the_widest_step_of_a_stage_compiles_for_a_v5p_and_fits(stage, stream):
    """`wemmu plan` compiles the narrower micro-batches and the encoder too."""
    of = setting(stage, stream)
    found = {}
    with jax.default_matmul_precision("default"):
        wide = max((key for key in keys(of) if key.name == "accumulate"), key=lambda key: key.arity)
        for key in (wide, Key("update")):
            lowered = of.lower(key)
            name = of.fingerprint(lowered)
            if name not in COMPILED:
                COMPILED[name] = compile_program(lowered, draft=False)
            found[key] = COMPILED[name]
    assert not any(one.too_large for one in found.values())
    assert 0 < sum(memory(of, found).values()) < CHIPS["TPU v5"].memory


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
