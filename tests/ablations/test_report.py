"""Every study's section, of runs whose model copies the first source: what the tables must say is known."""

import json

import pytest
from PIL import Image

from configs.ablations import BUDGETS, get_config
from tests.evaluation.test_miniworld import Copier
from wemmu_jax.ablations.report import report
from wemmu_jax.ablations.results import Results, recipe
from wemmu_jax.ablations.studies import STUDIES, study
from wemmu_jax.ablations.work import REQUESTS_SEED
from wemmu_jax.cli.main import FAILED, main
from wemmu_jax.evaluation.miniworld import evaluate
from wemmu_jax.files import write_json

BUDGET = "smoke"
# The two others read weights and attention of real runs.
GRADED = tuple(name for name in STUDIES if name not in ("stream", "attention"))
TASKS = ("T2I", "Rec", "S-Edit", "M-Edit")


def write_run(out, run, tasks, backbones="0a1b") -> None:
    """The grades and the metrics of a run."""
    if tasks:
        evaluate(Copier(), out / f"grades/{run}", count=1, seed=REQUESTS_SEED, steps=1, tasks=tasks)
    folder = out / f"runs/{run}"
    folder.mkdir(parents=True)
    # The last step twice: the run was killed and went on.
    last = BUDGETS[out.name].steps[run.phase]
    losses = ((1, 5.0), (2, 4.0), (last, 9.0), (last, 3.0))
    lines = [
        {"step": s, "train/loss": x, **{f"train/loss_{t}": x for t in TASKS}} for s, x in losses
    ]
    lines += [{"step": last, **{f"validation/{task}": 2.5 for task in TASKS}}]
    (folder / "config.json").write_text(get_config(f"{out.name}/{run}").to_json())
    (folder / "run.json").write_text(json.dumps({"fingerprint": backbones}))
    (folder / "run_description.json").write_text('{"code": "0.1.0 at 1a2b3c4"}')
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablations")
    graded = {}
    for name in GRADED:
        one = study(name, budget=BUDGET)
        for run in one.runs:
            tasks = graded.setdefault(run, [])
            tasks += [task for task in one.graded.get(run, ()) if task not in tasks]
    for run, tasks in graded.items():
        write_run(folder / BUDGET, run, tasks)
    return Results(folder, BUDGET, folder / "docs/miniworld")


def rows_of(section: str) -> list[dict[str, str]]:
    """The lines of the section's table, by the table's heads."""
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    heads, _, *rows = [[cell.strip() for cell in line[1:-1].split(" | ")] for line in lines]
    return [dict(zip(heads, row, strict=True)) for row in rows]


@pytest.mark.parametrize("name", GRADED)
def test_a_section_has_a_row_for_each_run_and_its_pictures(name, results):
    section, one = report(name, results), study(name, budget=BUDGET)
    arms = len({run.arm for run in one.runs})
    assert len(rows_of(section)) == (arms if name in ("queries", "several") else len(one.runs))
    for row in rows_of(section):
        assert row.get("copied", "1.000") == "1.000" and row.get("Rec after", "1.000") == "1.000"
        assert row.get("edits right", "0.000") == row.get("overall", "0.000") == "0.000"
        for head, cell in row.items():
            assert not head.startswith("validation") or cell == "2.500"
    shown = [line for line in section.splitlines() if line.startswith("![")]
    assert shown
    for line in shown:
        path = results.pictures.parent / line.partition("(")[2].rstrip(")")
        assert Image.open(path).width > 300
    assert f"Budget `{BUDGET}`" in section
    assert ("cfm-8 4 x 16" in section and "cfm-32 4 x 64" in section) == (name == "losses")
    assert ("stage2 4 x 8" in section) == (name not in ("losses", "connectors", "pathway"))


