"""Miniworld: scenes of a few coloured shapes, with all that can be said about them, asked of them and done to them.

Record sources for training are in `wemmu_jax.miniworld.sources`.
"""

from wemmu_jax.miniworld.compositions import Composition, draw_composition
from wemmu_jax.miniworld.edits import Edit, draw_edit
from wemmu_jax.miniworld.language import caption
from wemmu_jax.miniworld.prompts import CATEGORIES, Prompt, draw_prompt
from wemmu_jax.miniworld.questions import Question, draw_question
from wemmu_jax.miniworld.reader import Reading, read
from wemmu_jax.miniworld.renderer import render
from wemmu_jax.miniworld.scene import Object, Scene, draw_scene
from wemmu_jax.miniworld.scorer import (
    ChangeGrade,
    Grade,
    score_composition,
    score_edit,
    score_prompt,
    score_reconstruction,
)

__all__ = [
    "CATEGORIES",
    "ChangeGrade",
    "Composition",
    "Edit",
    "Grade",
    "Object",
    "Prompt",
    "Question",
    "Reading",
    "Scene",
    "caption",
    "draw_composition",
    "draw_edit",
    "draw_prompt",
    "draw_question",
    "draw_scene",
    "read",
    "render",
    "score_composition",
    "score_edit",
    "score_prompt",
    "score_reconstruction",
]
