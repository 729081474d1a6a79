"""The index of a data set: where each record's text and pictures lie, how large the pictures are, and their checksums.

An index is a folder of fixed-width columns, memory-mapped, so that twenty-five million records open at once and all
workers share them. It is made by reading the whole set once, a unit (a shard, or a part of a list) at a time; units
that are done are kept, so that a build that was stopped goes on.

    sizes.npy          int32[N, 2]    height and width of each target, as it is looked at; of a conversation's first
                                      picture, 1 x 1 where there is none
    source_counts.npy  uint8[N]
    conversations.npy  bool[N]
    records.npy        RECORD[N]      where key, text and pictures are
    pictures.npy       PICTURE[M]     of each record the target, if there is one, then its sources
    texts.bin          keys and texts, UTF-8; a conversation's text is the JSON of its turns
    names.npy          int64[F + 1]   where each file's name begins in names.bin
    names.bin
    problems.jsonl     what cannot be a record: key and reason
    meta.json          what it was made from, written last
"""

import dataclasses
import functools
import hashlib
import json
import mmap
import pathlib
import shutil
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from wemmu_jax.data.pictures import picture_size
from wemmu_jax.data.records import Turn
from wemmu_jax.files import read_object, write_json

VERSION = 2
MOST_SOURCES = 4  # of a record

RECORD = np.dtype(
    [("text_at", "<u8"), ("pictures_at", "<u8"), ("text_size", "<u4"), ("key_size", "<u2")]
)
PICTURE = np.dtype(
    [("at", "<u8"), ("file", "<u4"), ("size", "<u4"), ("crc", "<u4"), ("height", "<u4"), ("width", "<u4")]
)  # fmt: skip
_AT_ONCE = 1 << 20  # rows that are hashed together, so that millions take little memory
_COLUMNS = ("sizes", "source_counts", "conversations", "records", "pictures", "names")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a picture's bytes are.

    Attributes:
      path: of the file that holds it.
      at: the offset of its first byte, or what else the format's `read` makes of it.
      size: bytes; -1 in a scan: the whole file.
    """

    path: str
    at: int = 0
    size: int = -1


@dataclasses.dataclass(frozen=True)
class Entry:
    """A record as a scan finds it: its key, its text, and its target's place before those of its sources. A
    conversation has turns, no text and no target."""

    key: str
    text: str
    places: tuple[Place, ...]
    turns: tuple[Turn, ...] = ()


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that should have been a record and is none: what it is called, and why."""

    key: str
    reason: str


class Format(Protocol):
    """A way in which data sets lie on disk. A dataclass: its fields are what a config entry says."""

    def inputs(self) -> Sequence[str]:
        """The files that the index is made from; when one changes, the index is another."""

    def units(self) -> Sequence[Any]:
        """What `scan` takes: parts that are read independently, as JSON values."""

    def scan(self, unit: Any) -> Iterator[Entry | Problem]:
        """The records of a unit."""

    def read(self, path: str, at: int, size: int) -> bytes:
        """The bytes of the picture at a place."""


@dataclasses.dataclass(frozen=True)
class Found:
    """A picture that is in the index: its place, the CRC-32 of its bytes, its size in pixels."""

    place: Place
    crc: int
    height: int
    width: int