def test_a_study_that_was_stopped_compares_the_seeds_that_all_arms_have(tmp_path):
    one = study("queries", budget="full")
    for run in one.runs[:-5]:  # all arms of seed 0, three of seed 1
        write_run(tmp_path / "full", run, one.graded[run])
    results = Results(tmp_path, "full", tmp_path / "docs/miniworld")
    section = report("queries", results)
    assert "over seeds 0." in section and "±" not in section
    write_run(tmp_path / "full", one.runs[-5], one.graded[one.runs[-5]])
    section = report("queries", results)
    assert "over seeds 0, 1." in section
    assert [row["copied"] for row in rows_of(section)] == ["1.000 ± 0.000"] * 4


def test_what_is_forgotten_is_compared_over_all_seeds(tmp_path):
    one = study("collapse", budget="full")
    seeds = [[run for run in one.runs if run.seed == seed] for seed in range(3)]
    assert len(seeds[0]) == 11 and len(seeds[1]) == len(seeds[2]) == 6
    for run in (*seeds[0], *seeds[1], *seeds[2][:-1]):
        write_run(tmp_path / "full", run, one.graded[run])
    rows = rows_of(report("collapse", Results(tmp_path, "full", tmp_path / "docs/miniworld")))
    assert len(rows) == 11
    for row in rows:
        several = row["trained on"] in ("T2I and reconstruction", "then editing alone")
        assert row["seeds"] == ("2" if several else "1")
        assert row["copied"] == ("1.000 ± 0.000" if several else "1.000")


def test_a_machine_that_ran_another_seed_alone_has_its_rows(tmp_path):
    one, folder = study("collapse", budget="full"), tmp_path / "docs/miniworld"
    folder.mkdir(parents=True)
    for name in ("collapse", "collapse-t2i"):
        (folder / f"{name}.png").write_bytes(b"of seed 0, drawn elsewhere")
    for run in one.runs:
        if run.seed == 1:
            write_run(tmp_path / "full", run, one.graded[run])
    section = report("collapse", Results(tmp_path, "full", folder))
    assert len(rows_of(section)) == 6 and "collapse-t2i.png" in section
    assert (folder / "collapse.png").read_bytes() == b"of seed 0, drawn elsewhere"


def test_scores_are_kept_for_machines_that_ran_other_seeds(tmp_path):
    one, pictures = study("queries", budget="full"), tmp_path / "docs/miniworld"
    for seed in (0, 1):  # each on a machine of its own
        for run in one.runs[4 * seed : 4 * seed + 4]:
            write_run(tmp_path / f"machine{seed}/full", run, one.graded[run])
    alone = report("queries", Results(tmp_path / "machine0", "full", pictures))
    drawn = (pictures / "queries.png").read_bytes()
    both = report("queries", Results(tmp_path / "machine1", "full", pictures))
    assert "over seeds 0." in alone and "over seeds 0, 1." in both
    assert [row["copied"] for row in rows_of(both)] == ["1.000 ± 0.000"] * 4
    assert (pictures / "queries.png").read_bytes() == drawn
    assert report("queries", Results(tmp_path / "nobody", "full", pictures)) == both

    kept = json.loads((pictures / "scores.json").read_text())
    run = kept["full"]["noisy/seed0/stage3"]
    assert run["code"] == "0.1.0 at 1a2b3c4" and run["graded"] == 32
    assert run["trained"].startswith("stage1 400 x 32, stage2 800 x 32")
    recipe = run["recipe"].split()
    assert len(recipe) == 3
    run["recipe"] = " ".join([*recipe[:2], "0" * 16])  # another stage 3
    (pictures / "scores.json").write_text(json.dumps(kept))
    assert "over seeds 1." in report("queries", Results(tmp_path / "nobody", "full", pictures))


