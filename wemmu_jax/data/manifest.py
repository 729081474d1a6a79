"""What files were made from, written beside them: whoever goes on with them goes on with the same, or is told."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from wemmu_jax.files import read_object, write_json


def go_on(file: pathlib.Path, made_from: Mapping[str, Any], *, made: str) -> None:
    """Writes a manifest before the first of its files is made; later sees that they would be made from the same.

    Args:
      file: the manifest; its folder is made.
      made_from: JSON values.
      made: a pattern of the files that it speaks of, relative to its folder.

    Raises:
      ValueError: the files were made from something else, or nobody knows from what; names what differs.
    """
    wanted = json.loads(json.dumps(made_from))
    advice = "choose another folder or delete these files"
    # Looked for first: whoever makes files has written the manifest before.
    there = sorted(file.parent.glob(made))
    if not file.exists():
        if there:
            raise ValueError(
                f"{there[0]} is there, but not {file.name}, which says what it was made from: {advice}"
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, wanted)
    found = read_object(file)  # of another process, if that was faster
    if found != wanted:
        other = [
            f"\n  {key}: there {found.get(key)!r}, now {wanted.get(key)!r}"
            for key in sorted({*found, *wanted})
            if found.get(key) != wanted.get(key)
        ]
        raise ValueError(
            f"{file.parent / made} were made from something else, as {file.name} says: {advice}{''.join(other)}"
        )
