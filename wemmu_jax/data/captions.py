"""Sidecars of captions: JSON lines `{"key": ..., "caption": ...}`, as `wemmu data caption` writes them.

They are read once, into a folder that every process of an index's build maps. Twenty million captions are looked up
by eight bytes of a hash of their key and read from their file when asked for.

    hashes.npy  uint64[N], sorted
    places.npy  PLACE[N]    where each line is
    meta.json   the files
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
    """Key -> caption, over several files, from what `write_captions` wrote."""

    def __init__(self, folder: pathlib.Path):
        """Raises FileNotFoundError: it has not been written."""
        self._paths = read_object(folder / "meta.json", keys=("paths",))["paths"]
        self._hashes = np.load(folder / "hashes.npy", mmap_mode="r")
        self._places = np.load(folder / "places.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self._hashes)

    def get(self, key: str) -> str | None:
        """The caption of a key; None where there is none."""
        wanted = np.uint64(_hash(key))
        at = int(np.searchsorted(self._hashes, wanted))
        if at == len(self._hashes) or self._hashes[at] != wanted:
            return None
        found, caption = _read(self._paths, self._places[at])
        return caption if found == key else None


def write_captions(paths: Sequence[str], folder: pathlib.Path) -> None:
    """Reads sidecars and writes what `Captions` maps, whole or not at all.

    Raises:
      ValueError: a line is no such object, or two have the same key; names file and line.
    """
    # Twenty bytes a line; objects would take ten times that.
    hashes, starts, sizes, files = (array.array(code) for code in "QQII")
    for number, path in enumerate(paths):
        at = 0
        with storage.open_file(path) as lines:
            for line, data in enumerate(lines, 1):
                key, _ = _parse(data, f"{path}, line {line}")
                hashes.append(_hash(key))
                starts.append(at)
                sizes.append(len(data))
                files.append(number)
                at += len(data)
    column = np.array(hashes, np.uint64)
    order = np.argsort(column, kind="stable")
    column = column[order]
    places = np.empty(len(order), PLACE)
    for name, values in (("at", starts), ("file", files), ("size", sizes)):
        places[name] = np.frombuffer(values, values.typecode)[order] if len(order) else 0
    twice = np.flatnonzero(column[1:] == column[:-1])
    if len(twice):
        key, _ = _read(paths, places[twice[0]])
        raise ValueError(f"{' '.join(paths)}: two captions for {key!r}")
    partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4()}")
    partial.mkdir(parents=True)
    np.save(partial / "hashes.npy", column)
    np.save(partial / "places.npy", places)
    write_json(partial / "meta.json", {"paths": list(paths)})
    settle(partial, folder)


def _read(paths: Sequence[str], place: np.void) -> tuple[str, str]:
    path = paths[int(place["file"])]
    return _parse(storage.read(path, int(place["at"]), int(place["size"])), path)


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _parse(line: bytes, where: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
        checked_text(row["key"])
        return row["key"], checked_text(row["caption"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f'{where}: expected {{"key": ..., "caption": ...}}: {type(error).__name__}: {error}'
        ) from error
