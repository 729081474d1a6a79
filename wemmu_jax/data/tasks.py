"""The five training tasks of the curriculum (design section 2), and turns of questions and answers, from which a VLM
learns; each a pure function of a record."""

import dataclasses
import enum

import numpy as np

from wemmu_jax.data import prompts
from wemmu_jax.data.pictures import shown_whole
from wemmu_jax.data.records import Picture, Record, Turn


class Task(enum.Enum):
    """A training task; the values are the names in the curriculum's mixtures."""

    T2I = "T2I"
    UNCOND = "Uncond"
    REC = "Rec"
    S_EDIT = "S-Edit"
    M_EDIT = "M-Edit"
    VQA = "VQA"


# What a stage can train: it leaves the VLM, which answers, as it is.
STAGE_TASKS = tuple(task for task in Task if task is not Task.VQA)


@dataclasses.dataclass(frozen=True)
class Example:
    """What a row of a micro-batch is made from: the user's turn (`sources`, then `text`) and the answer.

    Attributes:
      task: the task that asks.
      text: the prompt, without the chat template; empty for VQA.
      sources: the pictures in the prompt; their number is the arity.
      target: the picture to be drawn; None for VQA.
      key: the record's key.
      turns: questions and answers, for VQA.
    """

    task: Task
    text: str
    sources: tuple[Picture, ...]
    target: Picture | None
    key: str
    turns: tuple[Turn, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """All that is said: the prompt, or questions and answers in turn."""
        said = tuple(text for turn in self.turns for text in (turn.question, turn.answer))
        return said or (self.text,)


def arities(task: Task, source_counts: np.ndarray) -> np.ndarray:
    """The number of pictures in the prompt when `task` uses a record with so many source pictures.

    Args:
      task: the task.
      source_counts: int[N], source pictures of each record; of conversations for VQA, of others for all else.

    Returns:
      int[N]; -1 where the record cannot serve the task. Rec and Uncond take any record's target. S-Edit and M-Edit
      have no record in common, because UniWorld-V1's lists hold both kinds and the paper weighs them apart.
    """
    match task:
        case Task.UNCOND:
            return np.zeros_like(source_counts)
        case Task.REC:
            return np.ones_like(source_counts)
        case Task.VQA:
            return source_counts
        case Task.T2I:
            serves = source_counts == 0
        case Task.S_EDIT:
            serves = source_counts == 1
        case Task.M_EDIT:
            serves = source_counts >= 2
    return np.where(serves, source_counts, -1)


def arity(task: Task, record: Record) -> int:
    """`arities` of one record; a ValueError where it cannot serve the task."""
    if bool(record.turns) != (task is Task.VQA):
        found = "is a conversation" if record.turns else "has no turns"
        raise ValueError(f"record {record.key!r} {found} and cannot serve task {task.value}")
    pictures = int(arities(task, np.array(len(record.sources))))
    if pictures < 0:
        found = f"{len(record.sources)} source picture(s)"
        raise ValueError(f"record {record.key!r} with {found} cannot serve task {task.value}")
    return pictures


def make_example(task: Task, record: Record) -> Example:
    """`record` as `task` uses it.

    Raises:
      ValueError: the record cannot serve the task.
    """
    arity(task, record)
    if not record.text and task in (Task.T2I, Task.S_EDIT, Task.M_EDIT):
        raise ValueError(f"record {record.key!r} has no text and cannot serve task {task.value}")
    match task:
        case Task.T2I:
            text, sources = record.text, ()
        case Task.UNCOND:
            text, sources = prompts.UNCONDITIONAL_PROMPT, ()
        case Task.REC:
            text, sources = prompts.RECONSTRUCTION_PROMPT, (record.target,)
        case Task.S_EDIT:
            text, sources = record.text, record.sources
        case Task.M_EDIT | Task.VQA:
            text, sources = record.text, tuple(map(shown_whole, record.sources))
    return Example(task, text, sources, record.target, record.key, record.turns)
