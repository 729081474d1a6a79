"""The answers of `wemmu batch`: a JSONL file that grows by a line an answer and is never seen half there."""

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from wemmu_jax.files import replacing

ANSWER, FOLDER = "answer", "checkpoint"


class Answers:
    """A line is what was asked, as JSON values, and `answer`; what is asked twice has one."""

    def __init__(self, file: pathlib.Path):
        """Reads what is there; writes nothing yet.

        Raises:
          ValueError: the file holds something else.
        """
        self._file = file
        self._records = _read(file)
        self._on_disk = False

    def has(self, asked: Mapping[str, Any]) -> bool:
        """Whether exactly this was answered already."""
        return any(map(functools.partial(_answers, asked), self._records))

    def add(self, asked: Mapping[str, Any], answer: str) -> None:
        """Appends one answer, or puts it in the place of an earlier one."""
        others = [record for record in self._records if not _answers(asked, record)]
        appended = self._on_disk and len(others) == len(self._records)
        self._records = [*others, {**asked, ANSWER: answer}]
        if appended:
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write(_line(self._records[-1]))
            return
        # The first time all is written anew: a line that an earlier run left half written goes.
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._file) as partial:
            partial.write_text("".join(map(_line, self._records)), encoding="utf-8")
        self._on_disk = True


def _answers(asked: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """By the weights themselves; the folder that they were read from is told beside."""
    return {**asked, ANSWER: record[ANSWER], FOLDER: record.get(FOLDER)} == record


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _read(file: pathlib.Path) -> list[dict]:
    if not file.is_file():
        return []
    # What follows the last newline was being written when a run was killed.
    *lines, _ = file.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: not JSON: {error}") from None
        if not isinstance(record, dict) or ANSWER not in record:
            raise ValueError(f"{file}, line {number}: expected an object with {ANSWER!r}")
        records.append(record)
    return records
