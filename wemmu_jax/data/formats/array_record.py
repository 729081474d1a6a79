"""ArrayRecord files as `wemmu data pack` writes them: one record each, its pictures as they were.

A record is a JSON object and the pictures' bytes: `{"key", "text", "sizes": [bytes of the target, of a source, ...]}`,
a newline, the target, the sources. A conversation has no target, and `"turns": [[question, answer, pictures], ...]`.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Sequence

from array_record.python import array_record_module

from wemmu_jax.data import storage
from wemmu_jax.data.formats.parquet import ELEMENTS
from wemmu_jax.data.index import Entry, Place, Problem
from wemmu_jax.data.records import Turn
from wemmu_jax.errors import passes

_CHUNK = 256  # records read at once in a scan
_ERRORS = (RuntimeError, ValueError, IndexError, OSError)  # of the library
_MISFITS = (TypeError, KeyError)  # of a header of another form


@dataclasses.dataclass(frozen=True)
class ArrayRecord:
    """Packed files, local ones: the library reads no buckets.

    Attributes:
      paths: names, `{00000..00009}`, `*`.
    """

    paths: str | list | tuple
    loose = False

    def inputs(self) -> list[str]:
        """The files."""
        return storage.expand(self.paths)

    def units(self) -> list[str]:
        """The files."""
        return self.inputs()

    def scan(self, path: str) -> Iterator[Entry | Problem]:
        """The records of a file."""
        if storage.is_remote(path) or not os.path.exists(path):
            yield Problem(path, "no such local file", records=0)
            return
        try:
            count = _reader(path, storage.stamp(path)).num_records()
        except _ERRORS as error:
            yield _damaged(path, error, records=0)
            return
        for first in range(0, count, _CHUNK):
            numbers = range(first, min(first + _CHUNK, count))
            try:
                found = _records(path, numbers)
            except _ERRORS:
                found = [None] * len(numbers)
            for number, data in zip(numbers, found, strict=True):
                try:
                    # After an error in any of them, one by one: the others are whole.
                    [data] = _records(path, [number]) if data is None else [data]
                    yield _entry(path, number, data)
                except (*_ERRORS, *_MISFITS) as error:
                    yield _damaged(f"{path}, record {number}", error)

    def read(self, path: str, at: int, size: int) -> bytes:
        """Bytes of one of a record's pictures."""
        number, element = divmod(at, ELEMENTS)
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path}: no such file")
        try:
            [data] = _records(path, [number])
            header, start = _split(data)
            start += sum(header["sizes"][:element])
            return data[start : start + header["sizes"][element]]
        except (*_ERRORS, *_MISFITS) as error:
            if passes(error):
                raise
            raise ValueError(f"{path}, record {number}: {error}") from error


def pack(key: str, text: str, pictures: Sequence[bytes], turns: Sequence[Turn] = ()) -> bytes:
    """A record, its target's bytes first."""
    header = {"key": key, "text": text, "sizes": [len(picture) for picture in pictures]}
    if turns:
        header["turns"] = [dataclasses.astuple(turn) for turn in turns]
    return b"".join([json.dumps(header).encode(), b"\n", *pictures])


def writer(path: str) -> array_record_module.ArrayRecordWriter:
    """For `write(bytes)` and `close()`; groups of one record are what makes random reads cheap."""
    return array_record_module.ArrayRecordWriter(path, "group_size:1,uncompressed")


def _split(data: bytes) -> tuple[dict, int]:
    end = data.index(b"\n")
    return json.loads(data[:end]), end + 1


def _entry(path: str, number: int, data: bytes) -> Entry:
    header, _ = _split(data)
    places = tuple(Place(path, number * ELEMENTS + i) for i in range(len(header["sizes"])))
    turns = tuple(Turn(*turn) for turn in header.get("turns", ()))
    key, text = header["key"], header["text"]
    if not isinstance(key, str) or not isinstance(text, str):
        raise ValueError(f"expected a key and a text, found {key!r:.80} and {text!r:.80}")
    return Entry(key, text, places, turns)


def _damaged(where: str, error: Exception, *, records: int = 1) -> Problem:
    # The library does not tell a disk that fails from a file that is damaged.
    return Problem(where, f"damaged: {type(error).__name__}: {error}", True, records)


def _records(path: str, numbers: Sequence[int]) -> list[bytes]:
    return _reader(path, storage.stamp(path)).read(list(numbers))


@functools.lru_cache(maxsize=64)
def _reader(path: str, stamp) -> array_record_module.ArrayRecordReader:
    return array_record_module.ArrayRecordReader(path, "readahead_buffer_size:0")
