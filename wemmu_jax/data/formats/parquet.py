"""Parquet files: BAGEL's, with the pictures' bytes in them, and ImgEdit's, with paths."""

import abc
import contextlib
import dataclasses
import functools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from wemmu_jax.data import storage
from wemmu_jax.data.formats.tar import checked_text
from wemmu_jax.data.index import Entry, Place, Problem, unread
from wemmu_jax.errors import passes

# A picture inside a row group: `Place.at` is row * ELEMENTS + which of the row's pictures.
ELEMENTS = 64
_T2I, _EDIT = "image", "image_list"
# What comes of a cell that has another form than expected.
_MISFITS = (ValueError, TypeError, KeyError, AttributeError, RecursionError)

Columns = Mapping[str, pa.ChunkedArray]
Cells = Mapping[str, pa.Scalar]


class _Files(abc.ABC):
    """Units are row groups."""

    def inputs(self) -> list[str]:
        """The files."""
        return storage.expand(self.paths)

    def units(self) -> list[list]:
        """[file, row group, its first row, its rows]; [file, None, 0, 0] of one that cannot be opened."""
        # What was opened before may be another file by now.
        _open.cache_clear()
        _pictures.cache_clear()
        units = []
        for path in self.inputs():
            try:
                metadata = _open(path).metadata
            except (ValueError, OSError):
                units.append([path, None, 0, 0])
                continue
            first = 0
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                units.append([path, group, first, rows])
                first += rows
        return units

    def scan(self, unit: list) -> Iterator[Entry | Problem]:
        """The records of a row group; one that cannot be read is a problem for each row."""
        path, group, first, rows = unit
        name = path.rpartition("/")[2]
        try:
            file = _open(path)
            if group is None:
                raise OSError(f"{path}: could not be opened before")
            columns = self._columns(file, path, group)
        except (ValueError, OSError) as error:
            for row in range(rows):
                yield unread(f"{name}:{first + row + 1}", error)
            if not rows:
                yield unread(path, error, records=0)
            return
        for row in range(rows):
            where = f"{path}, row {first + row + 1}"
            try:
                cells = {field: column[row] for field, column in columns.items()}
                yield from self._records(f"{name}:{first + row + 1}", path, first + row, cells)
            except _MISFITS as error:
                yield _misfit(f"{name}:{first + row + 1}", where, error)

    @abc.abstractmethod
    def _columns(self, file: pq.ParquetFile, path: str, group: int) -> Columns:
        """What a scan needs of a row group. Raises ValueError or OSError, which name it."""

    @abc.abstractmethod
    def _records(self, key: str, path: str, row: int, cells: Cells) -> Iterator[Entry | Problem]:
        """The records of a row. Raises one of _MISFITS: it is none."""


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

    loose = False

    def _columns(self, file: pq.ParquetFile, path: str, group: int) -> Columns:
        pictures, texts = _pair(path)
        # `read` will find the pictures where they are now.
        return {pictures: _pictures(path, group), texts: _column(path, group, texts)}

    def read(self, path: str, at: int, size: int) -> bytes:
        """Bytes of a picture in a cell: bytes, Hugging Face's `{bytes, path}`, or a list of these."""
        row, element = divmod(at, ELEMENTS)
        group, first = _group_of(path, row)
        where = f"{path}, row group {group}, row {row + 1}"
        pictures = _pictures(path, group)
        with _naming(where):
            cell = pictures[row - first].as_py()
        found = cell[element : element + 1] if isinstance(cell, list) else [cell]
        found = [one.get("bytes") if isinstance(one, dict) else one for one in found]
        if not found or not isinstance(found[0], bytes):
            raise ValueError(f"{where}: expected the bytes of a picture, found {found!r:.80}")
        return found[0]

    def _records(self, key: str, path: str, row: int, cells: Cells) -> Iterator[Entry | Problem]:
        if _T2I in cells:
            text = checked_text(self._caption(cells["captions"].as_py(), key))
            yield Entry(key, text, (Place(path, row * ELEMENTS),))
            return
        steps = cells["instruction_list"].as_py()
        pictures = len(cells[_EDIT]) if cells[_EDIT].is_valid else 0
        if pictures != len(steps) + 1 or not 2 <= pictures <= ELEMENTS:
            raise ValueError(
                f"expected 2 to {ELEMENTS} pictures and one instruction fewer; found {pictures} and {len(steps)}"
            )
        for step, wordings in enumerate(steps):
            own = f"{key}:{step + 1}"
            edit = functools.partial(_edit, own, wordings, path, row * ELEMENTS + step)
            yield _tried(own, f"{path}, row {row + 1}", edit)

    def _caption(self, captions: Any, key: str) -> Any:
        captions = json.loads(captions) if isinstance(captions, str) else captions
        if not isinstance(captions, dict) or not captions:
            raise ValueError(f"captions: expected names and captions, found {captions!r}")
        if not self.caption:
            return _choose(list(captions.values()), key)
        if self.caption not in captions:
            raise ValueError(f"captions: no {self.caption!r}; found {', '.join(captions)}")
        return captions[self.caption]


