"""What the tiny VLM reads: conversations that are true, and targets that are the answers and nothing else."""

import re

import numpy as np
import pytest

from wemmu_jax.miniworld.compositions import draw_composition
from wemmu_jax.miniworld.conversations import (
    TELL,
    Conversation,
    corpus,
    describe,
    draw_change,
    draw_conversation,
    draw_statements,
)
from wemmu_jax.miniworld.edits import draw_edit
from wemmu_jax.miniworld.language import at_place
from wemmu_jax.miniworld.scene import PLACES, Object, Scene
from wemmu_jax.models.qwen2_5_vl.answers import TARGET_WEIGHTS
from wemmu_jax.tiny import vlm
from wemmu_jax.tiny.backbones import write_configs
from wemmu_jax.tiny.vlm import Conversations

SCENE = Scene("navy", (Object("star", "orange", "centre"), Object("ring", "pink", "bottom left")))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbones")
    write_configs(folder, corpus())
    return folder


@pytest.fixture(scope="module")
def data(root):
    return Conversations(root)


def test_a_description_tells_all_of_a_scene():
    assert describe(SCENE) == (
        "an orange star in the centre and a pink ring at the bottom left on a navy background"
    )


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_conversations_are_of_their_split_and_have_their_pictures(pictures):
    rng = np.random.default_rng(pictures)
    seen = set()
    for _ in range(60):
        for split in ("train", "held_out"):
            drawn = draw_conversation(rng, split, pictures=pictures, turns=3)
            assert len(drawn.scenes) == pictures and 1 <= len(drawn.turns) <= 3
            assert all(scene.split == split for scene in drawn.scenes)
            seen.add(drawn.turns[0][0])
    assert len(seen) > 70


@pytest.mark.parametrize("pictures", [1, 2])
def test_changes_in_a_row_are_of_the_same_pictures(pictures):
    rng, found = np.random.default_rng(4), 0
    for _ in range(60):
        drawn = draw_change(rng, "held_out", pictures=pictures, turns=3)
        assert len(drawn.turns) == 3 and len(drawn.scenes) == pictures
        places = {at_place(item.place) for scene in drawn.scenes for item in scene.objects}
        for _, answer in drawn.turns:
            said = re.findall(r"(?:shape|circle|square|ring) ((?:at|in) the [a-z ]+)[,:]", answer)
            assert places.issuperset(said), answer
            found += len(said)
    assert found > 60


def test_places_are_told_where_an_object_is_named_and_at_the_instructions_end(data):
    """Of one picture at both, of two from the end alone; up to the answer, turn by turn."""
    rng, drawn = np.random.default_rng(9), {}
    for pictures in (1, 2):
        drawn[pictures] = [draw_change(rng, "train", pictures=pictures, turns=2) for _ in range(8)]
        batch = data.encode(drawn[pictures], (48, 48))
        for row, conversation in enumerate(drawn[pictures]):
            tokens, weights = batch["tokens"][row], batch["weights"][row]
            for picture in range(2):
                labels, wanted = batch["places"][row][:, picture], []
                for (question, _), one in zip(conversation.turns, conversation.named, strict=True):
                    if picture < len(one) and one[picture]:
                        words, place = one[picture].words, PLACES.index(one[picture].place)
                        if pictures == 1 and not question.endswith(words):
                            wanted.append((words, place, False))
                        wanted.append((question, place, True))
                runs = np.flatnonzero(np.diff(np.pad(labels >= 0, 1).astype(int))).reshape(-1, 2)
                for (start, end), (text, place, last) in zip(runs, wanted, strict=True):
                    assert data.prompts.decode(tokens[: start + 1]).endswith(text)
                    assert set(labels[start:end]) == {place}
                    assert last or end - start == 1
                    assert last == (weights[end] == TARGET_WEIGHTS["assistant"])
                    assert not (weights[start:end] == TARGET_WEIGHTS["assistant"]).any()
    assert {len(one.named[0]) for some in drawn.values() for one in some} == {1, 2}


