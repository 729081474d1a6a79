"""Data sets as people have them, read as records.

A data set is one small entry of a config or a YAML file, `{"type": ..., more arguments}`; `FORMATS` says what the
types are. To read another format is to write one class and to add it there.
"""

import dataclasses
import importlib
import inspect
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from wemmu_jax.data import storage
from wemmu_jax.data.formats.array_record import ArrayRecord
from wemmu_jax.data.formats.lists import (
    Conversations,
    Folder,
    IoJson,
    OmniGen2,
    Sidecar,
    UniWorld,
)
from wemmu_jax.data.formats.parquet import Bagel, ImgEdit
from wemmu_jax.data.formats.tar import Webdataset
from wemmu_jax.data.index import Format, Found, Index, Problem
from wemmu_jax.data.indexing import Progress, Renewal, open_index
from wemmu_jax.data.pictures import lazy_picture
from wemmu_jax.data.pools import Feed
from wemmu_jax.data.records import Picture, Record, RecordSource
from wemmu_jax.data.tasks import Task

FORMATS: dict[str, Callable[..., Format]] = {
    "webdataset": Webdataset,
    "sidecar": Sidecar,
    "io-json": IoJson,
    "uniworld": UniWorld,
    "conversations": Conversations,
    "omnigen2": OmniGen2,
    "bagel": Bagel,
    "imgedit": ImgEdit,
    "folder": Folder,
    "array-record": ArrayRecord,
}


_ANEW = "`wemmu data index` reads anew what has changed since it was indexed"


class IndexedSource:
    """A data set on disk through its index; every picture's bytes are checked against their checksum.

    Attributes:
      format: how it lies on disk.
      index: where its records are.
    """

    def __init__(self, format: Format, index: Index):
        self.format, self.index = format, index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> Record:
        found = self.index.pictures(number)
        # A picture that is in a record twice is decoded once.
        pictures = {one.place: self._picture(one) for one in found}
        shown = tuple(pictures[one.place] for one in found)
        key, turns = self.index.key(number), self.index.turns(number)
        if turns:
            return Record(key, "", shown, None, turns)
        return Record(key, self.index.text(number), shown[1:], shown[0])

    def sizes(self) -> np.ndarray:
        """int32[N, 2], (height, width) of each target, or of a conversation's first picture."""
        return self.index.sizes

    def source_counts(self) -> np.ndarray:
        """uint8[N], source pictures of each record."""
        return self.index.source_counts

    def conversations(self) -> np.ndarray:
        """bool[N], which records are conversations."""
        return self.index.conversations

    def identity(self) -> str:
        """Equal for the same keys, texts and pictures in the same order. Reads all texts once."""
        return self.index.identity

    def problems(self) -> list[Problem]:
        """What of the set could not be a record."""
        return self.index.problems()

    def read(self, found: Found) -> bytes:
        """A picture's bytes as they are in the set.

        Raises:
          FileNotFoundError, ValueError: they are not there, or others than when the index was made.
        """
        place = found.place
        try:
            data = self.format.read(place.path, place.at, place.size)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; {_ANEW}") from error
        except ValueError as error:
            raise ValueError(f"{error}; {_ANEW}") from error
        if (crc := zlib.crc32(data)) != found.crc:
            raise ValueError(
                f"{place.path} at {place.at}: expected the checksum {found.crc:08x}, found {crc:08x}: "
                f"the file has changed since it was indexed; {_ANEW}"
            )
        return data

    def _picture(self, found: Found) -> Picture:
        name = f"{found.place.path} at {found.place.at}" if found.place.at else found.place.path
        return lazy_picture(
            lambda: self.read(found),
            (found.height, found.width),
            name=name,
            identity=(found.crc, found.place.size),
        )


def _miniworld(kind: str, *, seed: int, size: int, split: str) -> RecordSource:
    for name, value, least in (("seed", seed, 0), ("size", size, 1)):
        if value < least:
            raise ValueError(f"miniworld {name}: expected at least {least}, found {value}")
    # Miniworld imports the records of this package.
    sources = importlib.import_module("wemmu_jax.miniworld.sources")
    return sources.MiniworldSource(kind, seed=seed, size=size, split=split)


def build_source(
    spec: Mapping,
    *,
    processes: int = 0,
    progress: Progress | None = None,
    renewal: Renewal = Renewal.NOTHING,
) -> RecordSource:
    """The source that a config entry names: its `type`, that type's arguments, and optionally `captions`, sidecars.

    Its index is made if there is none, by `processes`, and renewed if that is asked for: see `open_index`.

    Raises:
      FileNotFoundError: a file that the entry names is not there.
      ValueError: there is no such type, or it takes other arguments; or the set has no record.
    """
    found, captions = _parse(spec)
    if spec["type"] == "miniworld":
        return found
    index = open_index(found, captions, processes=processes, progress=progress, renewal=renewal)
    source = IndexedSource(found, index)
    if not len(source):
        raise ValueError(f"data set {dict(spec)}: no record{_summary(index.problems())}")
    return source


