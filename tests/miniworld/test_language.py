"""Captions, edits, compositions and questions say what is so, by an independent reader of their words."""

import collections
import re

import numpy as np
import pytest

from tests.miniworld.reading import PLACE, carry_out, carry_out_on_two, is_so, some, those
from wemmu_jax.miniworld import compositions, edits, questions
from wemmu_jax.miniworld.compositions import draw_composition
from wemmu_jax.miniworld.edits import draw_edit
from wemmu_jax.miniworld.language import (
    FAMILIES,
    Phrases,
    at_place,
    caption,
    place_objects,
    with_article,
)
from wemmu_jax.miniworld.prompts import CATEGORIES, draw_prompt
from wemmu_jax.miniworld.questions import draw_question
from wemmu_jax.miniworld.scene import BACKGROUNDS, SPLITS, draw_scene

_BACKGROUND = re.compile(
    rf"\b(?:an? ({'|'.join(BACKGROUNDS)}) background|background is ({'|'.join(BACKGROUNDS)}))"
)
_RELATION = re.compile(r"\b(left of|right of|above|below)\b")


def _phrases():
    tables = (edits.KINDS, compositions.KINDS, questions.KINDS, FAMILIES)
    return [entry[1] for table in tables for entry in table.values()]


def _check_caption(text, scene):
    things = some(text)
    keys = {(bool(t.colour), bool(t.place)) for t in things}
    assert len(keys) == 1, text
    ((coloured, placed),) = keys
    said, there = collections.Counter(), collections.Counter()
    for thing in things:
        said[thing.colour, thing.shape, thing.place] += thing.count
    for item in scene.objects:
        there[item.colour if coloured else None, item.shape, item.place if placed else None] += 1
    assert said == there, (text, scene.canonical)
    backgrounds = ["".join(found) for found in _BACKGROUND.findall(text)]
    assert backgrounds in ([], [scene.background]), (text, scene.canonical)
    assert ("background" in text) == bool(backgrounds)
    for word in _RELATION.findall(text):
        (a,), (b,) = (
            [o for o in scene.objects if o.shape == t.shape and t.colour in (None, o.colour)]
            for t in things
        )
        assert is_so(a, word, b), (text, scene.canonical)


@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_true_and_complete(split):
    rng = np.random.default_rng(1)
    words = set()
    for _ in range(3000):
        scene = draw_scene(rng, split)
        text = caption(scene, rng, split)
        _check_caption(text, scene)
        words |= set(_RELATION.findall(text)) | set(re.findall(r"\b(?:two|three|four)\b", text))
    assert words == {"left of", "right of", "above", "below", "two", "three", "four"}


def test_a_quarter_of_the_wordings_is_held_out_and_made_of_known_words():
    train, held_out = (
        [
            (name, text)
            for name, family in FAMILIES.items()
            for text in getattr(family.phrases, split)
        ]
        for split in SPLITS
    )
    assert len(train) + len(held_out) >= 20 and not set(train) & set(held_out)
    assert len(held_out) * 4 == len(train) + len(held_out)
    known, trained = set(), set()
    for phrases in _phrases():
        assert len(phrases.held_out) * 4 == len(phrases.train + phrases.held_out)
        known |= {word for text in phrases.train for word in re.findall(r"[a-z]+", text)}
        trained |= set(phrases.train)
    for text in (text for phrases in _phrases() for text in phrases.held_out):
        assert text not in trained and set(re.findall(r"[a-z]+", text)) <= known, text


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("category", (*CATEGORIES, "position of colours"))
def test_prompts_are_true_of_their_scene_and_require_what_they_say(category, split):
    rng = np.random.default_rng(2)
    for _ in range(200):
        prompt, scene = draw_prompt(rng, split, category)
        assert prompt.category == category and scene.split == split
        _check_caption(prompt.text, scene)
        wanted = [(t.count, t.shape, t.colour) for t in some(prompt.text)]
        assert wanted == [tuple(need) for need in prompt.requirement.needs]
        assert _RELATION.findall(prompt.text) == [prompt.requirement.relation] * (
            category.startswith("position")
        )
        assert prompt.requirement.exact == (category == "counting")
        assert (wanted[0][0] > 1) == (category == "counting")
        assert bool(wanted[0][2]) == ("colour" in category)


