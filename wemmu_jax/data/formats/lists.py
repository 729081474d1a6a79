"""Data sets that are a list in JSON and pictures beside it.

A list is a JSON array or an object a line. Pictures are files below a folder, or members of tars (ShareGPT-4o-Image
comes so), which are then read where they lie.
"""

import dataclasses
import functools
import json
import zlib
from collections.abc import Iterator
from typing import Any

import yaml

from wemmu_jax.data import storage
from wemmu_jax.data.formats.spoken import answered_turns, drawing_prompt, read_spoken
from wemmu_jax.data.formats.tar import checked_text, members
from wemmu_jax.data.index import Entry, Place, Problem
from wemmu_jax.data.records import Turn

CHUNK = 20_000  # rows of a unit


class _Rows:
    """What the formats below have in common: units of CHUNK rows, and one entry for each."""

    def units(self) -> list[list]:
        """[list, root of its pictures, first row, what `_slice` needs to find it]."""
        return [
            [file, root, first, at]
            for file, root in self._lists()
            for first, at in _chunks(file, storage.stamp(file))
        ]

    def scan(self, unit: list) -> Iterator[Entry | Problem]:
        """The records of some rows; keys are rows counted from 1, after `LIST:` where there are several."""
        file, root, first, at = unit
        prefix = f"{file}:" if len(self._lists()) > 1 else ""
        for number, row in enumerate(_slice(file, storage.stamp(file), first, at), first):
            if row is None:
                continue
            key = f"{prefix}{number + 1}"
            try:
                if isinstance(row, ValueError):
                    raise row
                if not isinstance(row, dict):
                    raise ValueError(f"expected an object, found {type(row).__name__}")
                if (entry := self._entry(key, row, root)) is not None:
                    yield entry
            except ValueError as error:
                yield Problem(key, f"{file}, row {number + 1}: {error}")

    def read(self, path: str, at: int, size: int) -> bytes:
        """Bytes of a file, or of a tar's member."""
        return storage.read(path, at, size)


@dataclasses.dataclass(frozen=True)
class Folder(_Rows):
    """A folder of pictures and a JSONL file in it, one record a line; paths stay inside the folder.

        {"image": "a.jpg", "caption": "a red barn"}
        {"image": "after.png", "instruction": "make it blue", "sources": ["before.png"]}
        {"images": ["a.jpg"], "turns": [["what is it?", "a barn"], ["of what colour?", "red"]]}

    The pictures of turns come before the first question; there may be none.

    Attributes:
      folder: the folder.
      index: name of the JSONL file.
    """

    folder: str
    index: str = "captions.jsonl"

    def inputs(self) -> list[str]:
        """The JSONL file."""
        return [storage.join(self.folder, self.index)]

    def _lists(self):
        return [(self.inputs()[0], self.folder)]

    def _entry(self, key: str, row: dict, root: str) -> Entry:
        if set(row) == {"images", "turns"}:
            return _asked(key, row["images"], row["turns"], root)
        if set(row) not in ({"image", "caption"}, {"image", "instruction", "sources"}):
            raise ValueError(
                "expected the keys {caption, image}, {image, instruction, sources} or {images, turns}; "
                f"found {{{', '.join(sorted(map(str, row)))}}}"
            )
        sources = row.get("sources", [])
        if "sources" in row and not (isinstance(sources, list) and 1 <= len(sources) <= 4):
            raise ValueError(f"'sources' must be a list of one to four files; found {sources!r}")
        text = _text(row, "caption" if "caption" in row else "instruction")
        places = tuple(_file(root, name) for name in (row["image"], *sources))
        return Entry(f"{key}:{row['image']}", text, places)


