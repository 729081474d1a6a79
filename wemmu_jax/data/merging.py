"""An index from its parts, which are indexes of a unit each."""

import contextlib
import errno
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

from wemmu_jax.data.index import COLUMNS, VERSION, load_column, problem_file
from wemmu_jax.files import write_json


def merge_parts(parts: Sequence[pathlib.Path], folder: pathlib.Path, meta: dict[str, Any]) -> None:
    """Writes the parts, in their order, as one index, whole or not at all.

    Raises:
      OSError: the disk has not enough room.
    """
    folder.mkdir(parents=True)
    lengths = {name: [len(load_column(p / f"{name}.npy")) for p in parts] for name in COLUMNS}
    totals = {name: sum(each) for name, each in lengths.items()}
    totals["names"] -= len(parts) - 1  # each has an end of its own
    columns = {
        name: _new_column(
            folder / f"{name}.npy",
            (first := load_column(parts[0] / f"{name}.npy")).dtype,
            (totals[name], *first.shape[1:]),
        )
        for name in COLUMNS
        if totals[name]
    }
    for name in set(COLUMNS) - set(columns):
        np.save(folder / f"{name}.npy", load_column(parts[0] / f"{name}.npy")[:0])
    at = dict.fromkeys(COLUMNS, 0)
    texts_at = names_at = problems = 0
    with (
        (folder / "texts.bin").open("wb") as texts,
        (folder / "names.bin").open("wb") as names,
        problem_file(folder) as problem_lines,
    ):
        for part in parts:
            loaded = {name: np.array(load_column(part / f"{name}.npy")) for name in COLUMNS}
            loaded["records"]["text_at"] += np.uint64(texts_at)
            loaded["records"]["pictures_at"] += np.uint64(at["pictures"])
            loaded["pictures"]["file"] += np.uint32(at["names"])
            loaded["names"] += names_at
            for name, column in loaded.items():
                if len(column):
                    columns[name][at[name] : at[name] + len(column)] = column
                at[name] += len(column) - (name == "names")
            for name, heap in (("texts.bin", texts), ("names.bin", names)):
                with (part / name).open("rb") as own:
                    shutil.copyfileobj(own, heap)
            texts_at, names_at = texts.tell(), names.tell()
            lines = (part / "problems.jsonl").read_text(encoding="utf-8")
            problem_lines.write(lines)
            problems += lines.count("\n")
    for column in columns.values():
        column.flush()
    write_json(
        folder / "meta.json", {"version": VERSION, "rows": totals, "problems": problems, **meta}
    )


def _new_column(path: pathlib.Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Mapped, to be filled. Its room is taken at once: where the disk is found full while a mapped page is written, the
    process is killed by SIGBUS without a word."""
    column = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    with path.open("r+b") as file, contextlib.suppress(AttributeError):  # of macOS
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            # Some file systems cannot.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise OSError(error.errno, error.strerror, str(path)) from error
    return column