@pytest.mark.parametrize("pictures", [1, 2])
def test_the_outcome_of_a_change_is_the_whole_target(pictures):
    for seed in range(20):
        rng, again = np.random.default_rng(seed), np.random.default_rng(seed)
        drawn = draw_conversation(
            rng, "train", pictures=pictures, turns=3, edit_share=1.0, outcomes=True
        )
        if pictures == 1:
            again.random()  # decides for an edit
            change = draw_edit(again, "train")
            assert drawn.scenes == (change.source,)
        else:
            change = draw_composition(again, "train")
            assert drawn.scenes == change.sources
        assert drawn.turns == ((change.instruction, describe(change.target)),)


def test_questions_are_of_the_kinds_that_are_asked_for():
    rng = np.random.default_rng(6)
    for _ in range(20):
        drawn = draw_conversation(
            rng, "train", pictures=1, turns=3, kinds=("count",), edit_share=0.0
        )
        assert all(re.search("how many|count", question) for question, _ in drawn.turns[:-1])


def test_without_a_picture_the_caption_comes_first():
    drawn = draw_conversation(np.random.default_rng(3), "train", pictures=0, turns=2)
    told, _, question = drawn.turns[0][0].rpartition(". ")
    assert "background" in told and question


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_targets_are_the_answers_and_the_ends_of_their_turns(data, pictures):
    scenes = (SCENE,) * pictures
    turns = (("what colour is the star?", "orange"), ("how many rings are there?", "one"))
    batch = data.encode([Conversation(turns, scenes)], (32, 64))
    tokens, weights = batch["tokens"][0], batch["weights"][0]
    prompts = data.prompts
    answers = tokens[weights == TARGET_WEIGHTS["assistant"]]
    assert prompts.decode(answers) == "orangeone"
    assert np.count_nonzero(answers == prompts.turn_end_id) == 2
    users = tokens[weights == TARGET_WEIGHTS["user"]]
    assert prompts.decode(users) == "what colour is the star?how many rings are there?"
    assert (
        not weights[batch["feature_index"][0] >= 0].any() and not weights[~batch["valid"][0]].any()
    )
    assert (batch["images"] is None) == (pictures == 0)
    assert np.count_nonzero(batch["feature_index"] >= 0) == pictures * 2 * 4


def test_turns_that_do_not_fit_are_left_out(data):
    turns = tuple(("describe the image", describe(SCENE)) for _ in range(9))
    batch = data.encode([Conversation(turns, (SCENE,))], (48, 48))
    ends = batch["tokens"][0][batch["weights"][0] == TARGET_WEIGHTS["assistant"]]
    assert 2 <= np.count_nonzero(ends == data.prompts.turn_end_id) < 9


def test_the_gist_of_an_answer_is_one_token(data):
    """One that falls into pieces would make some kinds of questions harder than others."""
    for word in (" red", " heart", " beige", " yes", " no", " zero", " four", " nowhere"):
        assert len(data.prompts.words(word)) == 1, word


@pytest.mark.parametrize("pictures", [0, 1])
def test_statements_are_answers_and_fit_their_row(data, pictures):
    rng = np.random.default_rng(pictures)
    rows = [
        draw_statements(rng, "train", pictures=pictures, words=vlm.WORDS[pictures])
        for _ in range(200)
    ]
    batch = data.encode(rows, (48, 48), text_length=vlm.STATEMENTS_LENGTH)
    answers = batch["weights"] == TARGET_WEIGHTS["assistant"]
    for row, tokens, mine in zip(rows, batch["tokens"], answers, strict=True):
        ((asked, told),) = row.turns
        statements = told.split(". ")
        assert data.prompts.decode(tokens[mine]) == told and len(set(statements)) == len(statements)
        assert 0 < len(told.split()) < vlm.WORDS[pictures]
        assert (asked.endswith(TELL.train)) and (". " in asked) == (pictures == 0)
