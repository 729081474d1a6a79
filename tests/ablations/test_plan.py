"""The studies as data: every run has a config, every job what it needs, every study a report."""

import pathlib

import pytest

from configs.ablations import ARMS, BUDGETS, PHASES, get_config
from wemmu_jax.ablations.jobs import Ledger
from wemmu_jax.ablations.plan import estimate, jobs
from wemmu_jax.ablations.report import _REPORTS, NAMES, table, write
from wemmu_jax.ablations.studies import STUDIES, Run, study
from wemmu_jax.cli import miniworld
from wemmu_jax.training.curriculum import Stage

PLACE = {"out": pathlib.Path("out"), "backbones": pathlib.Path("backbones")}


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_run_has_a_config_and_its_start_the_same_bridge(budget):
    for name in STUDIES:
        for run in study(name, budget=budget).runs:
            stage = Stage.from_config(get_config(f"{budget}/{run}"))
            while start := PHASES[run.phase].start:
                run = run.at(start)
                assert Stage.from_config(get_config(f"{budget}/{run}")).bridge == stage.bridge


def test_no_two_stretches_of_a_road_have_the_same_seed():
    seeds = {
        get_config(f"full/noisy/seed{seed}/{phase}").seed
        for seed in range(3)
        for phase in ("stage1", "stage2", "stage3", "stage4")
    }
    assert len(seeds) == 12


def test_joint_training_sees_as_many_samples_as_the_sequence():
    steps = BUDGETS["full"].steps
    assert steps["joint1"] == steps["stage1"]
    assert steps["joint2"] == steps["stage2"] + steps["edits"]


def test_what_is_forgotten_is_no_matter_of_another_law_of_times():
    phases = ("stage2", "edits", "edits-queries", "edits-new-queries", "joint2")
    shifts = {get_config(f"full/dynamic/seed0/{phase}").loss.shift for phase in phases}
    assert len(shifts) == 1


@pytest.mark.parametrize("budget", BUDGETS)
def test_jobs_come_after_what_they_need_and_studies_share_runs(budget):
    every = jobs(STUDIES, budget=budget, **PLACE)
    names = [job.name for job in every]
    assert len(set(names)) == len(names)
    for number, job in enumerate(every):
        assert set(job.needs) <= set(names[:number])
    alone = sum(len(jobs([name], budget=budget, **PLACE)) for name in STUDIES)
    assert len(names) < alone


def test_a_run_is_graded_in_all_that_any_study_asks():
    every = {job.name: job for job in jobs(STUDIES, budget="full", **PLACE)}
    assert every["grade/noisy/seed0/stage3"].arguments["tasks"] == ["S-Edit", "T2I", "Rec"]
    assert "M-Edit" in every["grade/noisy/seed0/stage4"].arguments["tasks"]


def test_other_weights_are_other_backbones_and_another_card_is_not(tmp_path):
    def made_from(card: str, weights: str) -> str:
        for name, text in (("README.md", card), ("vlm/model.safetensors", weights)):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        place = {"out": tmp_path / "out", "backbones": tmp_path}
        return jobs(["queries"], budget="smoke", **place)[0].made_from

    first = made_from("a card", "weights")
    assert made_from("another card", "weights") == first
    assert made_from("a card", "other weights") != first


def test_some_runs_of_a_study_and_what_they_need():
    some = jobs(["queries"], budget="full", only="noisy/seed[12]/*", **PLACE)
    trained = [job.name for job in some if job.name.startswith("train/")]
    assert trained == [f"train/noisy/seed{s}/stage{n}" for s in (1, 2) for n in (1, 2, 3)]
    assert [job.name for job in some if job.name.startswith("grade/")] == [
        "grade/noisy/seed1/stage3",
        "grade/noisy/seed2/stage3",
    ]
    with pytest.raises(ValueError, match=r"'seed9'.*noisy/seed0/stage3"):
        jobs(["queries"], budget="full", only="seed9", **PLACE)


def test_the_estimate_learns_from_what_is_done(tmp_path):
    todo, ledger = jobs(["queries"], budget="full", **PLACE), Ledger(tmp_path)
    before = estimate(todo, budget="full", ledger=ledger)
    assert 3600 < before < 12 * 3600
    ledger.note("train/noisy/seed0/stage3", 1.0)
    after = estimate(todo, budget="full", ledger=ledger)
    kind = [job for job in todo if job.name.endswith("stage3") and job.name.startswith("train")]
    assert len(kind) == 12 and after < before
    ledger.note("train/noisy/seed1/stage3", 1e6)
    assert estimate(todo, budget="full", ledger=ledger) > 10 * 5e5


def test_the_command_knows_every_study_and_each_has_a_report():
    assert miniworld.STUDIES == STUDIES == tuple(_REPORTS)
    assert {run.arm for name in STUDIES for run in study(name, budget="full").runs} <= set(NAMES)
    assert set(NAMES) == set(ARMS)


@pytest.mark.parametrize(
    "name",
    ["full/noisy/seed0", "full/noisy/seedx/stage1", "half/noisy/seed0/stage1", "full/a/seed0/b"],
)
def test_a_name_that_is_no_run(name):
    with pytest.raises(ValueError, match=r"expected BUDGET/ARM|none of"):
        get_config(name)


def test_a_run_and_its_name():
    run = Run("noisy-vae", 2, "edits")
    assert Run.parse(str(run)) == run and str(run) == "noisy-vae/seed2/edits"


def test_a_section_of_a_page_is_replaced_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- one -->\nold\n<!-- /one -->\nafter\n<!-- two -->\n<!-- /two -->\n"
    )
    write(page, "one", table(["a", "b"], [["x\\1", 0.25]]))
    text = page.read_text()
    assert "old" not in text and "| x\\1 | 0.250 |" in text
    assert (
        text.startswith("before\n<!-- one -->\n| a | b |")
        and "after\n<!-- two -->\n<!-- /two" in text
    )
    with pytest.raises(ValueError, match="three"):
        write(page, "three", "")
    assert page.read_text() == text
