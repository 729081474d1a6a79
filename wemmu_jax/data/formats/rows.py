"""Rows of a list in JSON, an array or an object a line, as units that are read independently."""

import abc
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from wemmu_jax.data import storage
from wemmu_jax.data.index import Entry, Place, Problem, unread

CHUNK = 20_000  # rows of a unit

# The place of a picture by what a row calls it; a ValueError where it has none.
Find = Callable[[Any], Place]


class Rows(abc.ABC):
    """What data sets that are a list have in common: units of CHUNK rows, and one entry for each.

    Attributes:
      loose: pictures are files of their own.
    """

    loose = True

    @abc.abstractmethod
    def _lists(self) -> Sequence[tuple[str, str]]:
        """(list, root of its pictures)."""

    @abc.abstractmethod
    def _entry(self, key: str, row: dict, find: Find) -> Entry:
        """The record of a row. Raises ValueError or OSError: it is none."""

    def _finder(self, root: str) -> Find:
        """Finds the pictures of a list; by default they are files below its root."""
        return functools.partial(_file, root)

    def units(self) -> list[list]:
        """[list, root of its pictures, first row, what `_slice` needs to find it]; [list, root, None, why] of a list
        that cannot be read, where there are others."""
        units, lists = [], self._lists()
        for file, root in lists:
            try:
                chunks = _chunks(file, storage.stamp(file))
            except (ValueError, OSError) as error:
                if len(lists) == 1:
                    raise
                units.append([file, root, None, str(error)])
            else:
                units += [[file, root, first, at] for first, at in chunks]
        return units

    def scan(self, unit: list) -> Iterator[Entry | Problem]:
        """The records of some rows; keys are rows counted from 1, after `LIST:` where there are several."""
        file, root, first, at = unit
        if first is None:
            yield Problem(file, at, records=0)
            return
        prefix = f"{file}:" if len(self._lists()) > 1 else ""
        find = self._finder(root)
        number = first
        try:
            for number, row in enumerate(_slice(file, storage.stamp(file), first, at), first + 1):
                if row is not None:
                    where = f"{file}, row {number}"
                    yield from self._checked(f"{prefix}{number}", row, find, where)
        except (ValueError, OSError) as error:  # of the list itself
            yield unread(file, error, where=f"{file}, after row {number}", records=0)

    def _checked(self, key: str, row: Any, find: Find, where: str) -> Iterator[Entry | Problem]:
        try:
            if isinstance(row, ValueError):
                raise row
            if not isinstance(row, dict):
                raise ValueError(f"expected an object, found {type(row).__name__}")
            yield self._entry(key, row, find)
        except (ValueError, OSError) as error:
            yield unread(key, error, where=where)

    def read(self, path: str, at: int, size: int) -> bytes:
        """Bytes of a file, or of a tar's member."""
        return storage.read(path, at, size)


def _file(root: str, name: Any) -> Place:
    if not isinstance(name, str):
        raise ValueError(f"expected a picture's path, found {name!r}")
    return Place(storage.join(root, name))


@functools.lru_cache(maxsize=4)
def _chunks(file: str, stamp) -> list[tuple[int, int]]:
    """(first row, where it begins: an offset in lines, in an array a row) of each unit."""
    if stamp is None:
        raise FileNotFoundError(f"{file}: no such file")
    if _is_array(file):
        return [(first, first) for first in range(0, max(len(_array(file, stamp)), 1), CHUNK)]
    chunks, at = [], 0
    with storage.open_file(file) as lines:
        for number, line in enumerate(lines):
            if number % CHUNK == 0:
                chunks.append((number, at))
            at += len(line)
    return chunks


def _slice(file: str, stamp, first: int, at: int) -> Iterator[Any]:
    """The values of a unit's rows; a ValueError in the place of one that is no JSON. None for an
    empty line."""
    if _is_array(file):
        yield from _array(file, stamp)[first : first + CHUNK]
        return
    with storage.open_file(file) as lines:
        lines.seek(at)
        for number, line in enumerate(lines):
            if number == CHUNK:
                return
            if not line.strip():
                yield None
                continue
            try:
                yield json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                yield ValueError(f"not JSON in UTF-8: {error}")


def _is_array(file: str) -> bool:
    with storage.open_file(file) as opened:
        return opened.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


@functools.lru_cache(maxsize=2)
def _array(file: str, stamp) -> list:
    try:
        found = json.loads(storage.read(file).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON in UTF-8: {error}") from error
    return found
