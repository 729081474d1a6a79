"""Data sets as people have them, read as records.

A data set is one small config entry, `{"type": ..., more arguments}`; `SOURCES` says what the types are. To read
another format is to write one class and to add it there.
"""

import dataclasses
import importlib
import inspect
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from wemmu_jax.data.pictures import file_picture, picture_size
from wemmu_jax.data.pools import Feed
from wemmu_jax.data.records import Record, RecordSource
from wemmu_jax.data.tasks import Task

# Kind of a folder's line -> the numbers of source pictures that it may have.
KINDS = {"caption": (0,), "edit": (1,), "composition": (2, 3, 4)}

_CAPTION_KEYS = {"image", "caption"}
_EDIT_KEYS = {"image", "instruction", "sources"}


@dataclasses.dataclass(frozen=True)
class _Line:
    number: int
    text: str
    image: str
    sources: tuple[str, ...]

    @property
    def kind(self) -> str | None:
        return next((kind for kind, counts in KINDS.items() if len(self.sources) in counts), None)


class FolderSource:
    """A folder of pictures and a JSONL file in it, one record a line:

        {"image": "a.jpg", "caption": "a red barn"}
        {"image": "after.png", "instruction": "make it blue", "sources": ["before.png"]}

    `image` is the picture to be drawn. Paths are relative to the folder and stay inside it. Lines of kinds other
    than `kind` are left to other sources; the sizes of all pictures of the kind are read from their headers at once.

    Args:
      folder: the folder.
      kind: "caption", "edit" (one source) or "composition" (two to four).
      index: name of the JSONL file.

    Raises:
      FileNotFoundError: the folder, the index or a picture is not there.
      ValueError: a line or a picture is not as it should be, or there is no line of this kind.
    """

    def __init__(
        self, folder: str | pathlib.Path, kind: str = "caption", index: str = "captions.jsonl"
    ):
        if kind not in KINDS:
            raise ValueError(f"kind of a folder must be one of {', '.join(KINDS)}; found {kind!r}")
        self._folder = pathlib.Path(folder)
        self._index = self._folder / index
        if not self._index.is_file():
            raise FileNotFoundError(f"{self._index}: no such file")
        lines = _read_lines(self._index)
        self._lines = [line for line in lines if line.kind == kind]
        if not self._lines:
            found = dict(Counter(line.kind for line in lines)) or "an empty file"
            raise ValueError(f"{self._index}: no line of kind {kind!r}; found {found}")
        self._sizes: dict[str, tuple[int, int]] = {}
        for line in self._lines:
            for picture in (line.image, *line.sources):
                if picture not in self._sizes:
                    where = f"{self._index}, line {line.number}: {picture}"
                    self._sizes[picture] = picture_size(self._folder / picture, name=where)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Record:
        line = self._lines[index]
        loaded = {name: self._picture(name) for name in {line.image, *line.sources}}
        return Record(
            key=f"{line.number}:{line.image}",
            text=line.text,
            sources=tuple(loaded[name] for name in line.sources),
            target=loaded[line.image],
        )

    def sizes(self) -> np.ndarray:
        """int32[N, 2], (height, width) of each target."""
        return np.array([self._sizes[line.image] for line in self._lines], np.int32)

    def source_counts(self) -> np.ndarray:
        """int32[N], source pictures of each record."""
        return np.array([len(line.sources) for line in self._lines], np.int32)

    def _picture(self, name: str):
        path = self._folder / name
        return file_picture(path, self._sizes[name], name=str(path))


def _miniworld(kind: str, *, seed: int, size: int, split: str) -> RecordSource:
    for name, value, least in (("seed", seed, 0), ("size", size, 1)):
        if value < least:
            raise ValueError(f"miniworld {name}: expected at least {least}, found {value}")
    # Miniworld imports the records of this package.
    sources = importlib.import_module("wemmu_jax.miniworld.sources")
    return sources.MiniworldSource(kind, seed=seed, size=size, split=split)


SOURCES: dict[str, Callable[..., RecordSource]] = {"folder": FolderSource, "miniworld": _miniworld}


