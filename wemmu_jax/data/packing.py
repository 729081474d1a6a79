"""Packing a data set into ArrayRecord files: one read for a record, wherever its pictures lay before."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

from wemmu_jax.data.formats import array_record
from wemmu_jax.data.index import Problem
from wemmu_jax.data.indexing import Progress
from wemmu_jax.data.manifest import go_on
from wemmu_jax.data.processes import each
from wemmu_jax.data.rows import Bad
from wemmu_jax.data.sources import IndexedSource
from wemmu_jax.files import replacing


def pack(
    source: IndexedSource,
    folder: pathlib.Path,
    *,
    name: str,
    shard_size: int,
    processes: int,
    progress: Progress,
) -> list[Problem]:
    """Writes `NAME-00000-of-00012.arrayrecord`; files that are there stay, so that a packing that was stopped goes on.
    `NAME.json` says what they were made from, `NAME.bad.jsonl` what is left out, `{"data_set", "key", "reason"}`; a
    shard's own part of it lies beside the shard.

    Returns:
      All that is left out: by the index, or because it could not be read, now or when a file that is there was made.

    Raises:
      ValueError: the folder holds a packing of other records or another shard size.
    """
    made_from = {"records": source.index.identity, "shard_size": shard_size}
    go_on(folder / f"{name}.json", made_from, made=f"{name}-[0-9]*-of-*.arrayrecord")
    starts = list(range(0, len(source), shard_size))
    files = [
        folder / f"{name}-{shard:05}-of-{len(starts):05}.arrayrecord"
        for shard in range(len(starts))
    ]
    jobs = [
        (source, start, min(start + shard_size, len(source)), file, name)
        for start, file in zip(starts, files, strict=True)
        if not file.exists()
    ]
    done = len(starts) - len(jobs)
    progress(done, len(starts))
    for _ in each(_pack_shard, jobs, processes):
        done += 1
        progress(done, len(starts))
    problems = [*source.problems(), *(problem for file in files for problem in _read_bad(file))]
    _write_bad(folder / f"{name}.bad.jsonl", name, problems)
    return problems


def _pack_shard(
    source: IndexedSource, start: int, stop: int, file: pathlib.Path, name: str
) -> None:
    problems = []
    with replacing(file) as partial:
        out = array_record.writer(str(partial))
        for number in range(start, stop):
            key = source.index.key(number)
            try:
                pictures = [source.read(found) for found in source.index.pictures(number)]
            except (ValueError, OSError) as error:
                problems.append(Problem(key, str(error)))
                continue
            index = source.index
            out.write(array_record.pack(key, index.text(number), pictures, index.turns(number)))
        out.close()
        # Before the shard is there: whoever goes on does not read it again.
        _write_bad(_bad_file(file), name, problems)


def _bad_file(shard: pathlib.Path) -> pathlib.Path:
    return shard.with_suffix(".bad.jsonl")


def _write_bad(file: pathlib.Path, name: str, problems: Sequence[Problem]) -> None:
    """No file where there are none."""
    if not problems:
        file.unlink(missing_ok=True)
        return
    rows = [dataclasses.asdict(Bad(name, problem.key, problem.reason)) for problem in problems]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")


def _read_bad(shard: pathlib.Path) -> list[Problem]:
    try:
        with _bad_file(shard).open(encoding="utf-8") as lines:
            return [Problem(row["key"], row["reason"]) for row in map(json.loads, lines)]
    except FileNotFoundError:
        return []
