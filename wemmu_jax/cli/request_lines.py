"""The lines of `wemmu batch`'s JSONL file, checked as far as they can be without a model."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from wemmu_jax.cli.pictures import check_target
from wemmu_jax.cli.requests import SEEDS, TASKS, Request

CHAT = "chat"
ANSWERS = "answers.jsonl"
FIELDS = {
    "task": str,
    "instruction": str,
    "input_images": list,
    "output_image": str,
    "height": int,
    "width": int,
    "seed": int,
}
Fault = tuple[int, str]


@dataclasses.dataclass(frozen=True)
class Line:
    """One request.

    Attributes:
      number: of the line in the file, from 1.
      request: what is asked for, source pictures' paths resolved against the file's folder.
      target: where the picture goes; None for `chat`.
    """

    number: int
    request: Request
    target: pathlib.Path | None


def read_lines(
    file: pathlib.Path, out: pathlib.Path, *, steps: int
) -> tuple[list[Line], list[Fault]]:
    """The good lines of `file`, and (line number, what is wrong) for each of the others.

    Args:
      file: JSONL; empty lines are passed over.
      out: the folder that `output_image` is relative to.
      steps: of the solver, for all requests.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not UTF-8, or holds no request.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    lines: list[Line] = []
    faults: list[Fault] = []
    targets = _Targets()
    for number, text in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if not text.strip():
            continue
        try:
            line = _line(number, text, file.parent, out, steps)
            if line.target is not None:
                targets.claim(line.target, number)
            lines.append(line)
        except ValueError as error:
            faults.append((number, str(error)))
    if not lines and not faults:
        raise ValueError(f"{file}: holds no request")
    return lines, faults


class _Targets:
    """The files that lines write, and the folders that these need."""

    def __init__(self):
        self._files: dict[pathlib.Path, int] = {}
        self._folders: dict[pathlib.Path, int] = {}

    def claim(self, target: pathlib.Path, number: int) -> None:
        """Notes what line `number` writes; raises ValueError if it cannot be written beside the others."""
        check_target(target, name="output_image")
        if target in self._files:
            raise ValueError(f"output_image: line {self._files[target]} writes the same file")
        if target in self._folders:
            raise ValueError(f"output_image: line {self._folders[target]} needs it as a folder")
        for folder in target.parents:
            if folder in self._files:
                line = self._files[folder]
                raise ValueError(f"output_image: line {line} writes {folder} as a file")
        self._files[target] = number
        for folder in target.parents:
            self._folders.setdefault(folder, number)


def _line(number: int, text: str, folder: pathlib.Path, out: pathlib.Path, steps: int) -> Line:
    row = _row(text)
    task = row["task"]
    if task == "reconstruct" and row.get("instruction"):
        raise ValueError("instruction: reconstruct takes none")
    if task == CHAT and (sides := {"height", "width"} & row.keys()):
        raise ValueError(f"{min(sides)}: chat answers in words")
    if task != "reconstruct" and "instruction" not in row:
        raise ValueError("instruction: missing")
    request = Request(
        task=task,
        instruction=row.get("instruction", ""),
        images=tuple(str(folder / name) for name in row.get("input_images", [])),
        height=row.get("height"),
        width=row.get("width"),
        seed=row.get("seed", 0),
        steps=steps,
        guidance={},
    )
    return Line(number, request, _target(task, row.get("output_image"), out))


def _row(text: str) -> dict[str, Any]:
    """The line as an object of known fields with values of the right kind; null is as good as absent."""
    try:
        row = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, found {type(row).__name__}")
    if unknown := sorted(set(row) - set(FIELDS)):
        raise ValueError(f"unknown fields {unknown}; known: {list(FIELDS)}")
    row = {name: value for name, value in row.items() if value is not None}
    for name, value in row.items():
        if type(value) is not FIELDS[name]:
            expected = FIELDS[name].__name__
            raise ValueError(f"{name}: expected {expected}, found {type(value).__name__}")
    if row.get("task") not in TASKS:
        raise ValueError(f"task: expected one of {list(TASKS)}, found {row.get('task')!r}")
    _check_values(row)
    return row


def _check_values(row: Mapping[str, Any]) -> None:
    for name in row.get("input_images", []):
        if not isinstance(name, str):
            raise ValueError(f"input_images: expected paths, found {type(name).__name__}")
    for name in ("height", "width"):
        if row.get(name, 1) < 1:
            raise ValueError(f"{name}: expected at least 1, found {row[name]}")
    if not 0 <= row.get("seed", 0) < SEEDS:
        raise ValueError(f"seed: expected 0 to {SEEDS - 1}, found {row['seed']}")


def _target(task: str, name: str | None, out: pathlib.Path) -> pathlib.Path | None:
    if task == CHAT:
        if name:
            raise ValueError("output_image: chat writes none, its answer goes to answers.jsonl")
        return None
    if not name:
        raise ValueError("output_image: missing")
    path = pathlib.PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"output_image: expected a path inside the output folder, found {name!r}")
    if path.parts[:1] == (ANSWERS,):
        raise ValueError(f"output_image: {ANSWERS} is where answers go, found {name!r}")
    if path.suffix.lower() != ".png":
        raise ValueError(f"output_image: pictures are written as PNG, found {name!r}")
    return out / path
