"""A unit of a data set, read once: every picture's place, size and checksum, as a part of an index."""

import dataclasses
import hashlib
import json
import pathlib
import uuid
import zlib
from collections.abc import Iterable

import numpy as np

from wemmu_jax.data import storage
from wemmu_jax.data.index import (
    MOST_SOURCES,
    PICTURE,
    RECORD,
    Earlier,
    Entry,
    Format,
    Found,
    Place,
    Problem,
    problem_file,
    settle,
    unread,
)
from wemmu_jax.data.pictures import picture_size


def write_part(
    format: Format,
    entries: Iterable[Entry | Problem],
    folder: pathlib.Path,
    earlier: Earlier = Earlier(),  # noqa: B008 frozen
) -> None:
    """Reads and measures every picture of a unit that `earlier` does not know, and writes the unit as an index of its
    own, whole or not at all."""
    partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4()}")
    partial.mkdir(parents=True)
    sizes, source_counts, conversations, records, pictures = [], [], [], [], []
    names: dict[str, int] = {}
    stamps = dict(earlier.stamps) if earlier.trusted else {}
    text_at = wrong = 0
    with (partial / "texts.bin").open("wb") as texts, problem_file(partial) as problems:
        for entry in entries:
            if not isinstance(found := entry, Problem):
                found = _measure(format, entry, stamps, earlier)
            if isinstance(found, Problem):
                wrong += 1
                problems.write(json.dumps(dataclasses.asdict(found), ensure_ascii=False) + "\n")
                continue
            key, text = entry.key.encode(), _stored_text(entry).encode()
            texts.write(key + text)
            records.append((text_at, len(pictures), len(text), len(key)))
            text_at += len(key) + len(text)
            sizes.append((found[0].height, found[0].width) if found else (1, 1))
            source_counts.append(len(found) - (not entry.turns))
            conversations.append(bool(entry.turns))
            for one in found:
                file = names.setdefault(one.place.path, len(names))
                place = one.place
                pictures.append((place.at, file, place.size, one.crc, one.height, one.width))
    encoded = [name.encode() for name in names]
    (partial / "names.bin").write_bytes(b"".join(encoded))
    columns = {
        "sizes": np.array(sizes, np.int32).reshape(-1, 2),
        "source_counts": np.array(source_counts, np.uint8),
        "conversations": np.array(conversations, bool),
        "records": np.array(records, RECORD),
        "pictures": np.array(pictures, PICTURE),
        "names": np.cumsum([0, *map(len, encoded)], dtype=np.int64),
        "stamps": np.array([stamps[name] for name in names], np.uint64),
        "units": np.array([[len(records), wrong]], np.int64),
    }
    for name, column in columns.items():
        np.save(partial / f"{name}.npy", column)
    settle(partial, folder)


def _measure(
    format: Format, entry: Entry, stamps: dict[str, int], earlier: Earlier
) -> tuple[Found, ...] | Problem:
    """A record's pictures. `stamps` gets those of the files that it lies in."""
    found: dict[Place, Found] = {}
    try:
        if not entry.key or len(entry.key.encode()) > 65535:
            raise ValueError(f"expected a key of 1 to 65535 bytes, found {entry.key[:80]!r}")
        sources = len(entry.places) - (not entry.turns)
        if not 0 <= sources <= MOST_SOURCES:
            raise ValueError(f"expected at most {MOST_SOURCES} source pictures, found {sources}")
        for place in dict.fromkeys(entry.places):
            place.path.encode()  # a ValueError where it cannot be written down
            if place.path not in stamps:
                # Before it is read: what changes meanwhile has changed since.
                stamps[place.path] = _stamp(place.path)
            known = earlier.found.get((place.path, place.at))
            if known is None or earlier.stamps[place.path] != stamps[place.path]:
                data = format.read(place.path, place.at, place.size)
                height, width = picture_size(data, name=f"{place.path} at {place.at}")
                whole = dataclasses.replace(place, size=len(data))
                known = Found(whole, zlib.crc32(data), height, width)
            found[place] = known
    except (ValueError, OSError) as error:
        return unread(entry.key[:200], error)
    return tuple(found[place] for place in entry.places)


def _stamp(path: str) -> int:
    text = repr(storage.stamp(path)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _stored_text(entry: Entry) -> str:
    if not entry.turns:
        return entry.text
    return json.dumps([dataclasses.astuple(turn) for turn in entry.turns], ensure_ascii=False)
