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
    stamps.npy         uint64[F]      a hash of each file's size and time when it was read
    units.npy          int64[U, 2]    how many records and problems each unit gave
    problems.jsonl     what cannot be a record: key, reason, whether reading again may help, how many it stands for
    meta.json          what it was made from, written last
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import mmap
import os
import pathlib
import shutil
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TextIO

import numpy as np

from wemmu_jax.data.records import Turn
from wemmu_jax.errors import passes
from wemmu_jax.files import read_object

VERSION = 4
MOST_SOURCES = 4  # of a record

RECORD = np.dtype(
    [("text_at", "<u8"), ("pictures_at", "<u8"), ("text_size", "<u4"), ("key_size", "<u2")]
)
PICTURE = np.dtype(
    [("at", "<u8"), ("file", "<u4"), ("size", "<u4"), ("crc", "<u4"), ("height", "<u4"), ("width", "<u4")]
)  # fmt: skip
_AT_ONCE = 1 << 20  # rows, or bytes, that are hashed together, so that millions take little memory
COLUMNS = (
    "sizes", "source_counts", "conversations", "records", "pictures", "names", "stamps", "units",
)  # fmt: skip


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
    """Something that should have been a record and is none.

    Attributes:
      key: what it is called.
      reason: why.
      again: whether reading again may help though no file changes: a disk or a network failed.
      records: how many it stands for; stored as 0 where it stands for all that its file lacks, which nobody has seen.
    """

    key: str
    reason: str
    again: bool = False
    records: int = 1


def unread(key: str, error: Exception, *, where: str = "", records: int = 1) -> Problem:
    """What an error that was met while reading says about `records`. `where`: what the error does not name itself."""
    again = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
    return Problem(key, f"{where}: {error}" if where else str(error), again, records)


class Format(Protocol):
    """A way in which data sets lie on disk. A dataclass: its fields are what a config entry says.

    Attributes:
      loose: whether pictures or texts lie in files that are not among `inputs`; an index's name says nothing of these.
    """

    loose: bool

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


@dataclasses.dataclass(frozen=True)
class Earlier:
    """What an earlier index found, which is not read again.

    Attributes:
      found: (path, place in it) -> what was there.
      stamps: of the files then, as stamps.npy has them.
      trusted: whether the files are taken not to have changed since; else their stamps are compared.
    """

    found: Mapping[tuple[str, int], Found] = dataclasses.field(default_factory=dict)
    stamps: Mapping[str, int] = dataclasses.field(default_factory=dict)
    trusted: bool = False


