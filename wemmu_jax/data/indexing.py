"""Making, finding and renewing indexes.

They lie in `$WEMMU_INDEX`, by default `~/.cache/wemmu/index`; hosts may share it. One is named by the files that the
format names, by their sizes and times, so that of these no stale one is found. Of pictures and texts in files of their
own there are too many to look at whenever a set is opened: a renewal does, and what it finds is an index beside the
one of before, `NAME.1`, `NAME.2`, ..., which runs may be reading. The last one counts.
"""

import dataclasses
import enum
import filecmp
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from wemmu_jax.data import storage
from wemmu_jax.data.captions import Captions, write_captions
from wemmu_jax.data.index import (
    VERSION,
    Earlier,
    Entry,
    Format,
    Index,
    Problem,
    read_problems,
    settle,
    unread,
)
from wemmu_jax.data.measuring import write_part
from wemmu_jax.data.merging import merge_parts
from wemmu_jax.data.processes import each
from wemmu_jax.files import check_local

Progress = Callable[[int, int], None]  # units done, units in all


class Renewal(enum.Enum):
    """What is read again of a set that has an index."""

    NOTHING = enum.auto()
    # What is no record, and texts in files of their own; a picture that changed is left to whoever reads it.
    LEFT_OUT = enum.auto()
    # That, and pictures whose files have another size or time.
    CHANGED = enum.auto()


def index_folder(format: Format, captions: str | list | tuple = ()) -> pathlib.Path:
    """Where the first index of a data set lies, or will lie."""
    files = [*format.inputs(), *(storage.expand(captions) if captions else ())]
    described = {
        "version": VERSION,
        "format": type(format).__name__,
        "arguments": dataclasses.asdict(format),
        "files": [[path, storage.stamp(path)] for path in files],
    }
    text = json.dumps(described, sort_keys=True)
    root = os.environ.get("WEMMU_INDEX") or pathlib.Path.home() / ".cache/wemmu/index"
    check_local(root, name="WEMMU_INDEX")
    name = f"{type(format).__name__.lower()}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"
    return pathlib.Path(root) / name


def open_index(
    format: Format,
    captions: str | list | tuple = (),
    *,
    processes: int = 0,
    progress: Progress | None = None,
    renewal: Renewal = Renewal.NOTHING,
) -> Index:
    """The data set's index; made first where there is none.

    Args:
      format: the data set.
      captions: sidecars of `wemmu data caption`, whose texts take the place of the set's own.
      processes: that read units; 0: this one.
      progress: is told when a unit is done.
      renewal: what is read again where there is one.

    Raises:
      FileNotFoundError, ValueError: the set's list or a pattern cannot be read.
    """
    folder = index_folder(format, captions)
    is_new = False
    if not _is_there(folder):
        if progress is None:
            print(f"reading {_named(format)} to index it: {folder}", file=sys.stderr, flush=True)
        building = folder.with_name(folder.name + ".building")
        is_new = not building.exists()
        try:
            _build(format, captions, folder, building, processes, progress or _silent)
        except (OSError, ValueError):
            # Hosts that share the folder may build together; who is done first takes the parts away.
            if not _is_there(folder):
                raise
        shutil.rmtree(building, ignore_errors=True)
    if renewal is not Renewal.NOTHING and not is_new:
        trusted = renewal is Renewal.LEFT_OUT
        _renew(format, captions, folder, processes, progress or _silent, trusted=trusted)
    return Index(_last(folder))


def _silent(done: int, total: int) -> None:
    pass


def _last(folder: pathlib.Path) -> pathlib.Path:
    """An index's last renewal, or itself."""
    found = [one for one in folder.parent.glob(f"{folder.name}.*") if one.suffix[1:].isdigit()]
    return max(found, key=_renewals, default=folder)


def _is_there(folder: pathlib.Path) -> bool:
    return (_last(folder) / "meta.json").exists()


def _renewals(folder: pathlib.Path) -> int:
    return int(folder.suffix[1:] or 0)


def _build(
    format: Format,
    captions: str | list | tuple,
    folder: pathlib.Path,
    building: pathlib.Path,
    processes: int,
    progress: Progress,
) -> None:
    units = list(format.units())
    sidecars = _sidecars(captions, building)
    parts = [building / f"{number:06}" for number in range(len(units))]
    jobs = [
        (format, sidecars, unit, part)
        for unit, part in zip(units, parts, strict=True)
        if not part.exists()
    ]
    done = len(units) - len(jobs)
    progress(done, len(units))
    for _ in each(_build_part, jobs, processes):
        done += 1
        progress(done, len(units))
    if not parts:
        raise ValueError(f"{_named(format)}: nothing to read")
    finished = folder.with_name(f"{folder.name}.partial-{uuid.uuid4()}")
    try:
        merge_parts(parts, finished, _meta(format, units, parts))
        settle(finished, folder)
    finally:
        shutil.rmtree(finished, ignore_errors=True)


