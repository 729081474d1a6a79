"""What cannot be planned, and what does not fit: the errors say what would work."""

import dataclasses
import math

import jax
import pytest

from tests.planning.golden import CASES
from tests.planning.samples import setting
from wemmu_jax.planning import memory
from wemmu_jax.planning.chips import GIB, chip_of
from wemmu_jax.planning.plan import DoesNotFit, plan_stage
from wemmu_jax.planning.predict import Times
from wemmu_jax.planning.programs import Compiled, Key, Library, Setting, compile_program
from wemmu_jax.planning.search import POLICIES, search
from wemmu_jax.training.curriculum import load_config

pytestmark = pytest.mark.usefixtures("cpu_for_tpu")


def test_the_compilers_complaint_is_kept():
    class TooLarge:
        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
                "(400.00G) exceeds available HBM (95.74G).\nMore."
            )

    found = compile_program(TooLarge(), draft=False)
    assert found.memory["temporaries"] == 400 * GIB and "95.74G" in found.too_large


@pytest.mark.parametrize(
    "said",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 32.42M of 16.00M vmem.",
        "RESOURCE_EXHAUSTED: Scoped allocation with size 20.1M exceeded scoped vmem limit by 4.1M.",
        "INTERNAL: Mosaic failed to compile TPU kernel",
    ],
)
def test_a_program_that_fails_is_not_one_that_is_too_large(tmp_path, monkeypatch, said):
    """A kernel that takes too much of a core's own memory is not mended by fewer rows."""

    class Fails:
        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError(f"{said}\nMore.")

        def as_text(self):
            return "a program"

    monkeypatch.setattr(Setting, "lower", lambda self, key: Fails())
    with pytest.raises(ValueError) as error:
        Library(tmp_path).compile(setting(), [Key("update")])
    assert str(error.value) == f"update: the compiler fails: {said}"
    assert not list(tmp_path.iterdir())


def told(tmp_path, stage: str, **overrides) -> str:
    with pytest.raises(ValueError) as error:
        plan_stage(setting(stage, **overrides), Library(tmp_path))
    return str(error.value)


def test_a_mesh_that_does_not_divide_the_devices(tmp_path):
    said = told(tmp_path, "stage1", **{"mesh.fsdp": 3})
    assert said == "mesh.fsdp=3 does not divide 8 devices (cpu); possible: [1, 2, 4, 8]"


def test_rows_that_the_mesh_does_not_divide(tmp_path):
    said = told(tmp_path, "stage1", **{"batch.rows": 12})
    assert "batch.rows=12 does not divide over 8 devices" in said and "[8, 16]" in said


@pytest.mark.parametrize("name", CASES)
def test_golden_cases_can_be_planned(name):
    """What is to be planned is a batch that its devices divide, and the paper's."""
    case = CASES[name]
    chips = math.prod(map(int, case.topology.partition(":")[2].split("x")))
    config = case.setting.config
    assert config.batch.rows % chips == 0
    paper = load_config(f"configs/wemmu_3b.py:{case.stage}").batch
    assert config.batch.rows * config.batch.micro_batches == paper.rows * paper.micro_batches


def test_held_out_rows_that_the_mesh_does_not_divide(tmp_path):
    """As `wemmu train` says it, once there is something to validate on."""
    held_out = {"data.held_out": ("none.yaml",), "validation_rows": 12}
    said = told(tmp_path, "stage1", **held_out)
    assert "validation_rows=12 does not divide over 8 devices" in said and "[8, 16]" in said


def test_weights_that_do_not_fit(tmp_path):
    said = told(tmp_path, "stage2", **{"mesh.fsdp": 2})
    assert "stage2 does not fit v5e:2x4: what lies there all the time needs" in said
    assert "mesh.fsdp=8 would leave room" in said
    assert "of 15.75" in said


def too_large(library, setting, keys, processes):
    complaint = {"temporaries": 20 * GIB, "outputs": 0, "aliased": 0}
    return {key: Compiled("", 1.0, complaint, "RESOURCE_EXHAUSTED") for key in keys}


def test_a_program_that_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(Library, "compile", too_large)
    said = told(tmp_path, "stage1", **{"batch.rows": 32, "mesh.fsdp": 8})
    assert "accumulate, 0 sources, 512x512: the program needs 20.0 GiB a device of 15.75" in said
    assert "about batch.rows=8 would" in said


def test_what_would_fit_is_less_than_what_does_not():
    """The micro-batches themselves may be all that is too much."""
    tight, weights = setting(**{"batch.rows": 32}), memory.resident(setting(**{"batch.rows": 32}))
    available = sum(weights.values()) + GIB
    assert "about batch.rows=24 would" in memory.what_fits(tight, 0.99 * GIB, available)
    said = memory.what_fits(
        setting(**{"mesh.fsdp": 2, "mesh.tensor": 2}), GIB, 0.3 * sum(weights.values())
    )
    assert "mesh.fsdp=" in said and "on slices of" in said


def test_nothing_that_search_tries_fits(tmp_path, monkeypatch):
    monkeypatch.setattr(Library, "compile", too_large)
    lines = []
    with pytest.raises(DoesNotFit, match="no setting that was tried fits v5e:2x4"):
        search(setting(**{"mesh.fsdp": 4}), Library(tmp_path), say=lines.append)
    rows = [line.partition(",")[0] for line in lines]
    assert rows[:2] == ["rows=768", "rows=576"] and rows[-2:] == ["rows=8", "rows=8"]
    assert "fsdp=8" in lines[-1] and len(lines) % len(POLICIES) == 0


@dataclasses.dataclass
class Predicted:
    """What `search` reads of a plan."""

    times: Times
    spare: float


def test_search_finds_the_fastest_that_fits(monkeypatch):
    """Many rows are fast and take memory, fsdp=2 is best, and remat "dots" is faster than "full"."""
    costs = {"dots": (1.1, 4), "named": (1.15, 2), "offload": (1.3, 0), "none": (1.0, 100)}

    def plan(of, library, processes):
        rows, fsdp, remat = of.config.batch.rows, of.config.mesh.fsdp, of.config.model.remat
        assert rows * of.config.batch.micro_batches == 2304
        slow, kept = costs.get(remat, (1.2, 1))
        seconds = slow * (1 + 1 / rows + abs(fsdp - 2) / 10)
        if remat == "none":
            raise DoesNotFit("the compiler says no")
        return Predicted(Times(raw_overlapped=seconds), spare=1000 - rows * kept)

    monkeypatch.setattr("wemmu_jax.planning.search.plan_stage", plan)
    lines = []
    best, found = search(setting(), None, say=lines.append)
    assert (best.config.batch.rows, best.config.mesh.fsdp, best.config.model.remat) == (
        192,
        2,
        "dots",
    )
    assert found.spare >= 0
    assert len(lines) == len(set(lines)), "a setting was tried twice"


def test_a_chip_of_which_nothing_is_known():
    with pytest.raises(ValueError, match="nothing is known of the speed of 'cpu'"):
        chip_of(jax.devices()[0])