def test_a_run_of_another_config_than_todays_is_no_row(tmp_path):
    one = study("vit", budget=BUDGET)
    for run in one.runs:
        write_run(tmp_path / BUDGET, run, one.graded[run])
    results = Results(tmp_path, BUDGET, tmp_path / "docs/miniworld")
    assert report("vit", results)
    file = tmp_path / BUDGET / f"runs/{one.runs[0]}/config.json"
    config = json.loads(file.read_text())
    write_json(file, config | {"name": "another", "init": "elsewhere"})
    assert report("vit", results)
    config["loss"]["draws"] = 1
    write_json(file, config)
    with pytest.raises(ValueError, match=r"stage3/config\.json: .*another config than today's"):
        report("vit", results)


@pytest.mark.parametrize(
    ("name", "phase"), [("vit", "stage1"), ("connectors", "mixed"), ("attention", "stage2")]
)
def test_nor_is_one_that_began_with_another(name, phase, tmp_path):
    one = study(name, budget=BUDGET)
    results = Results(tmp_path, BUDGET, tmp_path / "docs/miniworld")
    for run in one.runs:
        write_run(tmp_path / BUDGET, run, one.graded.get(run, ()))
    config = json.loads(get_config(f"{BUDGET}/{one.runs[0].at(phase)}").to_json())
    config["loss"]["draws"] = 1
    file = tmp_path / BUDGET / f"runs/{one.runs[0].at(phase)}/config.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, config)
    with pytest.raises(ValueError, match=rf"{phase}/config\.json: .*another config than today's"):
        report(name, results)


def test_scores_of_other_backbones_are_not_kept(tmp_path):
    one, pictures = study("queries", budget="full"), tmp_path / "docs/miniworld"
    for seed, backbones in ((0, "0a1b"), (1, "2c3d")):
        for run in one.runs[4 * seed : 4 * seed + 4]:
            write_run(tmp_path / f"{backbones}/full", run, one.graded[run], backbones)
    assert "over seeds 0." in report("queries", Results(tmp_path / "0a1b", "full", pictures))
    assert "over seeds 1." in report("queries", Results(tmp_path / "2c3d", "full", pictures))
    kept = json.loads((pictures / "scores.json").read_text())["full"]
    assert {found["backbones"] for found in kept.values()} == {"2c3d"} and len(kept) == 4


def test_all_sections_are_written_but_those_that_were_not_run(results, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in STUDIES))
    main(["miniworld", "report", "all", "--out", f"{results.out.parent}", "--page", f"{page}"])
    assert "attention: not run" in capsys.readouterr().out
    assert page.read_text().count("\nold\n") == len(STUDIES) - len(GRADED)
    asked = ["miniworld", "report", "attention", "--out", f"{tmp_path}", "--page", f"{page}"]
    assert main(asked) == FAILED and "attention" in capsys.readouterr().err


def test_a_step_that_ran_twice_counts_once(results):
    run = study("vit", budget=BUDGET).runs[0]
    assert results.curve(run, "train/loss") == ([1, 2, 4], [5.0, 4.0, 3.0])


def test_a_run_that_has_not_ended_has_no_curve(tmp_path):
    one = study("connectors", budget=BUDGET)
    for run in one.runs:
        write_run(tmp_path / BUDGET, run, ())
    results = Results(tmp_path, BUDGET, tmp_path / "docs/miniworld")
    assert report("connectors", results)
    file = tmp_path / BUDGET / f"runs/{one.runs[3]}/metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(FileNotFoundError, match=r"vit2-expert.*metrics.jsonl: .* step 2 of 4"):
        report("connectors", results)


def test_how_programs_are_compiled_is_no_part_of_a_recipe():
    """A GPU's runs and a CPU's stand in one table, though their layers are scanned or not; others do not."""
    config = json.loads(get_config("full/noisy/seed0/stage1").to_json())
    scanned = {**config, "model": {**config["model"], "remat": "none"}}
    other = {**config, "model": {**config["model"], "dtype": "bfloat16"}}
    assert config["model"] != scanned["model"] != other["model"]
    assert recipe(config) == recipe(scanned) != recipe(other)