def _renew(
    format: Format,
    captions: str | list | tuple,
    folder: pathlib.Path,
    processes: int,
    progress: Progress,
    *,
    trusted: bool,
) -> None:
    """Scans every unit that may have changed; of its pictures reads those that have, and those that are new."""
    index = Index(_last(folder))
    units, before = list(format.units()), index.units()
    if len(units) != len(before):
        raise ValueError(
            f"{index.folder}: of {len(before)} units, but {_named(format)} has {len(units)} now: did it change while "
            "it was opened? Start again, or delete the index"
        )
    if not format.loose and not any(one.again for _, problems in before for one in problems):
        return
    # Nobody goes on with a renewal that was stopped: what it saw may have changed again.
    building = folder.with_name(f"{folder.name}.building-{uuid.uuid4()}")
    parts = [building / f"{number:06}" for number in range(len(units))]
    try:
        sidecars = _sidecars(captions, building)
        jobs = [
            (format, sidecars, index, unit, records, problems, part, trusted)
            for unit, (records, problems), part in zip(units, before, parts, strict=True)
        ]
        for done, _ in enumerate(each(_renew_part, jobs, processes), 1):
            progress(done, len(jobs))
        merged = building / "merged"
        merge_parts(parts, merged, _meta(format, units, parts))
        names = [path.name for path in merged.iterdir()]
        if filecmp.cmpfiles(merged, index.folder, names, shallow=False)[0] != names:
            number = _renewals(index.folder) + 1
            settle(merged, folder.with_name(f"{folder.name}.{number}"))
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _sidecars(captions: str | list | tuple, building: pathlib.Path) -> pathlib.Path | None:
    """What `Captions` maps, made if it is not there yet; None without sidecars."""
    if not captions:
        return None
    folder = building / "captions"
    if not folder.exists():
        write_captions(storage.expand(captions), folder)
    return folder


def _build_part(
    format: Format,
    sidecars: pathlib.Path | None,
    unit: Any,
    part: pathlib.Path,
    earlier: Earlier = Earlier(),  # noqa: B008 frozen
) -> None:
    entries = format.scan(unit)
    if sidecars:
        entries = _recaptioned(entries, Captions(sidecars))
    write_part(format, entries, part, earlier)


def _renew_part(
    format: Format,
    sidecars: pathlib.Path | None,
    index: Index,
    unit: Any,
    records: range,
    problems: list[Problem],
    part: pathlib.Path,
    trusted: bool,
) -> None:
    earlier = index.earlier(records, trusted=trusted)
    if format.loose or any(one.again for one in problems):
        _build_part(format, sidecars, unit, part, earlier)
    else:
        write_part(format, itertools.chain(map(index.entry, records), problems), part, earlier)


def _recaptioned(
    entries: Iterator[Entry | Problem], captions: Captions
) -> Iterator[Entry | Problem]:
    for entry in entries:
        if isinstance(entry, Entry) and not entry.turns:
            try:
                text = captions.get(entry.key)
                if text is None:
                    more = f"; {captions.unread}" if captions.unread else ""
                    raise ValueError(f"the sidecars have no caption for it{more}")
            except (ValueError, OSError) as error:
                yield unread(entry.key, error)
                continue
            entry = dataclasses.replace(entry, text=text)
        yield entry


def _file_of(unit: Any) -> str:
    """The file that a unit is a part of."""
    return unit if isinstance(unit, str) else unit[0]


def _meta(
    format: Format, units: Sequence[Any], parts: Sequence[pathlib.Path]
) -> dict[str, str | int]:
    """What an index says of itself: what it was made from, and the mean of the records, good and bad, of those of its
    files that were seen whole; 0 if none was."""
    counts: dict[str, int] = {}
    unseen = set()
    for unit, part in zip(units, parts, strict=True):
        [[records, wrong]] = np.load(part / "units.npy").tolist()
        file = _file_of(unit)
        counts[file] = counts.get(file, 0) + records + wrong
        if wrong and not all(one.records for one in read_problems(part)):
            unseen.add(file)
    whole = [count for file, count in counts.items() if count and file not in unseen]
    return {
        "format": _named(format),
        "records_of_a_file": round(sum(whole) / len(whole)) if whole else 0,
    }


def _named(format: Format) -> str:
    values = {k: v for k, v in dataclasses.asdict(format).items() if v}
    return f"{type(format).__name__} {values}"
