"""The scores' section, from evaluations of models whose scores are known."""

import pytest

from tests.evaluation.test_miniworld import Copier
from wemmu_jax.ablations.summary import backbones_section, scores_section
from wemmu_jax.evaluation.miniworld import evaluate


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


def test_stages_graded_on_different_requests_are_not_compared(tmp_path):
    for stage, count in (("stage3", 1), ("stage4", 2)):
        evaluate(Copier(), tmp_path / stage, count=count, seed=0, steps=1, tasks=("Rec",))
    with pytest.raises(ValueError, match="not graded on the same requests"):
        scores_section(tmp_path)


def test_a_card_without_a_table(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("# Nothing\n")
    with pytest.raises(ValueError, match="no table of backbones"):
        backbones_section(card)
    card.write_text("# A\n\n| a |\n|---|\n| 1 |\n")
    assert backbones_section(card) == "| a |\n|---|\n| 1 |"
