"""Sidecars of captions: JSON lines `{"key": ..., "caption": ...}`, as `wemmu data caption` writes them.

They are read once, into a folder that every process of an index's build maps. Twenty million captions are looked up
by eight bytes of a hash of their key and read from their file when asked for. A line that is none costs its record.

    hashes.npy  uint64[N], sorted
    places.npy  PLACE[N]    where each line is
    meta.json   the files, and what is said of lines whose key cannot be read
"""

import array
import hashlib
import json
import pathlib
import uuid
from collections.abc import Sequence

import numpy as np

from wemmu_jax.data import storage
from wemmu_jax.data.formats.tar import checked_text
from wemmu_jax.data.index import settle
from wemmu_jax.files import read_object, write_json

PLACE = np.dtype([("at", "<u8"), ("file", "<u4"), ("size", "<u4")])


class Captions:
    """Key -> caption, over several files, from what `write_captions` wrote.

    Attributes:
      unread: how many lines there are whose key cannot be read, and the first of them; empty if there are none.
    """

    def __init__(self, folder: pathlib.Path):
        """Raises FileNotFoundError: it has not been written."""
        meta = read_object(folder / "meta.json", keys=("paths", "unread"))
        self._paths, self.unread = meta["paths"], meta["unread"]
        self._hashes = np.load(folder / "hashes.npy", mmap_mode="r")
        self._places = np.load(folder / "places.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self._hashes)

    def get(self, key: str) -> str | None:
        """The caption of a key; None where there is none.

        Raises:
          ValueError, OSError: its line is no such object, or cannot be read; names the file.
        """
        wanted = np.uint64(_hash(key))
        at = int(np.searchsorted(self._hashes, wanted))
        if at == len(self._hashes) or self._hashes[at] != wanted:
            return None
        line, where = _read(self._paths, self._places[at])
        if _text(line, where, "key") != key:
            return None
        return _text(line, where, "caption").strip()


def write_captions(paths: Sequence[str], folder: pathlib.Path) -> None:
    """Reads sidecars and writes what `Captions` maps, whole or not at all.

    Raises:
      ValueError: two lines have the same key.
    """
    # Twenty bytes a line; objects would take ten times that.
    hashes, starts, sizes, files = (array.array(code) for code in "QQII")
    unread, first = 0, ""
    for number, path in enumerate(paths):
        at = 0
        with storage.open_file(path) as lines:
            for line, data in enumerate(lines, 1):
                start, at = at, at + len(data)
                if not data.strip():
                    continue
                try:
                    key = _text(data, f"{path}, line {line}", "key")
                except ValueError as error:
                    unread, first = unread + 1, first or str(error)
                    continue
                hashes.append(_hash(key))
                starts.append(start)
                sizes.append(len(data))
                files.append(number)
    column = np.array(hashes, np.uint64)
    order = np.argsort(column, kind="stable")
    column = column[order]
    places = np.empty(len(order), PLACE)
    for name, values in (("at", starts), ("file", files), ("size", sizes)):
        places[name] = np.frombuffer(values, values.typecode)[order] if len(order) else 0
    twice = np.flatnonzero(column[1:] == column[:-1])
    if len(twice):
        key = _text(*_read(paths, places[twice[0]]), "key")
        raise ValueError(f"{' '.join(paths)}: two captions for {key!r}")
    partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4()}")
    partial.mkdir(parents=True)
    np.save(partial / "hashes.npy", column)
    np.save(partial / "places.npy", places)
    summary = f"lines that cannot be read: {unread}, first {first}" if unread else ""
    write_json(partial / "meta.json", {"paths": list(paths), "unread": summary})
    settle(partial, folder)


def _read(paths: Sequence[str], place: np.void) -> tuple[bytes, str]:
    """A line, and where it is."""
    path, at = paths[int(place["file"])], int(place["at"])
    return storage.read(path, at, int(place["size"])), f"{path}, line at byte {at}"


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _text(line: bytes, where: str, key: str) -> str:
    try:
        found = json.loads(line)[key]
        checked_text(found)
        return found
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f'{where}: expected {{"key": ..., "caption": ...}}: {type(error).__name__}: {error}'
        ) from error
