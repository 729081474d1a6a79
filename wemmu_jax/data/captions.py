"""Sidecars of captions: JSON lines `{"key": ..., "caption": ...}`, as `wemmu data caption` writes them.

Twenty million of them are looked up by eight bytes of a hash of their key and read from their file when asked for.
"""

import functools
import hashlib
import json

import numpy as np

from wemmu_jax.data import storage
from wemmu_jax.data.formats.tar import checked_text


class Captions:
    """Key -> caption, over several files."""

    def __init__(self, paths: tuple[str, ...]):
        """Raises ValueError: a line is no such object, or two have the same key; names file and line."""
        self._paths = paths
        hashes, places = [], []
        for number, path in enumerate(paths):
            at = 0
            with storage.open_file(path) as lines:
                for line, data in enumerate(lines, 1):
                    key, _ = _parse(data, f"{path}, line {line}")
                    hashes.append(_hash(key))
                    places.append((number, at, len(data)))
                    at += len(data)
        hashes = np.array(hashes, np.uint64)
        order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[order]
        self._places = np.array(places, np.int64).reshape(-1, 3)[order]
        twice = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        if len(twice):
            raise ValueError(f"{' '.join(paths)}: two captions for {self._at(int(twice[0]))[0]!r}")

    def __len__(self) -> int:
        return len(self._hashes)

    def get(self, key: str) -> str | None:
        """The caption of a key; None where there is none."""
        wanted = np.uint64(_hash(key))
        at = int(np.searchsorted(self._hashes, wanted))
        if at == len(self._hashes) or self._hashes[at] != wanted:
            return None
        found, caption = self._at(at)
        return caption if found == key else None

    def _at(self, at: int) -> tuple[str, str]:
        file, start, size = self._places[at].tolist()
        return _parse(storage.read(self._paths[file], start, size), self._paths[file])


def load_captions(paths: tuple[str, ...]) -> Captions:
    """The same, read once in a process unless a file changes."""
    return _load(paths, tuple(map(storage.stamp, paths)))


@functools.lru_cache(maxsize=1)
def _load(paths: tuple[str, ...], stamps: tuple) -> Captions:
    return Captions(paths)


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _parse(line: bytes, where: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
        return row["key"], checked_text(row["caption"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f'{where}: expected {{"key": ..., "caption": ...}}: {type(error).__name__}: {error}'
        ) from error
