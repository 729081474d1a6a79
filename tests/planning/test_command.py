"""`wemmu plan` on a small model: end to end with libtpu in the slow tests, and its words without."""

import json
import re
import types

import jax
import pytest

from tests.training.conftest import write_converted
from wemmu_jax.cli.main import FAILED, main
from wemmu_jax.planning.table import TIMES

CONFIG = "configs/tiny.py:stage1"
SMALL = (
    *("--config.batch.rows=8", "--config.mesh.fsdp=4", "--config.model.dtype=bfloat16"),
    *("--config.data.buckets=3", "--config.model.remat=full", "--config.data.resolution=64"),
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_converted(tmp_path_factory.mktemp("backbones"))


def plan(*words: object) -> int:
    with jax.default_matmul_precision("default"):
        return main(["plan", "--config", CONFIG, *map(str, words)])


@pytest.mark.slow
def test_a_small_stage_end_to_end(weights, tmp_path, capsys):
    words = ("--topology", "v5p:2x2x1", "--init", weights, "--cache", tmp_path / "cache", *SMALL)
    assert plan(*words, "--processes", 2, "--json", tmp_path / "plan.json") == 0
    first = capsys.readouterr().out
    said = re.findall(r"^compiled (.*) in \d+ s$", first, re.M)
    # Targets and sources of this size are encoded by the same program.
    assert sorted(word.split(",")[0] for word in said) == (
        ["accumulate", "accumulate", "encode target", "update", "zero"]
    )
    [found] = json.loads((tmp_path / "plan.json").read_text())["stages"]

    # The second plan compiles nothing and says the same.
    assert plan(*words) == 0
    again = capsys.readouterr().out
    assert again.startswith("\ntiny stage1 on v5p:2x2x1") and again in first

    assert [program["runs"] for program in found["programs"]][-2:] == [1, 1]
    assert {shape["shape"][0] for shape in found["shapes"]} == {0, 1}
    assert 1 < found["program_flops"] / found["model_flops"] < 2
    assert 0 < found["mfu"]["raw_exposed"] < found["mfu"]["capped_overlapped"] < 1
    assert set(found["mfu"]) == set(found["days"]) == set(TIMES)
    kinds = {transfer["kind"] for transfer in found["transfers"]}
    assert {"all-gather", "all-reduce"} <= kinds

    # What every part takes, and the collectives, are what the whole takes with nothing hidden.
    wire = sum(transfer["seconds"] for transfer in found["transfers"])
    parts = sum(found["parts"].values()) + wire
    assert parts == pytest.approx(found["times"]["raw_exposed"], rel=0.1)
    assert found["parts"].get("other", 0) < 0.15 * sum(found["parts"].values())
    for part in (
        "ViT",
        "LLM prefill",
        "expert",
        "Position MLP",
        "DiT",
        "DC-AE encode",
        "optimizer",
    ):
        assert found["parts"][part] > 0

    memory = found["memory"]
    assert memory["gradients"] == memory["trainable weights"] > 0
    assert found["spare"] == pytest.approx(95.74 * 2**30 - sum(memory.values()))


@pytest.mark.slow
def test_a_stage_that_does_not_fit_is_one_error(tmp_path, capsys):
    words = ("--topology", "v5e:2x2", "--cache", str(tmp_path), "--config.mesh.fsdp=4")
    with jax.default_matmul_precision("default"):
        code = main(
            ["plan", "--config", "configs/wemmu_3b.py:stage2", *words, "--config.batch.rows=4"]
        )
    assert code == FAILED
    said = capsys.readouterr().err
    assert (
        "stage2 does not fit v5e:2x2" in said
        and "mesh.fsdp=8 on slices of 8 devices and more would" in said
    )


@pytest.mark.slow
def test_a_topology_that_does_not_exist(tmp_path, capsys):
    assert plan("--topology", "v5p:3x3x3", "--cache", tmp_path) == FAILED
    assert "these exist, among others: v4:2x2x4" in capsys.readouterr().err


def test_a_stage_that_cannot_be_planned_takes_no_other_with_it(tmp_path, capsys, monkeypatch):
    """Of four the second is refused and the third does not fit."""
    wrong = {"tiny stage2": "batch.rows=12 does not divide over 8 devices"}

    def plan_stage(setting, library, **how):
        name = setting.config.name
        if name in wrong:
            raise ValueError(wrong[name])
        room = {"spare": -1 if name == "tiny stage3" else 1, "memory": {"temporaries": 0}}
        chip = types.SimpleNamespace(memory=0)
        said = {"stage": name, "topology": "v5p:2x2x2", "chip": chip}
        return types.SimpleNamespace(**room, **said, to_json=lambda: {"stage": name})

    monkeypatch.setattr("wemmu_jax.planning.plan.plan_stage", plan_stage)
    monkeypatch.setattr("wemmu_jax.planning.table.table", lambda plan: f"table of {plan.stage}")
    monkeypatch.setattr("wemmu_jax.planning.memory.what_fits", lambda *_: "fewer rows would")
    stages = [f"configs/tiny.py:stage{number}" for number in (1, 2, 3, 4)]
    words = ["--topology", "v5p:2x2x2", "--cache", tmp_path, "--json", tmp_path / "plan.json"]
    assert main(["plan", "--config", *stages, *map(str, words)]) == FAILED
    said = capsys.readouterr()
    assert re.findall("table of (.*)", said.out) == ["tiny stage1", "tiny stage3", "tiny stage4"]
    assert said.err.splitlines() == [
        f"wemmu plan: configs/tiny.py:stage2: {wrong['tiny stage2']}",
        "  configs/tiny.py:stage3: tiny stage3 does not fit v5p:2x2x2: fewer rows would",
    ]
    found = json.loads((tmp_path / "plan.json").read_text())
    assert [one["stage"] for one in found["stages"]] == [
        "tiny stage1",
        "tiny stage3",
        "tiny stage4",
    ]
    assert list(found["failed"]) == stages[1:3]


def test_an_error_that_all_stages_have_is_said_once(tmp_path, capsys):
    words = ["configs/tiny.py:stage1", "configs/tiny.py:stage2", "--topology", "v5p-8"]
    assert main(["plan", "--config", *words, "--cache", str(tmp_path)]) == FAILED
    said = capsys.readouterr().err
    assert said.count("expected generation:chips") == 1
    assert said.startswith("wemmu plan: configs/tiny.py:stage1, configs/tiny.py:stage2: no TPU")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--draft", "--search goes by the time of a step"),
        ("--all-shapes", "--search compiles the shapes that a step's time is told from"),
    ],
)
def test_what_a_search_does_not_go_with(option, message, tmp_path, capsys):
    assert plan("--topology", "v5p:2x2x1", option, "--search", "--cache", tmp_path) == FAILED
    assert message in capsys.readouterr().err