def _edit(key: str, wordings: Any, path: str, before: int) -> Entry:
    """From the picture at `before` to the next one."""
    if wordings is not None and not isinstance(wordings, list):
        raise ValueError(f"expected a list of wordings, found {wordings!r}")
    text = checked_text(_choose(wordings, key) if wordings else "")
    return Entry(key, text, (Place(path, before + 1), Place(path, before)))


@dataclasses.dataclass(frozen=True)
class ImgEdit(_Files):
    """ImgEdit: `input_images`, `output_images`, `prompt`; of several turns: `data`, a list of those.

    Attributes:
      paths: Parquet files.
      root: what the pictures' paths are relative to, by default the file's folder.
    """

    paths: str | list | tuple
    root: str = ""

    loose = True

    def _columns(self, file: pq.ParquetFile, path: str, group: int) -> Columns:
        return {name: _column(path, group, name) for name in file.schema_arrow.names}

    def _records(self, key: str, path: str, row: int, cells: Cells) -> Iterator[Entry | Problem]:
        root = self.root or storage.parent(path)
        values = {name: cell.as_py() for name, cell in cells.items()}
        turns = values.get("data", [values])
        if not isinstance(turns, list) or not turns:
            raise ValueError(f"data: expected a list of turns, found {turns!r}")
        for number, turn in enumerate(turns, 1):
            own = key if len(turns) == 1 else f"{key}:{number}"
            yield _tried(own, f"{path}, row {row + 1}", functools.partial(_turn, own, turn, root))

    def read(self, path: str, at: int, size: int) -> bytes:
        """Bytes of a file."""
        return storage.read(path, at, size)


def _turn(key: str, turn: dict[str, Any], root: str) -> Entry:
    outputs, inputs = turn["output_images"], turn["input_images"]
    if len(outputs) != 1:
        raise ValueError(f"expected one output image, found {len(outputs)}")
    places = tuple(Place(storage.join(root, name)) for name in (*outputs, *inputs))
    return Entry(key, checked_text(turn["prompt"]), places)


def _tried(key: str, where: str, make: Callable[[], Entry]) -> Entry | Problem:
    try:
        return make()
    except _MISFITS as error:
        return _misfit(key, where, error)


def _misfit(key: str, where: str, error: Exception) -> Problem:
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return Problem(key, f"{where}: {kind}{error}")


def _choose(options: list, key: str) -> Any:
    return options[zlib.crc32(key.encode()) % len(options)]


@functools.lru_cache(maxsize=16)
def _open(path: str) -> pq.ParquetFile:
    if storage.stamp(path) is None:
        raise FileNotFoundError(f"{path}: no such file")
    with _naming(f"{path}: no Parquet file"):
        return pq.ParquetFile(storage.open_file(path))


@contextlib.contextmanager
def _naming(where: str) -> Iterator[None]:
    """Errors of pyarrow say neither the file nor the row group."""
    try:
        yield
    except OSError as error:
        kind = ConnectionError if passes(error) else OSError
        raise kind(f"{where}: {error}") from error
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _group_of(path: str, row: int) -> tuple[int, int]:
    """The row group that holds a row, and its first row."""
    metadata, first = _open(path).metadata, 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if row < first + rows:
            return group, first
        first += rows
    raise ValueError(f"{path}: expected more than {row} rows, found {first}: the index is stale")


def _pair(path: str) -> tuple[str, str]:
    """The columns of BAGEL's pictures and texts."""
    names = _open(path).schema_arrow.names
    for pair in ((_T2I, "captions"), (_EDIT, "instruction_list")):
        if set(pair) <= set(names):
            return pair
    raise ValueError(
        f"{path}: expected columns image and captions, or image_list and instruction_list; "
        f"found {', '.join(names)}"
    )


@functools.lru_cache(maxsize=2)
def _pictures(path: str, group: int) -> pa.ChunkedArray:
    return _column(path, group, _pair(path)[0])


def _column(path: str, group: int, name: str) -> pa.ChunkedArray:
    file = _open(path)
    with _naming(f"{path}, row group {group}"):
        return file.read_row_group(group, columns=[name]).column(0)