def _parse(spec: Mapping) -> tuple[Format | RecordSource, str | list | tuple]:
    """What a source's entry names, of which no file has been looked at, and its sidecars."""
    arguments = dict(spec)
    kind = arguments.pop("type", None)
    if kind == "miniworld":
        return _call(_miniworld, arguments, spec), ()
    if not isinstance(kind, str) or kind not in FORMATS:
        raise ValueError(
            f"data set {dict(spec)}: type must be one of {', '.join([*FORMATS, 'miniworld'])}; found {kind!r}"
        )
    captions = arguments.pop("captions", ())
    if not isinstance(captions, str | list | tuple) or not _are_texts(captions):
        raise ValueError(f"data set {dict(spec)}: captions must be paths; found {captions!r}")
    return _call(FORMATS[kind], arguments, spec), captions


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A config entry that makes sense; none of its files has been looked at.

    Attributes:
      name: goes into keys and errors.
      tasks: that its records are given to.
      weight: its part of a task's rows, relative to the task's other sets.
      spec: what `build_source` takes.
    """

    name: str
    tasks: tuple[Task, ...]
    weight: float
    spec: Mapping[str, Any]

    def feeds(self, source: RecordSource) -> list[Feed]:
        """The set given to each of its tasks."""
        return [Feed(self.name, task, source, self.weight) for task in self.tasks]


def data_sets(specs: Iterable[Mapping | str]) -> list[DataSet]:
    """The sets of config entries, see `build_feeds`; reads no more than YAML files.

    Raises:
      FileNotFoundError: as `read_entries`.
      ValueError: names everything that is wrong with the entries.
    """
    found: dict[str, DataSet] = {}
    wrong = []
    for entry in read_entries(specs):
        try:
            one = _data_set(entry)
        except ValueError as error:
            wrong.append(str(error))
            continue
        if one.name in found:
            wrong.append(f"two data sets are named {one.name!r}")
        found[one.name] = one
    if wrong:
        raise ValueError("\n".join(wrong))
    return list(found.values())


def _data_set(entry: Mapping) -> DataSet:
    spec = dict(entry)
    if missing := {"name", "tasks"} - set(spec):
        raise ValueError(f"data set {spec}: {', '.join(sorted(missing))} missing")
    name, tasks, weight = spec.pop("name"), spec.pop("tasks"), spec.pop("weight", 1.0)
    if not isinstance(name, str) or not name:
        raise ValueError(f"data set {dict(entry)}: name must be a text; found {name!r}")
    known = [task.value for task in Task]
    if not isinstance(tasks, list | tuple) or not tasks or any(t not in known for t in tasks):
        raise ValueError(
            f"data set {name!r}: tasks must be a list of some of {', '.join(known)}; found {tasks!r}"
        )
    if len(set(tasks)) != len(tasks):
        raise ValueError(f"data set {name!r}: tasks must be named once; found {tasks!r}")
    one = DataSet(name, tuple(map(Task, tasks)), weight, spec)
    one.feeds([])  # which looks at the weight
    _parse(spec)
    return one


def build_feeds(specs: Iterable[Mapping | str], *, bad_share: float = 1.0) -> tuple[Feed, ...]:
    """Feeds from config entries: `name`, `tasks` (their names), optionally `weight` (1), and a source's entry.

    {"name": "photos", "tasks": ["T2I", "Rec"], "weight": 2, "type": "folder", "folder": "photos"}

    Args:
      specs: entries, or YAML files of entries.
      bad_share: the part of a set's records that may be none, as its index found.

    Raises:
      ValueError: entries are not like this, or too much of a set is bad; and as `build_source`.
    """
    feeds = []
    for one in data_sets(specs):
        source = build_source(one.spec)
        if isinstance(source, IndexedSource):
            bad = source.index.left_out
            if bad > bad_share * (bad + len(source)):
                raise ValueError(
                    f"data set {one.name!r}: {bad} of {bad + len(source)} records cannot be read, more than the share "
                    f"{bad_share} that data.bad_share allows; {_ANEW}{_summary(source.problems())}"
                )
        feeds += one.feeds(source)
    return tuple(feeds)


def read_entries(specs: Iterable[Mapping | str]) -> list[dict[str, Any]]:
    """Entries of data sets; a text among `specs` is a YAML file that holds one entry or a list of them. Relative
    paths in it are relative to where the command runs, as those in a config are.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds something else.
    """
    entries = []
    for spec in specs:
        if not isinstance(spec, str):
            entries.append(dict(spec))
            continue
        try:
            found = yaml.safe_load(storage.read(spec))
        except yaml.YAMLError as error:
            raise ValueError(f"{spec}: not YAML: {error}") from error
        found = [found] if isinstance(found, dict) else found
        if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
            raise ValueError(
                f"{spec}: expected a data set's entry or a list of them; found {found!r}"
            )
        entries += found
    return entries


def _call(function: Callable, arguments: Mapping[str, Any], spec: Mapping):
    """`function(**arguments)`, whose names and types are checked against its annotations first."""
    signature = inspect.signature(function)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ValueError(f"data set {dict(spec)}: {error}") from error
    for name, value in arguments.items():
        expected = signature.parameters[name].annotation
        if isinstance(value, bool) or not isinstance(value, expected):
            form = inspect.formatannotation(expected)
            raise ValueError(f"data set {dict(spec)}: {name} must be {form}; found {value!r}")
        if not _are_texts(value):
            raise ValueError(f"data set {dict(spec)}: {name} must hold only texts; found {value!r}")
    try:
        return function(**arguments)
    except ValueError as error:
        raise ValueError(f"data set {dict(spec)}: {error}") from error


def _are_texts(value: Any) -> bool:
    """Whether a list holds only texts; what is no list passes."""
    return not isinstance(value, list | tuple) or all(isinstance(one, str) for one in value)


def _summary(problems: Sequence[Problem], most: int = 5) -> str:
    lines = [f"\n  {problem.key}: {problem.reason}" for problem in problems[:most]]
    more = f"\n  and {len(problems) - most} more" if len(problems) > most else ""
    return "".join(lines) + more
