"""Miniworld as record sources for training: nothing is stored, each record is drawn when it is asked for."""

import dataclasses
import functools
from typing import Literal, get_args

import numpy as np

from wemmu_jax.data.records import Picture, Record, Turn
from wemmu_jax.miniworld.compositions import KINDS as COMPOSITIONS
from wemmu_jax.miniworld.compositions import draw_composition
from wemmu_jax.miniworld.conversations import Conversation, draw_conversation
from wemmu_jax.miniworld.edits import KINDS as EDITS
from wemmu_jax.miniworld.edits import draw_edit
from wemmu_jax.miniworld.language import caption, complete_caption
from wemmu_jax.miniworld.prompts import CATEGORIES, draw_prompt
from wemmu_jax.miniworld.renderer import render
from wemmu_jax.miniworld.scene import SPLITS, Scene, Split, choose, draw_scene

# A kind's number begins its random stream, so a new kind comes last.
Kind = Literal["caption", "edit", "composition", "conversation", "prompt"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TURNS = 4  # the most of a conversation
# (height, width) of a scene as such, and the shares of these: squares most of the time, for a model of few pixels has
# to learn each shape on its own.
SIZES, SHARES = ((48, 48), (32, 64), (64, 32)), (0.6, 0.2, 0.2)
# Kinds of prompts, of edits and of compositions. What is learned last is drawn more often: what objects have to agree
# on, and what has to find one of them.
RELATIONS = ("position", "position of colours", "position of colours")
PROMPTS = (*CATEGORIES, "two objects", "counting", "counting", "counting", *RELATIONS)
CHANGES = (*EDITS, "recolour", "remove", "replace", "move")
COMBINATIONS = (*COMPOSITIONS, "replace", "recolour", "background")
Drawn = tuple[str, tuple[Scene, ...], Scene]  # text, sources, target


def draw_captioned(rng: np.random.Generator, split: Split) -> Drawn:
    """A caption and its scene, as a model learns text to image from.

    Left to chance, few captions tell a relation or count shapes, and fewer tell all of a scene, which teaches most: two
    fifths are of GenEval's kinds, three tenths complete.
    """
    kind = rng.random()
    if kind < 0.4:
        prompt, scene = draw_prompt(rng, split)
        return prompt.text, (), scene
    scene = draw_scene(rng, split)
    say_all = complete_caption if kind < 0.7 else caption
    return say_all(scene, rng, split), (), scene


def draw_prompted(rng: np.random.Generator, split: Split) -> Drawn:
    """A prompt, most of GenEval's kinds, and a scene that it fits."""
    prompt, scene = draw_prompt(rng, split, choose(rng, PROMPTS))
    return prompt.text, (), scene


def _edit(rng: np.random.Generator, split: Split) -> Drawn:
    edit = draw_edit(rng, split, choose(rng, CHANGES))
    return edit.instruction, (edit.source,), edit.target


def _composition(rng: np.random.Generator, split: Split) -> Drawn:
    composition = draw_composition(rng, split, choose(rng, COMBINATIONS))
    return composition.instruction, composition.sources, composition.target


_DRAW = {
    "caption": draw_captioned,
    "edit": _edit,
    "composition": _composition,
    "prompt": draw_prompted,
}


def _picture(scene: Scene) -> Picture:
    return Picture(None, None, functools.partial(render, scene))


def conversation_record(key: str, drawn: Conversation) -> Record:
    """A conversation as a record: its pictures come before the first question."""
    turns = [Turn(*turn) for turn in drawn.turns]
    turns[0] = dataclasses.replace(turns[0], pictures=len(drawn.scenes))
    return Record(key, "", tuple(map(_picture, drawn.scenes)), None, tuple(turns))


class MiniworldSource:
    """`size` records of one kind. Record i is a pure function of (kind, seed, split, i); two splits share no
    scene and no wording, whatever their seeds. Conversations are about one picture."""

    def __init__(self, kind: Kind, *, seed: int, size: int, split: Split):
        """Raises ValueError for an unknown kind or split."""
        for name, value, known in (("kind", kind, KINDS), ("split", split, SPLITS)):
            if value not in known:
                raise ValueError(
                    f"miniworld {name}: expected one of {', '.join(known)}, found {value!r}"
                )
        self.kind, self.seed, self.size, self.split = kind, seed, size, split

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self.size:
            raise IndexError(f"record {index} of a miniworld source of {self.size}")
        stream = KINDS.index(self.kind) * len(SPLITS) + SPLITS.index(self.split)
        rng = np.random.default_rng([self.seed, int(index), stream])
        key = f"miniworld/{self.kind}/{self.split}/{self.seed}/{index}"
        if self.kind == "conversation":
            return conversation_record(
                key, draw_conversation(rng, self.split, pictures=1, turns=TURNS)
            )
        text, sources, target = _DRAW[self.kind](rng, self.split)
        return Record(key, text, tuple(map(_picture, sources)), _picture(target))

    def sizes(self) -> np.ndarray:
        """int32[N, 2], one of `SIZES` each, for the buckets; a scene is drawn at whatever size is asked for."""
        chosen = np.random.default_rng(self.seed).choice(len(SIZES), self.size, p=SHARES)
        return np.array(SIZES, np.int32)[chosen]

    def conversations(self) -> np.ndarray:
        """bool[N]: all of that kind, none of another."""
        return np.full(self.size, self.kind == "conversation")