def test_slices_and_all_shapes_reach_the_planner(tmp_path, capsys, monkeypatch):
    def planner(setting, library, **options):
        raise ValueError(f"{setting.topology} x {setting.slices}, {options}")

    monkeypatch.setattr("wemmu_jax.planning.plan.plan_stage", planner)
    words = ("--topology", "v5p:2x2x1", "--cache", tmp_path, "--slices", 2)
    assert plan(*words, "--all-shapes", "--processes", 3) == FAILED
    said = capsys.readouterr().err
    assert "v5p:2x2x1 x 2, {'all_shapes': True, 'processes': 3}" in said


def test_what_is_no_topology(tmp_path, capsys):
    assert plan("--topology", "v5p-8", "--cache", tmp_path) == FAILED
    assert "expected generation:chips" in capsys.readouterr().err


def test_without_libtpu_the_error_says_what_to_install(tmp_path, capsys, monkeypatch):
    def missing(*_, **__):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", missing)
    assert plan("--topology", "v5p:2x2x1", "--cache", tmp_path) == FAILED
    assert "requirements-tpu.txt" in capsys.readouterr().err


def test_a_text_length_that_no_text_is_padded_to(tmp_path, capsys):
    assert plan("--topology", "v5p:2x2x1", "--cache", tmp_path, "--text-length", 77) == FAILED
    assert "one of (64,), not to 77" in capsys.readouterr().err
