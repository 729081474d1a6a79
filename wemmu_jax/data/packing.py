"""Packing a data set into ArrayRecord files: one read for a record, wherever its pictures lay before."""

import pathlib

from wemmu_jax.data.formats import array_record
from wemmu_jax.data.index import Problem
from wemmu_jax.data.indexing import Progress
from wemmu_jax.data.manifest import go_on
from wemmu_jax.data.processes import each
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
    `NAME.json` says what they were made from.

    Returns:
      The records that could not be read, which are left out.

    Raises:
      ValueError: the folder holds a packing of other records or another shard size.
    """
    made_from = {"records": source.index.identity, "shard_size": shard_size}
    go_on(folder / f"{name}.json", made_from, made=f"{name}-*.arrayrecord")
    starts = list(range(0, len(source), shard_size))
    jobs, problems = [], []
    for shard, start in enumerate(starts):
        file = folder / f"{name}-{shard:05}-of-{len(starts):05}.arrayrecord"
        if not file.exists():
            jobs.append((source, start, min(start + shard_size, len(source)), str(file)))
    done = len(starts) - len(jobs)
    progress(done, len(starts))
    for found in each(_pack_shard, jobs, processes):
        problems += found
        done += 1
        progress(done, len(starts))
    return problems


def _pack_shard(source: IndexedSource, start: int, stop: int, file: str) -> list[Problem]:
    problems = []
    with replacing(pathlib.Path(file)) as partial:
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
    return problems