class Index:
    """An index that is complete. Workers share its pages; pickled, it is the folder's name.

    Attributes:
      folder: where it lies.
      sizes: int32[N, 2], (height, width) of each target; of a conversation's first picture, 1 x 1 where there is none.
      source_counts: uint8[N], the source pictures of each record.
      conversations: bool[N], which records are conversations.
    """

    def __init__(self, folder: str | pathlib.Path):
        """Raises ValueError: the folder holds no index, or a damaged one."""
        self.folder = pathlib.Path(folder)
        meta = read_object(self.folder / "meta.json", keys=("version", "rows"))
        if meta["version"] != VERSION:
            raise ValueError(
                f"{folder}: an index of version {meta['version']}, expected {VERSION}: delete it"
            )
        loaded = {name: _load(self.folder / f"{name}.npy") for name in _COLUMNS}
        found = {name: len(column) for name, column in loaded.items()}
        if found != meta["rows"]:
            raise ValueError(f"{folder}: expected rows {meta['rows']}, found {found}: delete it")
        self.sizes, self.source_counts = loaded["sizes"], loaded["source_counts"]
        self.conversations = loaded["conversations"]
        self._records, self._pictures = loaded["records"], loaded["pictures"]
        self._names_at = loaded["names"]
        self._texts, self._names = (_map(self.folder / name) for name in ("texts.bin", "names.bin"))

    def __reduce__(self):
        return Index, (self.folder,)

    def __len__(self) -> int:
        return len(self.source_counts)

    def key(self, index: int) -> str:
        """The name of a record."""
        at, size = int(self._records["text_at"][index]), int(self._records["key_size"][index])
        return self._texts[at : at + size].decode()

    def text(self, index: int) -> str:
        """The caption or instruction of a record; empty for a conversation."""
        return "" if self.conversations[index] else self._text(index)

    def turns(self, index: int) -> tuple[Turn, ...]:
        """A conversation's turns; none for another record."""
        if not self.conversations[index]:
            return ()
        return tuple(Turn(*turn) for turn in json.loads(self._text(index)))

    def pictures(self, index: int) -> tuple[Found, ...]:
        """A record's target, if it has one, then its sources."""
        first = int(self._records["pictures_at"][index])
        count = int(self.source_counts[index]) + (not self.conversations[index])
        rows = self._pictures[first : first + count]
        return tuple(
            Found(Place(self._name(file), at, size), crc, height, width)
            for at, file, size, crc, height, width in rows.tolist()
        )

    def checksums(self) -> np.ndarray:
        """uint64[n], the CRC-32 and the size of each target's bytes; of twelve million pictures, seventeen thousand
        share their CRC-32 with another by chance."""
        targets = self._pictures[self._records["pictures_at"][~self.conversations]]
        return targets["crc"].astype(np.uint64) << np.uint64(32) | targets["size"]

    @functools.cached_property
    def identity(self) -> str:
        """Equal for the same keys, texts and pictures in the same order, wherever they lie and whenever they were
        indexed. Reads all texts once."""
        sizes = [self._records[name] for name in ("text_size", "key_size")]
        return self._hash(self.picture_identity.encode(), *sizes, self._texts)

    @functools.cached_property
    def picture_identity(self) -> str:
        """The same of the pictures alone, whatever is said of them."""
        columns = [self._pictures[name] for name in ("crc", "size")]
        return self._hash(self.source_counts, self.conversations, *columns)

    def _hash(self, *columns: np.ndarray | mmap.mmap | bytes) -> str:
        found = hashlib.blake2b(digest_size=16)
        for column in columns:
            if not isinstance(column, np.ndarray):
                found.update(column)
                continue
            for start in range(0, len(column), _AT_ONCE):
                found.update(column[start : start + _AT_ONCE].tobytes())
        return f"{len(self):,} records, {found.hexdigest()}"

    def problems(self) -> list[Problem]:
        """What could not be a record."""
        with (self.folder / "problems.jsonl").open(encoding="utf-8") as lines:
            return [Problem(**json.loads(line)) for line in lines]

    @property
    def problem_count(self) -> int:
        """How many `problems` there are."""
        return read_object(self.folder / "meta.json")["problems"]

    def _text(self, index: int) -> str:
        record = self._records[index]
        at = int(record["text_at"]) + int(record["key_size"])
        return self._texts[at : at + int(record["text_size"])].decode()

    def _name(self, file: int) -> str:
        start, end = self._names_at[file : file + 2].tolist()
        return self._names[start:end].decode()


def write_part(format: Format, entries: Iterable[Entry | Problem], folder: pathlib.Path) -> None:
    """Reads and measures every picture of `entries` and writes them as an index of their own, whole or not at all."""
    partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4()}")
    partial.mkdir(parents=True)
    sizes, source_counts, conversations, records, pictures = [], [], [], [], []
    names: dict[str, int] = {}
    text_at = 0
    with (partial / "texts.bin").open("wb") as texts, _problem_file(partial) as problems:
        for entry in entries:
            found = entry if isinstance(entry, Problem) else _measure(format, entry)
            if isinstance(found, Problem):
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
    }
    for name, column in columns.items():
        np.save(partial / f"{name}.npy", column)
    settle(partial, folder)


