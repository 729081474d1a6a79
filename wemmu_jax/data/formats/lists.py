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
from wemmu_jax.data.formats.rows import Find, Rows
from wemmu_jax.data.formats.spoken import answered_turns, drawing_prompt, read_spoken
from wemmu_jax.data.formats.tar import checked_text, members
from wemmu_jax.data.index import Entry, Place, Problem, unread
from wemmu_jax.data.records import Turn


@dataclasses.dataclass(frozen=True)
class Folder(Rows):
    """A folder of pictures and a JSONL file in it, one record a line; relative paths stay inside the folder.

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

    def _entry(self, key: str, row: dict, find: Find) -> Entry:
        if set(row) == {"images", "turns"}:
            return _asked(key, row["images"], row["turns"], find)
        if set(row) not in ({"image", "caption"}, {"image", "instruction", "sources"}):
            raise ValueError(
                "expected the keys {caption, image}, {image, instruction, sources} or {images, turns}; "
                f"found {{{', '.join(sorted(map(str, row)))}}}"
            )
        sources = row.get("sources", [])
        if "sources" in row and not (isinstance(sources, list) and 1 <= len(sources) <= 4):
            raise ValueError(f"'sources' must be a list of one to four files; found {sources!r}")
        text = _text(row, "caption" if "caption" in row else "instruction")
        places = tuple(find(name) for name in (row["image"], *sources))
        return Entry(f"{key}:{row['image']}", text, places)


@dataclasses.dataclass(frozen=True)
class IoJson(Rows):
    """ShareGPT-4o-Image and OpenGPT-4o-Image: `input_prompt`, `output_image`, for edits `input_image`.

    Attributes:
      file: the list.
      root: what its paths are relative to, by default the list's folder.
      archives: tars in which the pictures lie, by the same paths; none: they lie below `root`.
    """

    file: str
    root: str = ""
    archives: str | list | tuple = ()

    @property
    def loose(self) -> bool:
        """Whether the pictures are files of their own."""
        return not self.archives

    def inputs(self) -> list[str]:
        """The list and the tars."""
        return [self.file, *self._tars()]

    def units(self) -> list[list]:
        """Those of the list, and each tar, of which a scan says what is wrong with it."""
        return [*super().units(), *([path] for path in self._tars())]

    def scan(self, unit: list) -> Iterator[Entry | Problem]:
        """The records of some rows, or what of a tar cannot be read."""
        if len(unit) == 1:
            yield from _tar(unit[0])[1]
        else:
            yield from super().scan(unit)

    def _lists(self):
        return [(self.file, self.root or storage.parent(self.file))]

    def _finder(self, root: str) -> Find:
        """By the names that the members of the tars have."""
        if not self.archives:
            return super()._finder(root)
        found = [_tar(path) for path in self._tars()]
        # Then a picture may be found when the tar can be read.
        kind = (
            OSError if any(one.again for _, problems in found for one in problems) else ValueError
        )

        def find(name: Any) -> Place:
            for inside, _ in reversed(found):
                if isinstance(name, str) and name in inside:
                    return inside[name]
            raise kind(f"{name!r} is in none of the {len(found)} archives that can be read")

        return find

    def _entry(self, key: str, row: dict, find: Find) -> Entry:
        names = (row.get("output_image"), *_names(row.get("input_image")))
        return Entry(key, _text(row, "input_prompt"), tuple(map(find, names)))

    def _tars(self) -> list[str]:
        return storage.expand(self.archives) if self.archives else []


@dataclasses.dataclass(frozen=True)
class Sidecar(Rows):
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

    def _entry(self, key: str, row: dict, find: Find) -> Entry:
        folder = self.annotations or storage.join(storage.parent(self.file), "captions")
        annotation = storage.join(folder, _text(row, "annotation"))
        try:
            found = json.loads(storage.read(annotation))
        except FileNotFoundError:
            raise ValueError(f"{annotation}: no such file") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{annotation}: not JSON in UTF-8: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{annotation}: expected an object, found {type(found).__name__}")
        return Entry(_text(row, "image"), _text(found, self.field), (find(row["image"]),))


@dataclasses.dataclass(frozen=True)
class UniWorld(Rows):
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
        data, lists = storage.read(self.file), []
        try:
            lines = data.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise ValueError(f"{self.file}, line {line}: not UTF-8: {error}") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            parts = [part.strip() for part in line.split(",")]
            if len(parts) != 3 or not all(parts) or parts[2] not in ("true", "false"):
                raise ValueError(
                    f"{self.file}, line {number}: expected image_root,annotation.json,true|false; found {line!r}"
                )
            try:
                root, file = (storage.join(base, part) for part in parts[:2])
            except ValueError as error:
                raise ValueError(f"{self.file}, line {number}: {error}") from error
            lists.append((file, root))
        return lists

    def _entry(self, key: str, row: dict, find: Find) -> Entry:
        return _spoken(key, row, find)


@dataclasses.dataclass(frozen=True)
class Conversations(Rows):
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

    def _entry(self, key: str, row: dict, find: Find) -> Entry:
        return _spoken(key, row, find)


@dataclasses.dataclass(frozen=True)
class OmniGen2(Rows):
    """OmniGen2 and X2I2: a YAML file `data: [{path, type, ratio}]`, nested, and JSONL files; or one JSONL file.

    A `ratio` below 1 keeps that part of a file's records, chosen by their keys. One above 1 would draw them more often
    than others, which is what a `weight` is for; OmniGen2's own loader reads it and does nothing with it.

    Attributes:
      file: the YAML or JSONL file.
      root: what all paths are relative to, by default the folder of the file that names them.
    """

    file: str
    root: str = ""

    def inputs(self) -> list[str]:
        """All files of the tree."""
        return [file for file, _, _ in _tree(self.file, self.root)]

    def _lists(self):
        return [(file, self.root or storage.parent(file)) for file, _ in self._leaves()]

    def _leaves(self) -> list[tuple[str, float]]:
        """(list, its ratio)."""
        return [(file, ratio) for file, ratio, is_list in _tree(self.file, self.root) if is_list]

    def scan(self, unit: list) -> Iterator[Entry | Problem]:
        """As `Rows.scan`, a ratio's part of it."""
        ratio = dict(self._leaves()).get(unit[0], 1)  # a file that was missing may be there by now
        for found in super().scan(unit):
            # What is wrong with the whole file is nobody's part.
            if found.key == unit[0] or zlib.crc32(found.key.encode()) < ratio * 2**32:
                yield found

    def _entry(self, key: str, row: dict, find: Find) -> Entry:
        names = (row.get("output_image"), *_names(row.get("input_images")))
        return Entry(key, _text(row, "instruction"), tuple(map(find, names)))