class Index:
    """An index that is complete. Workers share its pages; pickled, it is the folder's name.

    Attributes:
      folder: where it lies.
      source_counts: uint8[N], the source pictures of each record.
      conversations: bool[N], which records are conversations.
    """

    def __init__(self, folder: str | pathlib.Path):
        """Raises ValueError: the folder holds no index, or a damaged one."""
        self.folder = pathlib.Path(folder)
        meta = self._meta()
        if meta["version"] != VERSION:
            raise ValueError(
                f"{folder}: an index of version {meta['version']}, expected {VERSION}: delete it"
            )
        loaded = {name: load_column(self.folder / f"{name}.npy") for name in COLUMNS}
        found = {name: len(column) for name, column in loaded.items()}
        if found != meta["rows"]:
            raise ValueError(f"{folder}: expected rows {meta['rows']}, found {found}: delete it")
        self.source_counts, self.conversations = loaded["source_counts"], loaded["conversations"]
        self._records, self._pictures = loaded["records"], loaded["pictures"]
        self._names_at, self._stamps, self._units = (
            loaded[name] for name in ("names", "stamps", "units")
        )
        self._names = _map(self.folder / "names.bin")
        # Not mapped: of a large file the kernel may map two megabytes for a text that is read.
        self._texts = os.open(self.folder / "texts.bin", os.O_RDONLY)
        weakref.finalize(self, os.close, self._texts).atexit = False

    def __reduce__(self):
        return Index, (self.folder,)

    def __len__(self) -> int:
        return len(self.source_counts)

    @property
    def sizes(self) -> np.ndarray:
        """int32[N, 2], (height, width) of each target; of a conversation's first picture, 1 x 1 where there is none.

        Mapped anew: it is read once, as a whole, and its pages need not stay."""
        return load_column(self.folder / "sizes.npy")

    def key(self, index: int) -> str:
        """The name of a record."""
        at, size = int(self._records["text_at"][index]), int(self._records["key_size"][index])
        return os.pread(self._texts, size, at).decode()

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
        return tuple(
            Found(Place(self._name(file), at, size), crc, height, width)
            for at, file, size, crc, height, width in self._rows(index).tolist()
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
        sizes = [self._read("records", name) for name in ("text_size", "key_size")]
        return self._hash([self.picture_identity.encode()], *sizes, self._read_texts())

    @functools.cached_property
    def picture_identity(self) -> str:
        """The same of the pictures alone, whatever is said of them."""
        columns = [self._read("source_counts"), self._read("conversations")]
        return self._hash(*columns, *(self._read("pictures", name) for name in ("crc", "size")))

    def _hash(self, *columns: Iterable[bytes]) -> str:
        found = hashlib.blake2b(digest_size=16)
        for part in itertools.chain(*columns):
            found.update(part)
        return f"{len(self):,} records, {found.hexdigest()}"

    def _read(self, column: str, field: str | None = None) -> Iterator[bytes]:
        """A column, or a field of it, in parts, each mapped anew: its pages need not stay."""
        path = self.folder / f"{column}.npy"
        for start in range(0, len(load_column(path)), _AT_ONCE):
            part = load_column(path)[start : start + _AT_ONCE]
            yield (part if field is None else part[field]).tobytes()

    def _read_texts(self) -> Iterator[bytes]:
        at = 0
        while part := os.pread(self._texts, _AT_ONCE, at):
            yield part
            at += len(part)

    def problems(self) -> list[Problem]:
        """What could not be a record. What nobody has seen of a file is so many records that it would have as many as
        the mean of those that were seen whole."""
        whole, found = self._meta().get("records_of_a_file", 0), []
        for records, problems in self.units():
            unseen = 1 + max(whole - len(records) - len(problems), 0)
            found += [dataclasses.replace(one, records=one.records or unseen) for one in problems]
        return found

    @property
    def left_out(self) -> int:
        """How many records `problems` stand for."""
        return sum(problem.records for problem in self.problems())

    @property
    def problem_count(self) -> int:
        """How many `problems` there are."""
        return self._meta()["problems"]

    def units(self) -> list[tuple[range, list[Problem]]]:
        """The records and the problems of each unit, as they are stored."""
        ends = np.cumsum(self._units, axis=0)
        problems = read_problems(self.folder)
        return [
            (range(record - records, record), problems[problem - wrong : problem])
            for (record, problem), (records, wrong) in zip(
                ends.tolist(), self._units.tolist(), strict=True
            )
        ]

    def entry(self, index: int) -> Entry:
        """A record as a scan found it."""
        places = tuple(one.place for one in self.pictures(index))
        return Entry(self.key(index), self.text(index), places, self.turns(index))

    def earlier(self, records: range, *, trusted: bool) -> Earlier:
        """What is known of the pictures of a unit's records."""
        found, stamps = {}, {}
        for index in records:
            files = self._rows(index)["file"].tolist()
            for one, file in zip(self.pictures(index), files, strict=True):
                found[one.place.path, one.place.at] = one
                stamps[one.place.path] = int(self._stamps[file])
        return Earlier(found, stamps, trusted)

    def _meta(self) -> dict[str, Any]:
        return read_object(self.folder / "meta.json", keys=("version", "rows"))

    def _rows(self, index: int) -> np.ndarray:
        first = int(self._records["pictures_at"][index])
        count = int(self.source_counts[index]) + (not self.conversations[index])
        return self._pictures[first : first + count]

    def _text(self, index: int) -> str:
        record = self._records[index]
        at = int(record["text_at"]) + int(record["key_size"])
        return os.pread(self._texts, int(record["text_size"]), at).decode()

    def _name(self, file: int) -> str:
        start, end = self._names_at[file : file + 2].tolist()
        return self._names[start:end].decode()


def settle(partial: pathlib.Path, folder: pathlib.Path) -> None:
    """Gives a finished folder its name, unless another process was faster with the same."""
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(partial)


def problem_file(folder: pathlib.Path) -> TextIO:
    """An index's problems.jsonl, open for writing."""
    return (folder / "problems.jsonl").open("w", encoding="utf-8", errors="replace")


def read_problems(folder: pathlib.Path) -> list[Problem]:
    """Those of an index, or of a part of one, as they are stored."""
    with (folder / "problems.jsonl").open(encoding="utf-8") as lines:
        return [Problem(**json.loads(line)) for line in lines]


def load_column(path: pathlib.Path) -> np.ndarray:
    """A column of an index, mapped.

    Raises:
      ValueError: it is damaged.
      OSError: storage fails for the moment.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        if passes(error):
            raise
        raise ValueError(f"{path}: damaged, delete the index: {error}") from error


def _map(path: pathlib.Path) -> mmap.mmap | bytes:
    with path.open("rb") as file:
        if not path.stat().st_size:
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