_CHANGED = {
    "recolour": ["colour"],
    "remove": ["colour", "shape"],
    "add": ["colour", "shape"],
    "replace": ["shape"],
    "move": ["colour", "colour", "shape", "shape"],
    "background": ["colour"],
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", edits.KINDS)
def test_an_edit_changes_what_it_says_and_nothing_else(kind, split):
    rng = np.random.default_rng(3)
    seen = set()
    for _ in range(300):
        edit = draw_edit(rng, split, kind)
        seen.add(edit.instruction.split()[0])
        assert edit.kind == kind and edit.source.split == edit.target.split == split
        assert carry_out(kind, edit.instruction, edit.source).canonical == edit.target.canonical, (
            edit
        )
        before, after = edit.source.attributes(), edit.target.attributes()
        changed = [fact for fact in {*before, *after} if before.get(fact) != after.get(fact)]
        assert sorted(fact[1] for fact in changed) == _CHANGED[kind]
        assert all((fact[0] == "background") == (kind == "background") for fact in changed)
        _check_answer(edit, [edit.source])
        touched = {fact[0] for fact in changed}
        kept = [o for o in edit.source.objects if o.place not in touched]
        assert kept == [o for o in edit.target.objects if o.place not in touched]
        if kind == "move":
            (old,) = set(edit.source.objects) - set(edit.target.objects)
            (new,) = set(edit.target.objects) - set(edit.source.objects)
            assert (old.name, old.offset) == (new.name, new.offset)
    assert split == "held_out" or len(seen) > 1


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", compositions.KINDS)
def test_a_composition_joins_what_it_says(kind, split):
    rng = np.random.default_rng(4)
    for _ in range(100):
        composition = draw_composition(rng, split, kind)
        first, second = composition.sources
        assert first.split == second.split == composition.target.split == split
        assert first.canonical != composition.target.canonical
        meant = carry_out_on_two(kind, composition.instruction, first, second)
        assert meant.canonical == composition.target.canonical, composition
        _check_answer(composition, composition.sources)


def _check_answer(change, sources):
    """It names what the instruction names, tells its place, and ends with what is new in the target."""
    *found, becomes = re.split(", |: ", change.answer) if change.kind != "merge" else [""]
    base, target = sources[0], change.target
    gone = [item for item in base.objects if item not in target.objects]
    new = [item for item in target.objects if item not in base.objects]
    if change.kind == "background":
        assert change.answer == f"the background: {target.background}"
    elif change.kind == "merge":
        assert change.answer == f"the second image: {place_objects(sources[1])}"
    elif change.kind == "add" and len(sources) == 1:
        assert change.answer == f"{at_place(new[0].place)}: {with_article(new[0].name)}"
    else:
        things = [gone] * bool(gone) + [second.objects for second in sources[1:]]
        for words, items in zip(found, things, strict=True):
            places = [at_place(o.place) for o in items if words.endswith(at_place(o.place))]
            assert len(places) == 1, change
            assert words in change.instruction or words.removesuffix(f" {places[0]}") in (
                change.instruction
            )
        name = with_article(new[0].name) if new else "nothing"
        if change.kind == "add":
            name += f" {at_place(new[0].place)}"
        assert becomes == (at_place(new[0].place) if change.kind == "move" else name)


def _gist_and_places(kind, text, scene):
    """What is asked for, and the objects whose places the answer tells."""
    if kind == "count":
        (noun,) = re.findall(r"(?:how many|count the) ([a-z ]*?s)\b(?: are| in|\?|$)", text)
        *colour, shape = noun.split()
        matching = [
            o
            for o in scene.objects
            if colour in ([], [o.colour]) and shape in ("shapes", f"{o.shape}s", f"{o.shape}es")
        ]
        return ("zero", "one", "two", "three", "four")[len(matching)], matching
    if kind == "existence":
        ((_, colour, shape, _),) = some(text)
        matching = [o for o in scene.objects if o.name == f"{colour} {shape}"]
        return "yes" if matching else "no", matching
    if kind == "relation":
        a, b = those(text, scene)
        (word,) = _RELATION.findall(text)
        opposite = {
            "left of": "right of",
            "right of": "left of",
            "above": "below",
            "below": "above",
        }
        assert is_so(a, word, b) or is_so(a, opposite[word], b)
        return "yes" if is_so(a, word, b) else "no", [a, b]
    if kind == "colour" and "background" in text:
        return scene.background, []
    (item,) = those(text, scene)
    if kind == "place":
        return f"{'in' if item.place == 'centre' else 'at'} the {item.place}", [item]
    if kind == "shape":
        return f"a {item.shape}", []
    return item.colour, []


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", questions.KINDS)
def test_answers_are_right_and_yes_and_no_balanced(kind, split):
    rng = np.random.default_rng(6)
    answers = collections.Counter()
    for _ in range(500):
        question = draw_question(rng, split, kind)
        assert question.scene.split == split
        gist, told = _gist_and_places(kind, question.text, question.scene)
        assert question.gist == gist and gist in question.answer, question
        assert not re.search(rf"\b{gist}\b", question.text.replace("yes or no", ""))
        assert question.answer.endswith(f" {gist}")
        subject, said = question.answer[: -len(gist)].strip(), re.findall(PLACE, question.answer)
        if kind == "relation":
            asked = {o.place for o in told} | set(re.findall(PLACE, question.text))
            assert set(said) == asked and len(said) == 2, question
        elif kind in ("count", "existence"):
            assert said == [item.place for item in told], question
            assert told or subject.endswith(" nowhere:")
        else:
            assert subject.removesuffix(" is") in question.text
        answers[gist] += 1
    if kind in ("relation", "existence"):
        assert set(answers) == {"yes", "no"} and 0.44 < answers["yes"] / 500 < 0.56
    elif kind == "count":
        assert max(answers.values()) / 500 < 0.6 and min(answers.values()) / 500 > 0.01
    else:
        assert max(answers.values()) / 500 < 0.25


def test_words_are_a_function_of_the_seed():
    def draw(seed):
        rng = np.random.default_rng(seed)
        drawn = draw_edit(rng, "train"), draw_composition(rng, "train"), draw_question(rng, "train")
        return *drawn, draw_prompt(rng, "train"), caption(draw_scene(rng, "train"), rng, "train")

    assert draw([0, 1]) == draw([0, 1])
    assert draw([0, 1]) != draw([0, 2])


def test_of_crossed_wordings_training_knows_all_parts_but_not_all_together():
    frames, ends = ("a {end}", "b {end}", "{end} c", "d {end}"), ("x", "y", "z")
    found = Phrases.crossed(frames, ends)
    assert len(found.train) == 9 and len(found.held_out) == 3
    every = {frame.replace("{end}", end) for frame in frames for end in ends}
    assert {*found.train, *found.held_out} == every
    for frame in frames:
        assert any(frame.replace("{end}", end) in found.train for end in ends)
    for end in ends:
        assert any(frame.replace("{end}", end) in found.train for frame in frames)