def _tree(
    file: str, root: str, ratio: float = 1.0, above: tuple[str, ...] = ()
) -> list[tuple[str, float, bool]]:
    """(file, its ratio, whether it is a list) of the file and of all that it names; `above`: those that name it. A YAML
    file that is missing counts as a list that is."""
    if not file.endswith((".yml", ".yaml")) or storage.stamp(file) is None:
        return [(file, ratio, True)]
    if file in above:
        raise ValueError(f"{file}: names itself: {' -> '.join((*above, file))}")
    try:
        found = yaml.safe_load(storage.read(file))
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not YAML: {error}") from error
    entries = found.get("data") if isinstance(found, dict) else None
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and isinstance(e.get("path"), str) for e in entries
    ):
        raise ValueError(f"{file}: expected data: [{{path, type, ratio}}]; found {found!r}")
    files = [(file, ratio, False)]
    for entry in entries:
        path, part = entry["path"], entry.get("ratio", 1)
        if not isinstance(part, int | float) or not 0 < part <= 1:
            raise ValueError(
                f"{file}: {path}: expected a ratio above 0, at most 1; found {part!r}. A file that is to be "
                "drawn more often than others wants an entry of its own with a `weight`"
            )
        try:
            path = storage.join(root or storage.parent(file), path)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        files += _tree(path, root, ratio * part, (*above, file))
    return files


def _text(row: dict, key: str) -> str:
    if key not in row:
        raise ValueError(f"no {key!r}; found {{{', '.join(sorted(map(str, row)))}}}")
    try:
        return checked_text(row[key])
    except ValueError as error:
        raise ValueError(f"{key!r}: {error}") from error


def _names(value: Any) -> list:
    """One path, several or none."""
    names = [value] if isinstance(value, str) else value or []
    if not isinstance(names, list):
        raise ValueError(f"expected a picture's path or a list of them, found {value!r}")
    return names


def _spoken(key: str, row: dict, find: Find) -> Entry:
    """What is drawn at the end of a conversation, or the conversation."""
    images, said = read_spoken(row)
    places = tuple(find(name) for name in images)
    text = drawing_prompt(said)
    if text is None:
        return Entry(key, "", places, answered_turns(said))
    *sources, target = places
    return Entry(key, text, (target, *sources))


def _asked(key: str, images: Any, turns: Any, find: Find) -> Entry:
    if not isinstance(images, list):
        raise ValueError(f"'images' must be a list of files; found {images!r}")
    pairs = turns if isinstance(turns, list) and turns else [None]
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"'turns' must be a list of [question, answer]; found {turns!r}")
    asked = [Turn(*map(checked_text, pair)) for pair in pairs]
    asked[0] = dataclasses.replace(asked[0], pictures=len(images))
    return Entry(key, "", tuple(find(name) for name in images), tuple(asked))


def _tar(path: str) -> tuple[dict[str, Place], list[Problem]]:
    """Name -> place of the members of a tar, and what is wrong with it."""
    try:
        return _members(path, storage.stamp(path))
    except (ValueError, OSError) as error:
        return {}, [unread(path, error)]


@functools.lru_cache(maxsize=1024)
def _members(path: str, stamp) -> tuple[dict[str, Place], list[Problem]]:
    if stamp is None:
        return {}, [Problem(path, "no such file")]
    found, problems = {}, []
    for member in members(path):
        if member.size >= 0:
            found[member.name.removeprefix("./")] = Place(path, member.at, member.size)
        if member.gap:
            problems.append(Problem(f"{path} before {member.name or 'its end'}", member.gap))
    return found, problems
