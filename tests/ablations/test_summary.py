"""The scores' section, from evaluations of models whose scores are known."""

import json

import pytest
from PIL import Image

from tests.evaluation.test_miniworld import Copier
from wemmu_jax.ablations.summary import backbones_section, scores_section, stages_section
from wemmu_jax.evaluation.miniworld import evaluate
from wemmu_jax.files import write_json


def test_scores_stand_beside_baselines_and_what_is_wanted(tmp_path):
    for stage in ("stage3", "stage4"):
        evaluate(Copier(), tmp_path / stage, count=2, seed=0, steps=1, tasks=("Rec", "S-Edit"))
    lines = scores_section(tmp_path).splitlines()
    heads = [cell.strip() for cell in lines[0].strip("|").split("|")]
    rows = {}
    for line in lines[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == len(heads):
            rows[cells[0], cells[1]] = dict(zip(heads, cells, strict=True))
    rec = rows["Rec", "overall"]
    assert rec["after stage 3"] == rec["after stage 4"] == rec["source copied"] == "1.000"
    assert rec["wanted"] == "0.970" and rows["Rec", "scene"]["wanted"] == ""
    assert rows["S-Edit", "overall"]["after stage 4"] == "0.000"
    assert lines[-1].startswith("2 held-out requests of each kind")


@pytest.mark.parametrize("how", [((1, 0), (2, 0)), ((1, 0), (1, 1)), ((1, 1), (1, 1))])
def test_stages_graded_on_different_requests_are_not_compared(tmp_path, how):
    for stage, (count, seed) in zip(("stage3", "stage4"), how, strict=True):
        evaluate(Copier(), tmp_path / stage, count=count, seed=seed, steps=1, tasks=("S-Edit",))
    with pytest.raises(ValueError, match="not graded on the same requests"):
        scores_section(tmp_path)


def test_a_card_without_a_table(tmp_path):
    card, pictures = tmp_path / "README.md", tmp_path / "miniworld"
    card.write_text("# Nothing\n")
    with pytest.raises(ValueError, match="no table of backbones"):
        backbones_section(tmp_path, pictures)
    card.write_text("# A\n\n| a |\n|---|\n| 1 |\n")
    curve = {"colour": [[10, 0.5], [20, 0.75]], "psnr": [[10, 31.0], [20, 32.0]]}
    write_json(tmp_path / "training.json", {"backbone": "vlm", "curve": curve})
    shown = "![backbone-vlm](miniworld/backbone-vlm.png)"
    assert backbones_section(tmp_path, pictures) == f"| a |\n|---|\n| 1 |\n\n{shown}"
    assert Image.open(pictures / "backbone-vlm.png").width > 300


def test_stages_one_after_the_other(tmp_path):
    for stage in range(1, 5):
        folder = tmp_path / f"stage{stage}"
        folder.mkdir()
        write_json(folder / "config.json", {"batch": {"rows": 8, "micro_batches": 2}})
        lines = [{"step": step, "train/samples_per_second": 10.0 * stage} for step in range(1, 7)]
        # Once more from step 3, where it was stopped.
        lines += [{"step": 3, "validation/T2I": 9.0}, {"step": 3, "validation/T2I": stage + 0.5}]
        lines += [{"step": 6, "validation/T2I": stage + 0.25}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    section = stages_section(tmp_path, tmp_path / "miniworld")
    assert "| stage4 | 6 | 96 | 40 | 0 | 4.250 |  |  |  |  |" in section
    assert Image.open(tmp_path / "miniworld/stages.png").width > 300