@dataclasses.dataclass(frozen=True)
class IoJson(_Rows):
    """ShareGPT-4o-Image and OpenGPT-4o-Image: `input_prompt`, `output_image`, for edits `input_image`.

    Attributes:
      file: the list.
      root: what its paths are relative to, by default the list's folder.
      archives: tars in which the pictures lie, by the same paths; none: they lie below `root`.
    """

    file: str
    root: str = ""
    archives: str | list | tuple = ()

    def inputs(self) -> list[str]:
        """The list and the tars."""
        return [self.file, *(storage.expand(self.archives) if self.archives else ())]

    def _lists(self):
        return [(self.file, self.root or storage.parent(self.file))]

    def _entry(self, key: str, row: dict, root: str) -> Entry:
        sources = row.get("input_image") or []
        names = [row.get("output_image"), *([sources] if isinstance(sources, str) else sources)]
        text = _text(row, "input_prompt")
        if not self.archives:
            return Entry(key, text, tuple(_file(root, name) for name in names))
        inside = _archive(tuple(self.inputs()[1:]))
        if missing := [name for name in names if name not in inside]:
            raise ValueError(f"{missing[0]!r} is in none of the {len(self.inputs()) - 1} archives")
        return Entry(key, text, tuple(inside[name] for name in names))


@dataclasses.dataclass(frozen=True)
class Sidecar(_Rows):
    """Pictures and recaptions in two folders, and `[{"image": ..., "annotation": ...json}]` (OpenUni).

    Attributes:
      file: the list.
      images, annotations: the folders, by default `images` and `captions` beside the list.
      field: the caption's key in an annotation.
    """

    file: str
    images: str = ""
    annotations: str = ""
    field: str = "caption"

    def inputs(self) -> list[str]:
        """The list."""
        return [self.file]

    def _lists(self):
        return [(self.file, self.images or storage.join(storage.parent(self.file), "images"))]

    def _entry(self, key: str, row: dict, root: str) -> Entry:
        folder = self.annotations or storage.join(storage.parent(self.file), "captions")
        annotation = storage.join(folder, _text(row, "annotation"))
        try:
            found = json.loads(storage.read(annotation))
        except FileNotFoundError:
            raise ValueError(f"{annotation}: no such file") from None
        except ValueError as error:
            raise ValueError(f"{annotation}: not JSON in UTF-8: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{annotation}: expected an object, found {type(found).__name__}")
        return Entry(_text(row, "image"), _text(found, self.field), (_file(root, row["image"]),))


@dataclasses.dataclass(frozen=True)
class UniWorld(_Rows):
    """UniWorld-V1: `data.txt`, each line `image_root,annotation.json,need_weight`, and lists of conversations.

    The last picture is the one to be drawn, and the last instruction is the prompt; where nothing is to be drawn, the
    record is a conversation. `need_weight` is left aside.

    Attributes:
      file: `data.txt`.
      root: what its paths are relative to, by default its folder.
    """

    file: str
    root: str = ""

    def inputs(self) -> list[str]:
        """`data.txt` and the lists that it names."""
        return [self.file, *(file for file, _ in self._lists())]

    def _lists(self):
        base = self.root or storage.parent(self.file)
        lists = []
        for number, line in enumerate(storage.read(self.file).decode().splitlines(), 1):
            if not line.strip():
                continue
            parts = [part.strip() for part in line.split(",")]
            if len(parts) != 3 or parts[2] not in ("true", "false"):
                raise ValueError(
                    f"{self.file}, line {number}: expected image_root,annotation.json,true|false; found {line!r}"
                )
            root, file = (
                p if p.startswith("/") or storage.is_remote(p) else storage.join(base, p)
                for p in parts[:2]
            )
            lists.append((file, root))
        return lists

    def _entry(self, key: str, row: dict, root: str) -> Entry:
        return _spoken(key, row, root)


@dataclasses.dataclass(frozen=True)
class Conversations(_Rows):
    """Questions and answers as LLaVA, ShareGPT and BAGEL's `vlm` data have them: `image`, `conversations`.

    Attributes:
      file: the list.
      root: what its paths are relative to, by default the list's folder.
    """

    file: str
    root: str = ""

    def inputs(self) -> list[str]:
        """The list."""
        return [self.file]

    def _lists(self):
        return [(self.file, self.root or storage.parent(self.file))]

    def _entry(self, key: str, row: dict, root: str) -> Entry:
        return _spoken(key, row, root)


