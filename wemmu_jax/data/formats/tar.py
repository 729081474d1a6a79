"""Tars of samples: webdataset, as img2dataset writes it (CC12M, LAION) and as BLIP3o comes.

The members of a sample lie together and share their name up to its first dot: `000001.jpg`, `000001.txt`,
`000001.json`. Of a name that comes twice the first counts: tar's own rule is the other one, but in a sample of
webdataset a second is an error, and who goes on after it keeps the first. A later sample of a name would share its key.

tarfile reads the headers; what it steps over, a header whose checksum does not fit or blocks of zeros in the middle,
is told apart here from what is only padding.
"""

import dataclasses
import json
import pathlib
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from wemmu_jax.data import storage
from wemmu_jax.data.index import Entry, Place, Problem, unread

PICTURES = ("jpg", "jpeg", "png", "webp")
_BLOCK = 512
# Of tarfile, at a broken header; the last two at the map of a sparse member.
_BROKEN = (tarfile.ReadError, ValueError, IndexError)


@dataclasses.dataclass(frozen=True)
class Member:
    """A file in a tar.

    Attributes:
      name: empty of what lies behind the last file.
      at: the offset of its first byte.
      size: -1 if it cannot be read.
      gap: why not, or what was skipped before its header.
      ends: whether the tar is cut, so that nobody knows what came after it.
    """

    name: str
    at: int
    size: int
    gap: str = ""
    ends: bool = False


@dataclasses.dataclass
class _Sample:
    """Members of one name that lie together.

    Attributes:
      stem: the name up to its first dot; empty where it begins with one, and of what lies behind the last file.
      members: by extension; by "" one that cannot be read.
      gaps: what was skipped before them.
      twice: names of those whose extension another has already.
      ends: whether the tar is cut in it.
    """

    stem: str
    members: dict[str, Member] = dataclasses.field(default_factory=dict)
    gaps: list[str] = dataclasses.field(default_factory=list)
    twice: list[str] = dataclasses.field(default_factory=list)
    ends: bool = False

    def add(self, member: Member, extension: str = "") -> None:
        """Takes a member, unless there is one of its extension."""
        if member.gap:
            self.gaps.append(member.gap)
        self.ends |= member.ends
        if member.size < 0:
            self.members[""] = member
        elif extension in self.members:
            self.twice.append(member.name)
        else:
            self.members[extension] = member


@dataclasses.dataclass(frozen=True)
class Webdataset:
    """Tars with a picture and a caption for each key.

    Attributes:
      paths: tars: names, `{00000..01242}`, `*`.
      text: the caption's member: an extension (`txt`), or `json:FIELD`; empty: the set has none.
    """

    paths: str | list | tuple
    text: str = "txt"
    loose = False

    def __post_init__(self):
        extension, _, field = self.text.partition(":")
        if (extension == "json" and not field) or (self.text and not extension):
            raise ValueError(
                f"webdataset text: expected an extension such as txt, or json:FIELD; found {self.text!r}"
            )

    def inputs(self) -> list[str]:
        """The tars."""
        return storage.expand(self.paths)

    def units(self) -> list[str]:
        """The tars."""
        return self.inputs()

    def scan(self, path: str) -> Iterator[Entry | Problem]:
        """The samples of a tar; keys are `TAR/KEY` without the tar's extension."""
        if storage.stamp(path) is None:
            yield Problem(path, "no such file", records=0)
            return
        try:
            with storage.local_copy(path):
                yield from self._records(path)
        except (ValueError, OSError) as error:
            yield unread(path, error, records=0)

    def _records(self, path: str) -> Iterator[Entry | Problem]:
        shard = pathlib.PurePosixPath(path).name.partition(".")[0]
        was_whole, seen = True, set()
        for sample in _samples(path):
            stem, members, gap = sample.stem, sample.members, "; ".join(sample.gaps)
            key = f"{shard}/{stem}"
            # Nobody has seen what a tar lacks that is cut, or of which no sample was found.
            lost = 0 if sample.ends or not (stem or seen) else 1
            try:
                if stem and stem not in seen:
                    yield Entry(key, self._text(path, members), (_picture(path, members),))
            except (ValueError, OSError) as error:
                was_whole = False
                problem = unread(key, error, records=lost)
                reason = f"{problem.reason} ({path}{': ' + gap if gap else ''})"
                yield dataclasses.replace(problem, reason=reason)
            else:
                if gap and was_whole:  # else it is what the sample before lacks
                    name = stem or "".join(member.name for member in members.values())
                    yield Problem(f"{path} before {name or 'its end'}", gap, records=lost)
                was_whole = True
            if not stem:
                yield from self._nameless(path, members)
            elif stem in seen:
                names = ", ".join(member.name for member in members.values())
                yield Problem(key, f"{path}: {names}: the name came before, and the first counts")
            elif sample.twice:
                names = ", ".join(sample.twice)
                yield Problem(key, f"{path}: {names}: there twice, and the first counts")
            if stem:
                seen.add(stem)

    def _nameless(self, path: str, members: dict[str, Member]) -> Iterator[Problem]:
        """What should have been a sample's; `._a.jpg` of macOS, `.DS_Store` and the like should not."""
        for extension, member in members.items():
            if extension in (*PICTURES, self.text.partition(":")[0]) and extension:
                yield Problem(f"{path}: {member.name}", "nothing before the dot: of no sample")

    def read(self, path: str, at: int, size: int) -> bytes:
        """Bytes of a member."""
        return storage.read(path, at, size)

    def _text(self, path: str, members: dict[str, Member]) -> str:
        if not self.text:
            return ""
        extension, _, field = self.text.partition(":")
        if extension not in members:
            raise ValueError(f"no .{extension} beside {', '.join(members) or 'nothing'}")
        member = members[extension]
        try:
            text = storage.read(path, member.at, member.size).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f".{extension} is not UTF-8: {error}") from error
        if field:
            try:
                text = json.loads(text)[field]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f".{extension} has no field {field!r}: {type(error).__name__} {error}"
                ) from error
        return checked_text(text)


