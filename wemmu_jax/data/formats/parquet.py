"""Parquet files: BAGEL's, with the pictures' bytes in them, and ImgEdit's, with paths."""

import dataclasses
import functools
import json
import zlib
from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq

from wemmu_jax.data import storage
from wemmu_jax.data.formats.tar import checked_text
from wemmu_jax.data.index import Entry, Place, Problem

# A picture inside a row group: `Place.at` is row * ELEMENTS + which of the row's pictures.
ELEMENTS = 64
_T2I, _EDIT = "image", "image_list"


class _Files:
    """Units are row groups."""

    def inputs(self) -> list[str]:
        """The files."""
        return storage.expand(self.paths)

    def units(self) -> list[list]:
        """[file, row group, its first row]."""
        units = []
        for path in self.inputs():
            first = 0
            for group in range(_open(path).num_row_groups):
                units.append([path, group, first])
                first += _open(path).metadata.row_group(group).num_rows
        return units

    def _rows(self, unit: list) -> Iterator[tuple[str, int, dict]]:
        """(key, row in the file, values) of a row group."""
        path, group, first = unit
        name = path.rpartition("/")[2]
        rows = _open(path).read_row_group(group).to_pylist()
        for row, values in enumerate(rows, first):
            yield f"{name}:{row + 1}", row, values


@dataclasses.dataclass(frozen=True)
class Bagel(_Files):
    """BAGEL: `image` and `captions` (JSON, name -> caption), or `image_list` and `instruction_list`.

    An edit of several steps is a record a step. Of several captions or wordings one is taken by the record's key.
    To read a picture at random is to read its row group: `wemmu data pack` makes it fast.

    Attributes:
      paths: Parquet files: names, `{0..9}`, `*`.
      caption: the name of the caption to take; empty: one by the key.
    """

    paths: str | list | tuple
    caption: str = ""

    def scan(self, unit: list) -> Iterator[Entry | Problem]:
        """The records of a row group."""
        names = _open(unit[0]).schema_arrow.names
        if not {_T2I, "captions"} <= set(names) and not {_EDIT, "instruction_list"} <= set(names):
            yield Problem(
                unit[0],
                "expected columns image and captions, or image_list and instruction_list; "
                f"found {', '.join(names)}",
            )
            return
        records = self._captioned if _T2I in names else self._edits
        for key, row, values in self._rows(unit):
            try:
                yield from records(key, unit[0], row, values)
            except (ValueError, TypeError) as error:
                yield Problem(key, f"{unit[0]}, row {row + 1}: {error}")

    def read(self, path: str, at: int, size: int) -> bytes:
        """Bytes of a picture in a cell."""
        row, element = divmod(at, ELEMENTS)
        group, first = _group_of(path, row)
        cell = _cells(path, group)[row - first].as_py()
        return cell if isinstance(cell, bytes) else cell[element]

    def _captioned(self, key: str, path: str, row: int, values: dict) -> Iterator[Entry]:
        captions = values["captions"]
        captions = json.loads(captions) if isinstance(captions, str) else captions
        if not isinstance(captions, dict) or not captions:
            raise ValueError(f"captions: expected names and captions, found {captions!r}")
        if self.caption and self.caption not in captions:
            raise ValueError(f"captions: no {self.caption!r}; found {', '.join(captions)}")
        text = captions[self.caption] if self.caption else _choose(list(captions.values()), key)
        yield Entry(key, checked_text(text), (Place(path, row * ELEMENTS),))

    def _edits(self, key: str, path: str, row: int, values: dict) -> Iterator[Entry]:
        pictures, steps = values["image_list"], values["instruction_list"]
        if len(pictures) != len(steps) + 1 or not 2 <= len(pictures) <= ELEMENTS:
            raise ValueError(
                f"expected 2 to {ELEMENTS} pictures and one instruction fewer; found {len(pictures)} and {len(steps)}"
            )
        for step, wordings in enumerate(steps):
            own = f"{key}:{step + 1}"
            text = checked_text(_choose(wordings, own) if wordings else "")
            target, source = (Place(path, row * ELEMENTS + step + i) for i in (1, 0))
            yield Entry(own, text, (target, source))


@dataclasses.dataclass(frozen=True)
class ImgEdit(_Files):
    """ImgEdit: `input_images`, `output_images`, `prompt`; of several turns: `data`, a list of those.

    Attributes:
      paths: Parquet files.
      root: what the pictures' paths are relative to, by default the file's folder.
    """

    paths: str | list | tuple
    root: str = ""

    def scan(self, unit: list) -> Iterator[Entry | Problem]:
        """The records of a row group, a turn each."""
        root = self.root or storage.parent(unit[0])
        for key, row, values in self._rows(unit):
            turns = values.get("data", [values])
            for number, turn in enumerate(turns, 1):
                own = key if len(turns) == 1 else f"{key}:{number}"
                try:
                    yield _turn(own, turn, root)
                except (ValueError, TypeError, KeyError) as error:
                    yield Problem(own, f"{unit[0]}, row {row + 1}: {type(error).__name__}: {error}")

    def read(self, path: str, at: int, size: int) -> bytes:
        """Bytes of a file."""
        return storage.read(path, at, size)


def _turn(key: str, turn: dict[str, Any], root: str) -> Entry:
    outputs, inputs = turn["output_images"], turn["input_images"]
    if len(outputs) != 1:
        raise ValueError(f"expected one output image, found {len(outputs)}")
    places = tuple(Place(storage.join(root, name)) for name in (*outputs, *inputs))
    return Entry(key, checked_text(turn["prompt"]), places)


def _choose(options: list, key: str) -> Any:
    return options[zlib.crc32(key.encode()) % len(options)]


@functools.lru_cache(maxsize=16)
def _open(path: str) -> pq.ParquetFile:
    if storage.stamp(path) is None:
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return pq.ParquetFile(storage.open_file(path))
    except ValueError as error:
        raise ValueError(f"{path}: no Parquet file: {error}") from error


def _group_of(path: str, row: int) -> tuple[int, int]:
    """The row group that holds a row, and its first row."""
    metadata, first = _open(path).metadata, 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if row < first + rows:
            return group, first
        first += rows
    raise ValueError(f"{path}: expected more than {row} rows, found {first}: the index is stale")


@functools.lru_cache(maxsize=2)
def _cells(path: str, group: int):
    names = _open(path).schema_arrow.names
    column = _T2I if _T2I in names else _EDIT
    return _open(path).read_row_group(group, columns=[column]).column(0).combine_chunks()