@dataclasses.dataclass(frozen=True)
class OmniGen2(_Rows):
    """OmniGen2 and X2I2: a YAML file `data: [{path, type, ratio}]`, nested, and JSONL files; or one JSONL file.

    A `ratio` below 1 keeps that part of a file's records, chosen by their keys.

    Attributes:
      file: the YAML or JSONL file.
      root: what all paths are relative to, by default the folder of the file that names them.
    """

    file: str
    root: str = ""

    def inputs(self) -> list[str]:
        """All files of the tree."""
        return [self.file, *(file for file, _ in self._leaves())]

    def _lists(self):
        return [(file, self.root or storage.parent(file)) for file, _ in self._leaves()]

    def _leaves(self) -> list[tuple[str, float]]:
        return _yaml_leaves(self.file, self.root)

    def scan(self, unit: list) -> Iterator[Entry | Problem]:
        """As `_Rows.scan`, a ratio's part of it."""
        ratio = dict(self._leaves())[unit[0]]
        for found in super().scan(unit):
            if zlib.crc32(found.key.encode()) < ratio * 2**32:
                yield found

    def _entry(self, key: str, row: dict, root: str) -> Entry:
        sources = row.get("input_images") or []
        names = (row.get("output_image"), *([sources] if isinstance(sources, str) else sources))
        return Entry(key, _text(row, "instruction"), tuple(_file(root, name) for name in names))


def _yaml_leaves(file: str, root: str, ratio: float = 1.0) -> list[tuple[str, float]]:
    if not file.endswith((".yml", ".yaml")):
        return [(file, ratio)]
    entries = (yaml.safe_load(storage.read(file)) or {}).get("data")
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and "path" in e for e in entries
    ):
        raise ValueError(f"{file}: expected data: [{{path, type, ratio}}]; found {entries!r}")
    leaves = []
    for entry in entries:
        path, part = entry["path"], entry.get("ratio", 1)
        if not isinstance(part, int | float) or not 0 < part <= 1:
            raise ValueError(f"{file}: {path}: expected a ratio above 0, at most 1; found {part!r}")
        if not path.startswith("/") and not storage.is_remote(path):
            path = storage.join(root or storage.parent(file), path)
        leaves += _yaml_leaves(path, root, ratio * part)
    return leaves


def _text(row: dict, key: str) -> str:
    if key not in row:
        raise ValueError(f"no {key!r}; found {{{', '.join(sorted(map(str, row)))}}}")
    try:
        return checked_text(row[key])
    except ValueError as error:
        raise ValueError(f"{key!r}: {error}") from error


def _spoken(key: str, row: dict, root: str) -> Entry:
    """What is drawn at the end of a conversation, or the conversation."""
    images, said = read_spoken(row)
    places = tuple(_file(root, name) for name in images)
    text = drawing_prompt(said)
    if text is None:
        return Entry(key, "", places, answered_turns(said))
    *sources, target = places
    return Entry(key, text, (target, *sources))


def _asked(key: str, images: Any, turns: Any, root: str) -> Entry:
    if not isinstance(images, list):
        raise ValueError(f"'images' must be a list of files; found {images!r}")
    pairs = turns if isinstance(turns, list) and turns else [None]
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"'turns' must be a list of [question, answer]; found {turns!r}")
    asked = [Turn(*map(checked_text, pair)) for pair in pairs]
    asked[0] = dataclasses.replace(asked[0], pictures=len(images))
    return Entry(key, "", tuple(_file(root, name) for name in images), tuple(asked))


def _file(root: str, name: Any) -> Place:
    if not isinstance(name, str):
        raise ValueError(f"expected a picture's path, found {name!r}")
    return Place(storage.join(root, name))


@functools.lru_cache(maxsize=4)
def _archive(paths: tuple[str, ...]) -> dict[str, Place]:
    return {
        member.name.removeprefix("./"): Place(path, member.at, member.size)
        for path in paths
        for member in members(path)
        if member.size >= 0
    }


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
            except ValueError as error:
                yield ValueError(f"not JSON in UTF-8: {error}")


def _is_array(file: str) -> bool:
    with storage.open_file(file) as opened:
        return opened.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


@functools.lru_cache(maxsize=2)
def _array(file: str, stamp) -> list:
    try:
        found = json.loads(storage.read(file).decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON in UTF-8: {error}") from error
    return found
