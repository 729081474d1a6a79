"""Conversations about scenes, from which the tiny VLM learns: questions in turns, descriptions, what an instruction
means."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np

from wemmu_jax.data.prompts import RECONSTRUCTION_PROMPT
from wemmu_jax.miniworld import compositions, edits
from wemmu_jax.miniworld.compositions import draw_composition
from wemmu_jax.miniworld.edits import draw_edit
from wemmu_jax.miniworld.language import Named, Phrases, caption, place_objects, say, with_article
from wemmu_jax.miniworld.questions import KINDS, ask
from wemmu_jax.miniworld.scene import Scene, Split, choose, draw_scene

DESCRIBE = Phrases(
    ("describe the image", "what is in the image?", "what does the image show?"),
    ("what do we see in the image?",),
)
TELL = Phrases(("what is true of the image?", "tell what the image shows"), ("tell what is true",))
EDIT_SHARE, DESCRIBE_SHARE = 0.2, 0.5


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns of (question, answer) after pictures of `scenes`; where they are instructions, `named` has what each
    of them names in each picture."""

    turns: tuple[tuple[str, str], ...]
    scenes: tuple[Scene, ...] = ()
    named: tuple[tuple[Named | None, ...], ...] = ()


def describe(scene: Scene) -> str:
    """All that is to be known of a scene, in one fixed wording."""
    return f"{place_objects(scene)} on {with_article(scene.background)} background"


def draw_description(rng: np.random.Generator, split: Split) -> Conversation:
    """A picture, and all that is to be known of it."""
    scene = draw_scene(rng, split)
    return Conversation(((DESCRIBE.draw(rng, split), describe(scene)),), (scene,))


def draw_statements(
    rng: np.random.Generator, split: Split, *, pictures: int, words: int
) -> Conversation:
    """Up to `words` words of answers to questions that nobody asked, after a picture or a caption that tells all.

    Each names things at random and says what holds of them: what a question asks for, many times in one row.
    """
    scene, answers = draw_scene(rng, split), []
    while sum(len(answer.split()) for answer in answers) < words:
        answers.append(_question(rng, split, scene)[1])
    distinct = list(dict.fromkeys(answers[:-1]))
    turn = (TELL.draw(rng, split), ". ".join(distinct))
    return Conversation((turn,), (scene,)) if pictures else _told(rng, split, scene, [turn])


def draw_conversation(
    rng: np.random.Generator,
    split: Split,
    *,
    pictures: int,
    turns: int,
    kinds: Sequence[str] = tuple(KINDS),
    edit_share: float = EDIT_SHARE,
    outcomes: bool = False,
) -> Conversation:
    """A conversation after `pictures` pictures (0 to 2), of at most `turns` turns.

    About one picture: questions of `kinds`, or, in an `edit_share` of them, edits and what each of them means, or one
    and its outcome. About two: compositions, likewise. About none: a caption that tells all, with questions on it.
    Every second time a description is the last turn of questions; one after it could be answered without a look at the
    picture.
    """
    if pictures == 2 or (pictures == 1 and rng.random() < edit_share):
        if outcomes:
            return _draw_outcome(rng, split, pictures=pictures)
        return draw_change(rng, split, pictures=pictures, turns=turns)
    scene = draw_scene(rng, split)
    asked = [_question(rng, split, scene, kinds) for _ in range(turns)]
    if rng.random() < DESCRIBE_SHARE:
        asked[-1] = (DESCRIBE.draw(rng, split), describe(scene))
    if pictures == 1:
        return Conversation(tuple(asked), (scene,))
    return _told(rng, split, scene, asked)


def draw_change(
    rng: np.random.Generator, split: Split, *, pictures: int, turns: int = 1
) -> Conversation:
    """What edits of one picture, or compositions of two, mean in them; each for itself."""
    if pictures == 1:
        changes = [draw_edit(rng, split)]
        scenes, kinds = (changes[0].source,), edits.KINDS
        another = functools.partial(edits.edit_of, changes[0].source)
    else:
        changes = [draw_composition(rng, split)]
        scenes, kinds = changes[0].sources, compositions.KINDS
        another = functools.partial(compositions.composition_of, scenes)
    while len(changes) < turns:
        change = another(choose(rng, kinds), rng, split)
        changes += [change] if change else []
    turns = tuple((one.instruction, one.answer) for one in changes)
    return Conversation(turns, scenes, tuple(one.named for one in changes))


def _draw_outcome(rng: np.random.Generator, split: Split, *, pictures: int) -> Conversation:
    """One edit, or one composition, and all that is to be known of its target."""
    change = draw_edit(rng, split) if pictures == 1 else draw_composition(rng, split)
    scenes = (change.source,) if pictures == 1 else change.sources
    return Conversation(((change.instruction, describe(change.target)),), scenes)


def _told(
    rng: np.random.Generator, split: Split, scene: Scene, turns: Sequence[tuple[str, str]]
) -> Conversation:
    """`turns` after a caption that tells all of the scene, in place of its picture."""
    told = say("places and background", scene, place_objects(scene), rng, split)
    (question, answer), *rest = turns
    return Conversation(((f"{told}. {question}", answer), *rest))


def _question(
    rng: np.random.Generator, split: Split, scene: Scene, kinds: Sequence[str] = tuple(KINDS)
) -> tuple[str, str]:
    while True:
        question = ask(rng, split, scene, choose(rng, kinds))
        if question:
            return question.text, question.answer


def corpus(count: int = 3000) -> Iterator[str]:
    """The words of miniworld, as often as they come: what the tiny tokenizer learns from."""
    rng = np.random.default_rng(0)
    for number in range(count):
        conversation = draw_conversation(rng, "train", pictures=number % 3, turns=3)
        for turn in conversation.turns:
            yield from turn
        yield caption(draw_scene(rng, "train"), rng, "train")
        yield from ("system\nYou are a helpful assistant.", "user\n", "assistant\n")
        yield RECONSTRUCTION_PROMPT
        yield choose(rng, TELL.train)