def build_source(spec: Mapping) -> RecordSource:
    """The source that a config entry names: its `type` from `SOURCES`, and that type's arguments.

    Raises:
      ValueError: there is no such type, or it takes other arguments; and what the source itself raises.
    """
    arguments = dict(spec)
    kind = arguments.pop("type", None)
    if not isinstance(kind, str) or kind not in SOURCES:
        raise ValueError(
            f"data set {dict(spec)}: type must be one of {', '.join(SOURCES)}; found {kind!r}"
        )
    signature = inspect.signature(SOURCES[kind])
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ValueError(f"data set {dict(spec)}: {error}") from error
    for name, value in arguments.items():
        expected = signature.parameters[name].annotation
        if isinstance(value, bool) or not isinstance(value, expected):
            form = inspect.formatannotation(expected)
            raise ValueError(f"data set {dict(spec)}: {name} must be {form}; found {value!r}")
    return SOURCES[kind](**arguments)


def build_feeds(specs: Sequence[Mapping]) -> tuple[Feed, ...]:
    """Feeds from config entries: `name`, `tasks` (their names), optionally `weight` (1), and a source's entry.

    {"name": "photos", "tasks": ["T2I", "Rec"], "weight": 2, "type": "folder", "folder": "photos"}

    Raises:
      ValueError: an entry is not like this; and as `build_source`.
    """
    feeds = []
    for spec in specs:
        entry = dict(spec)
        if missing := {"name", "tasks"} - set(entry):
            raise ValueError(f"data set {entry}: {', '.join(sorted(missing))} missing")
        name, tasks, weight = entry.pop("name"), entry.pop("tasks"), entry.pop("weight", 1.0)
        if not isinstance(name, str) or not name:
            raise ValueError(f"data set {dict(spec)}: name must be a text; found {name!r}")
        known = [task.value for task in Task]
        if not isinstance(tasks, list | tuple) or not tasks or any(t not in known for t in tasks):
            raise ValueError(
                f"data set {name!r}: tasks must be a list of some of {', '.join(known)}; found {tasks!r}"
            )
        if any(feed.name == name for feed in feeds):
            raise ValueError(f"two data sets are named {name!r}")
        source = build_source(entry)
        feeds += [Feed(name, Task(task), source, weight) for task in tasks]
    return tuple(feeds)


def _read_lines(index: pathlib.Path) -> list[_Line]:
    lines = []
    for number, raw in enumerate(index.read_bytes().split(b"\n"), 1):
        if raw.strip():
            lines.append(_read_line(raw, number, f"{index}, line {number}"))
    return lines


def _read_line(raw: bytes, number: int, where: str) -> _Line:
    try:
        fields = json.loads(raw.decode("utf-8-sig"))
    except ValueError as error:  # of the decoder's or of json's
        raise ValueError(f"{where}: not JSON in UTF-8: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: expected an object, found {type(fields).__name__}")
    if set(fields) not in (_CAPTION_KEYS, _EDIT_KEYS):
        wanted = f"{_names(_CAPTION_KEYS)} or {_names(_EDIT_KEYS)}"
        raise ValueError(f"{where}: expected the keys {wanted}; found {_names(fields)}")
    text_key = "caption" if "caption" in fields else "instruction"
    for key in ("image", text_key):
        if not isinstance(fields[key], str) or not fields[key].strip():
            raise ValueError(
                f"{where}: {key!r} must be a text that is not empty; found {fields[key]!r}"
            )
    sources = fields.get("sources", [])
    if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
        raise ValueError(f"{where}: 'sources' must be a list of files; found {sources!r}")
    if text_key == "instruction" and not 1 <= len(sources) <= 4:
        raise ValueError(f"{where}: 'sources' must have one to four files; found {len(sources)}")
    for key, name in [("image", fields["image"]), *(("sources", source) for source in sources)]:
        path = pathlib.PurePath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{where}: {key!r}: {name!r} leads out of the folder")
    return _Line(number, fields[text_key], fields["image"], tuple(sources))


def _names(keys) -> str:
    return "{" + ", ".join(sorted(map(str, keys))) + "}"
