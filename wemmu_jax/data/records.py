"""What every data set becomes before anything else looks at it: a text, source pictures and a target picture; or
turns of a conversation and the pictures that it is about.

A picture is a promise: it knows its own size where that is known without decoding, and gives its pixels at the
size that it is asked for, so that it is decoded once and resized once for each use.
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture that has not been decoded yet.

    Attributes:
      height, width: its own size in pixels, as it is looked at (after EXIF rotation); both None when it has none,
        because it is drawn at whatever size is asked for.
      load: `load(height, width)` -> uint8[height, width, 3], RGB, exactly of that size. A picture with a size of
        its own is scaled to cover the asked one and cropped at its centre, no more than the aspect asks.
      identity: CRC-32 and size of its bytes, and how it is shown if not as `load` says; None when it is drawn.
    """

    height: int | None
    width: int | None
    load: Callable[[int, int], np.ndarray]
    identity: tuple | None = None


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
      question: without placeholders; empty where the pictures ask.
      answer: what is to be learned.
      pictures: how many of the record's pictures it shows, before the question's words.
    """

    question: str
    answer: str
    pictures: int = 0


@dataclasses.dataclass(frozen=True)
class Record:
    """One entry of a data set: a picture to be drawn, or a conversation.

    Attributes:
      key: its name, unique within the data set; goes into errors and logs.
      text: the caption of `target`, or the instruction that leads from `sources` to it; empty in a conversation.
      sources: none for a captioned picture, one for an edit, several for a composition; a conversation's pictures,
        which its turns show in this order.
      target: the picture to be drawn; None in a conversation.
      turns: of a conversation.
    """

    key: str
    text: str
    sources: tuple[Picture, ...]
    target: Picture | None
    turns: tuple[Turn, ...] = ()

    def __post_init__(self) -> None:
        if (self.target is None) != bool(self.turns):
            raise ValueError(f"record {self.key!r}: expected either a target or turns")
        if self.turns and (shown := sum(turn.pictures for turn in self.turns)) != len(self.sources):
            raise ValueError(
                f"record {self.key!r}: its turns show {shown} pictures, found {len(self.sources)}"
            )


class RecordSource(Protocol):
    """A data set with random access. Four more methods are optional:

    `sizes() -> int32[N, 2] | None`: (height, width) of each target, of a conversation's first picture, known without
    decoding; None, or no such method: every picture can be had at any size.

    `source_counts() -> int32[N]`: the number of source pictures of each record; without it all records have as
    many as the first.

    `conversations() -> bool[N]`: which records are conversations; without it none is.

    `identity() -> str`: equal where the records are; without it, a checksum of what the other methods say.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def target_sizes(source: RecordSource) -> np.ndarray | None:
    """int32[N, 2], (height, width) of what gives each record its bucket, or None where any size can be had."""
    sizes = getattr(source, "sizes", lambda: None)()
    if sizes is not None and np.shape(sizes) != (len(source), 2):
        raise ValueError(f"sizes() gave {np.shape(sizes)}, expected {(len(source), 2)}")
    return None if sizes is None else np.asarray(sizes)


def source_counts(source: RecordSource) -> np.ndarray:
    """int8[N], the number of source pictures of each record."""
    if hasattr(source, "source_counts"):
        return np.asarray(source.source_counts()).astype(np.int8)
    return np.full(len(source), len(source[0].sources) if len(source) else 0, np.int8)


def conversations(source: RecordSource) -> np.ndarray:
    """bool[N], which records are conversations."""
    if hasattr(source, "conversations"):
        return np.asarray(source.conversations())
    return np.zeros(len(source), bool)


def identity(source: RecordSource) -> str:
    """Equal where two hosts see the same records."""
    if hasattr(source, "identity"):
        return source.identity()
    sizes = target_sizes(source)
    columns = [source_counts(source), conversations(source)] + ([] if sizes is None else [sizes])
    found = zlib.crc32(b"".join(np.ascontiguousarray(column).tobytes() for column in columns))
    return f"{len(source):,} records, {found:08x}"