def settle(partial: pathlib.Path, folder: pathlib.Path) -> None:
    """Gives a finished folder its name, unless another process was faster with the same."""
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(partial)


def merge_parts(parts: Sequence[pathlib.Path], folder: pathlib.Path, meta: dict[str, Any]) -> None:
    """Writes the parts, in their order, as one index, whole or not at all."""
    folder.mkdir(parents=True)
    lengths = {name: [len(_load(p / f"{name}.npy")) for p in parts] for name in _COLUMNS}
    totals = {name: sum(each) for name, each in lengths.items()}
    totals["names"] -= len(parts) - 1  # each has an end of its own
    columns = {
        name: np.lib.format.open_memmap(
            folder / f"{name}.npy",
            mode="w+",
            dtype=(first := _load(parts[0] / f"{name}.npy")).dtype,
            shape=(totals[name], *first.shape[1:]),
        )
        for name in _COLUMNS
        if totals[name]
    }
    for name in set(_COLUMNS) - set(columns):
        np.save(folder / f"{name}.npy", _load(parts[0] / f"{name}.npy")[:0])
    at = dict.fromkeys(_COLUMNS, 0)
    texts_at = names_at = problems = 0
    with (
        (folder / "texts.bin").open("wb") as texts,
        (folder / "names.bin").open("wb") as names,
        _problem_file(folder) as problem_lines,
    ):
        for part in parts:
            loaded = {name: np.array(_load(part / f"{name}.npy")) for name in _COLUMNS}
            loaded["records"]["text_at"] += np.uint64(texts_at)
            loaded["records"]["pictures_at"] += np.uint64(at["pictures"])
            loaded["pictures"]["file"] += np.uint32(at["names"])
            loaded["names"] += names_at
            for name, column in loaded.items():
                if len(column):
                    columns[name][at[name] : at[name] + len(column)] = column
                at[name] += len(column) - (name == "names")
            for name, heap in (("texts.bin", texts), ("names.bin", names)):
                with (part / name).open("rb") as own:
                    shutil.copyfileobj(own, heap)
            texts_at, names_at = texts.tell(), names.tell()
            lines = (part / "problems.jsonl").read_text(encoding="utf-8")
            problem_lines.write(lines)
            problems += lines.count("\n")
    for column in columns.values():
        column.flush()
    write_json(
        folder / "meta.json", {"version": VERSION, "rows": totals, "problems": problems, **meta}
    )


def _measure(format: Format, entry: Entry) -> tuple[Found, ...] | Problem:
    found: dict[Place, Found] = {}
    try:
        if not entry.key or len(entry.key.encode()) > 65535:
            raise ValueError(f"expected a key of 1 to 65535 bytes, found {entry.key[:80]!r}")
        sources = len(entry.places) - (not entry.turns)
        if not 0 <= sources <= MOST_SOURCES:
            raise ValueError(f"expected at most {MOST_SOURCES} source pictures, found {sources}")
        for place in dict.fromkeys(entry.places):
            data = format.read(place.path, place.at, place.size)
            height, width = picture_size(data, name=f"{place.path} at {place.at}")
            whole = dataclasses.replace(place, size=len(data))
            found[place] = Found(whole, zlib.crc32(data), height, width)
    except (ValueError, OSError) as error:
        return Problem(entry.key[:200].encode(errors="replace").decode(), str(error))
    return tuple(found[place] for place in entry.places)


def _stored_text(entry: Entry) -> str:
    if not entry.turns:
        return entry.text
    return json.dumps([dataclasses.astuple(turn) for turn in entry.turns], ensure_ascii=False)


def _problem_file(folder: pathlib.Path):
    return (folder / "problems.jsonl").open("w", encoding="utf-8")


def _load(path: pathlib.Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path}: damaged, delete the index: {error}") from error


def _map(path: pathlib.Path) -> mmap.mmap | bytes:
    with path.open("rb") as file:
        if not path.stat().st_size:
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
