"""What every data set becomes before anything else looks at it: a text, source pictures and a target picture.

A picture is a promise: it knows its own size where that is known without decoding, and gives its pixels at the
size that it is asked for, so that it is decoded once and resized once for each use.
"""

import dataclasses
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
class Record:
    """One entry of a data set.

    Attributes:
      key: its name, unique within the data set; goes into errors and logs.
      text: the caption of `target`, or the instruction that leads from `sources` to it.
      sources: none for a captioned picture, one for an edit, several for a composition.
      target: the picture to be drawn.
    """

    key: str
    text: str
    sources: tuple[Picture, ...]
    target: Picture


class RecordSource(Protocol):
    """A data set with random access. Two more methods are optional:

    `sizes() -> int32[N, 2] | None`: (height, width) of each target, known without decoding; None, or no such
    method: every target can be had at any size.

    `source_counts() -> int32[N]`: the number of source pictures of each record; without it all records have as
    many as the first.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def target_sizes(source: RecordSource) -> np.ndarray | None:
    """int32[N, 2], (height, width) of each target, or None where any size can be had."""
    sizes = getattr(source, "sizes", lambda: None)()
    if sizes is not None and np.shape(sizes) != (len(source), 2):
        raise ValueError(f"sizes() gave {np.shape(sizes)}, expected {(len(source), 2)}")
    return None if sizes is None else np.asarray(sizes)


def source_counts(source: RecordSource) -> np.ndarray:
    """int8[N], the number of source pictures of each record."""
    if hasattr(source, "source_counts"):
        return np.asarray(source.source_counts()).astype(np.int8)
    return np.full(len(source), len(source[0].sources) if len(source) else 0, np.int8)