def checked_text(text: object) -> str:
    """A caption without space around it.

    Raises:
      ValueError: it is no text, or an empty one, or no Unicode, or has NULs, which a hole in a file reads as.
    """
    if not isinstance(text, str):
        raise ValueError(f"expected a text, found {type(text).__name__}")
    if not text.strip():
        raise ValueError("the text is empty")
    if "\0" in text:
        raise ValueError("the text has NUL characters: a part of it is lost")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is no Unicode: {error}") from error
    return text.strip()


def members(path: str) -> Iterator[Member]:
    """The regular files of a tar, in order; the last one may be a nameless `Member` with only a gap.

    Raises:
      ValueError: it is compressed.
    """
    size = storage.size_of(path)
    if not size:
        yield Member("", 0, -1, "an empty file, not even an empty tar")
        return
    if storage.read(path, 0, min(size, 2)) == b"\x1f\x8b":
        raise ValueError(f"{path}: a compressed tar cannot be read at random: unpack it")
    end, gaps = 0, []
    with storage.open_file(path) as file:
        tar = _open(file, size)
        while tar is not None:
            try:
                info = tar.next()
            except _BROKEN:
                if tar.offset >= size:
                    break
                tar.offset += _BLOCK  # a long name whose own header is broken
                continue
            tar.members.clear()
            if info is None:
                break
            gaps += _gap(path, end, info.offset)
            end = tar.offset
            # A sparse file's size is that of the whole file, of which the tar has only parts.
            stop = end - _BLOCK + 1 if info.issparse() else info.offset_data + info.size
            if stop > size:
                after = f"the tar is cut: {info.name} should end at {stop}"
                gaps.append(f"{after}, the file ends at {size}")
                yield Member(info.name, info.offset_data, -1, "; ".join(gaps), ends=True)
                return
            if info.issparse():
                gaps.append(f"{info.name} is a sparse member (tar -S), only parts of it are there")
                yield Member(info.name, info.offset_data, -1, "; ".join(gaps))
                gaps.clear()
                continue
            # What was skipped before a folder or a link is told with the next file.
            if info.isreg():
                yield Member(info.name, info.offset_data, info.size, "; ".join(gaps))
                gaps.clear()
    if gaps := [*gaps, *_gap(path, end, size)]:
        yield Member("", 0, -1, "; ".join(gaps))


def _open(file: BinaryIO, size: int) -> tarfile.TarFile | None:
    """Tolerant of broken headers, at the beginning too: goes on, a block at a time, until one is whole."""
    for start in range(0, size, _BLOCK):
        file.seek(start)
        try:
            return tarfile.open(fileobj=file, mode="r:", ignore_zeros=True)
        except _BROKEN:
            pass
    return None


def _gap(path: str, start: int, end: int) -> list[str]:
    """What lies between two members if it is not only zeros; one text or none."""
    at = start
    while at < end:
        data = storage.read(path, at, min(end - at, 1 << 20))
        if data.strip(b"\0"):
            return [f"{end - start} bytes at {start} belong to no file: a header is damaged"]
        at += len(data)
    return []


def _samples(path: str) -> Iterator[_Sample]:
    """The samples as they come; what has no name comes by itself and, as in webdataset, ends no sample."""
    sample = _Sample("")
    for member in members(path):
        folder, slash, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        if not stem and member.name:
            nameless = _Sample("")
            nameless.add(member, extension.lower())
            yield nameless
            continue
        stem = folder + slash + stem
        if stem != sample.stem:
            if sample.members:
                yield sample
            sample = _Sample(stem)
        sample.add(member, extension.lower())
    if sample.members:
        yield sample


def _picture(path: str, members: dict[str, Member]) -> Place:
    for extension in PICTURES:
        if extension in members:
            return Place(path, members[extension].at, members[extension].size)
    raise ValueError(f"no picture beside {', '.join(filter(None, members)) or 'nothing'}")
