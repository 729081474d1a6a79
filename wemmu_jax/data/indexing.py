"""Making and finding indexes. One is named by what it was made from, so that a stale one is never found.

They lie in `$WEMMU_INDEX`, by default `~/.cache/wemmu/index`; hosts may share it.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from wemmu_jax.data import storage
from wemmu_jax.data.captions import Captions, write_captions
from wemmu_jax.data.index import (
    VERSION,
    Entry,
    Format,
    Index,
    Problem,
    merge_parts,
    settle,
    write_part,
)

Progress = Callable[[int, int], None]  # units done, units in all


def index_folder(format: Format, captions: str | list | tuple = ()) -> pathlib.Path:
    """Where the index of a data set lies, or will lie."""
    files = [*format.inputs(), *(storage.expand(captions) if captions else ())]
    described = {
        "version": VERSION,
        "format": type(format).__name__,
        "arguments": dataclasses.asdict(format),
        "files": [[path, storage.stamp(path)] for path in files],
    }
    text = json.dumps(described, sort_keys=True)
    root = os.environ.get("WEMMU_INDEX") or pathlib.Path.home() / ".cache/wemmu/index"
    name = f"{type(format).__name__.lower()}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"
    return pathlib.Path(root) / name


def open_index(
    format: Format,
    captions: str | list | tuple = (),
    *,
    processes: int = 0,
    progress: Progress | None = None,
) -> Index:
    """The data set's index; made first where there is none.

    Args:
      format: the data set.
      captions: sidecars of `wemmu data caption`, whose texts take the place of the set's own.
      processes: that read units; 0: this one.
      progress: is told when a unit is done.

    Raises:
      FileNotFoundError, ValueError: the set's list or a pattern cannot be read.
    """
    folder = index_folder(format, captions)
    if not (folder / "meta.json").exists():
        if progress is None:
            print(f"reading {_named(format)} to index it: {folder}", file=sys.stderr, flush=True)
        try:
            _build(format, captions, folder, processes, progress or (lambda done, total: None))
        except OSError:
            # Hosts that share the folder may build together; who is done first takes the parts away.
            if not (folder / "meta.json").exists():
                raise
    return Index(folder)


def _build(
    format: Format,
    captions: str | list | tuple,
    folder: pathlib.Path,
    processes: int,
    progress: Progress,
) -> None:
    building = folder.with_name(folder.name + ".building")
    units = list(format.units())
    sidecars = building / "captions" if captions else None
    if sidecars and not sidecars.exists():
        write_captions(storage.expand(captions), sidecars)
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
    merge_parts(parts, finished, {"format": _named(format)})
    settle(finished, folder)
    shutil.rmtree(building, ignore_errors=True)


def each(function: Callable, jobs: Sequence[tuple], processes: int) -> Iterator[Any]:
    """`function(*job)` for each job as they are done, in any order; in so many processes, with 0 in this one."""
    if processes == 0 or len(jobs) < 2:
        yield from (function(*job) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = [pool.submit(function, *job) for job in jobs]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _build_part(
    format: Format, sidecars: pathlib.Path | None, unit: Any, part: pathlib.Path
) -> None:
    entries = format.scan(unit)
    write_part(format, _recaptioned(entries, Captions(sidecars)) if sidecars else entries, part)


def _recaptioned(
    entries: Iterator[Entry | Problem], captions: Captions
) -> Iterator[Entry | Problem]:
    for entry in entries:
        if isinstance(entry, Entry) and not entry.turns:
            text = captions.get(entry.key)
            if text is None:
                yield Problem(entry.key, "the sidecars have no caption for it")
                continue
            entry = dataclasses.replace(entry, text=text)
        yield entry


def _named(format: Format) -> str:
    values = {k: v for k, v in dataclasses.asdict(format).items() if v}
    return f"{type(format).__name__} {values}"
