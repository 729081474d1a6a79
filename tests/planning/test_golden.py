"""Plans of the paper's stages against what they said when they were last looked at."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tests.planning.golden import CASES, described
from wemmu_jax.planning.plan import StagePlan, plan_stage
from wemmu_jax.planning.predict import Prediction, Predictor, Times
from wemmu_jax.planning.programs import Compiled, Library, Setting

PLANNED = [name for name, case in CASES.items() if case.file.exists()]
KINDS = {"v5p": "TPU v5", "v6e": "TPU v6 lite"}


def read(name: str) -> dict:
    return json.loads(CASES[name].file.read_text())


@pytest.mark.parametrize("name", PLANNED)
def test_the_golden_file_says_that_it_fits_and_little_is_padded_or_recomputed(name):
    """That the program is still this one is for the slow test to say."""
    golden = read(name)
    assert golden["spare_gib"] > 0
    assert golden["program_teraflops"] / golden["model_teraflops"] <= 1.35


@pytest.mark.parametrize("name", PLANNED)
def test_the_golden_file_says_that_weights_are_gathered_and_nothing_is_dealt_out_anew(name):
    """An all-to-all would be rows, tokens or features that change places."""
    kinds = {kind for found in read(name)["collectives"].values() for kind in found}
    assert "all-gather" in kinds and "all-to-all" not in kinds


@dataclasses.dataclass(frozen=True)
class Device:
    """One of a TPU that is not there, without libtpu."""

    id: int
    coords: tuple[int, ...]
    device_kind: str
    core_on_chip: int = 0
    process_index: int = 0
    platform: str = "tpu"


def devices(topology: str, **_) -> list[Device]:
    generation, _, sides = topology.partition(":")
    places = np.ndindex(*map(int, sides.split("x")))
    return [Device(i, coords, KINDS[generation]) for i, coords in enumerate(places)]


class Known(Library):
    """Programs that need what the file says; their text is their name."""

    def __init__(self, golden: dict):
        self._programs = golden["programs"]

    def compile(self, setting: Setting, keys, *, processes: int = 1) -> dict:
        return {
            key: Compiled(
                text=str(key),
                seconds=0.0,
                memory={
                    "temporaries": round(self._programs[str(key)]["beside_gib"] * 2**30),
                    "outputs": 0,
                    "aliased": 0,
                },
            )
            for key in keys
        }


@pytest.mark.parametrize("name", PLANNED)
def test_what_needs_no_compiler_is_the_same(name, monkeypatch):
    """Weights, optimizer and micro-batches on a device, model FLOPs, and how often each program runs: of the code as it
    is; only what the compiler makes of a program is the file's."""
    golden, case = read(name), CASES[name]
    monkeypatch.setattr("wemmu_jax.planning.programs.topology_devices", devices)
    monkeypatch.setattr("wemmu_jax.planning.plan.read_program", lambda text, taken: text)

    def predict(predictor: Predictor, program: str) -> Prediction:
        teraflops = golden["programs"][program]["teraflops"]
        return Prediction(Times(1.0, 1.0, 1.0, 1.0), teraflops * 1e12, {}, {}, (), {}, {})

    monkeypatch.setattr(Predictor, "predict", predict)
    found = json.loads(json.dumps(described(plan_stage(case.setting, Known(golden)))))
    del found["collectives"], golden["collectives"]
    assert found.pop("remat") == golden.pop("remat")
    assert flat(found) == pytest.approx(flat(golden), rel=1e-9)


def flat(tree, path: str = "") -> dict:
    """Leaves by path."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for key, sub in tree.items() for k, v in flat(sub, f"{path}/{key}").items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANNED)
def test_the_plan_is_the_same(name):
    with jax.default_matmul_precision("default"):  # the kernels take no other
        plan = CASES[name].plan()
    golden, found = read(name), json.loads(json.dumps(described(plan)))
    for key in ("devices", "mesh", "rows", "remat", "collectives"):
        assert found[key] == golden[key], key
    for key in ("model_teraflops", "program_teraflops"):
        assert found[key] == pytest.approx(golden[key], rel=1e-3), key
    assert found["programs"].keys() == golden["programs"].keys()
    for program, numbers in golden["programs"].items():
        assert found["programs"][program]["teraflops"] == pytest.approx(
            numbers["teraflops"], rel=1e-3
        ), program
        assert found["programs"][program]["beside_gib"] == roughly(numbers["beside_gib"]), program
    kinds, temporaries = golden["memory_gib"], golden["memory_gib"]["temporaries"]
    assert found["memory_gib"].keys() == kinds.keys()
    for kind, gib in kinds.items():
        expected = roughly(gib) if kind == "temporaries" else pytest.approx(gib, rel=1e-6)
        assert found["memory_gib"][kind] == expected, kind
    slack = abs(found["memory_gib"]["temporaries"] - temporaries)
    assert found["spare_gib"] == pytest.approx(golden["spare_gib"], abs=slack + 1e-6)

    assert all(share <= 1.01 for share in gathered(plan, CASES[name].setting).values())


def gathered(plan: StagePlan, setting: Setting) -> dict[tuple[str, str], float]:
    """(part, pass) of the frozen VLM -> bytes that are gathered in a micro-batch, over those of the part's weights."""
    vlm, shares = setting.run.frozen["vlm"], {}
    runs = sum(one.runs for one in plan.programs if one.name.startswith("accumulate"))
    for part, weights in (("LLM prefill", vlm["text"]["layers"]), ("ViT", vlm["vision"])):
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
        for one in plan.transfers:
            if one.part == part and one.kind == "all-gather":
                key = (part, one.phase)
                shares[key] = shares.get(key, 0.0) + one.bytes / size / runs
    assert shares.keys() >= {("LLM prefill", "forward"), ("ViT", "forward")}
    return shares


def roughly(gib: float):
    """How the compiler lays out what is temporary follows its version a little."""
    return pytest.approx(gib, rel=0.1, abs=0.05)
