"""Files written in one step, and JSON in them, read with errors that name them."""

import contextlib
import json
import os
import pathlib
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from wemmu_jax.errors import passes

Config = TypeVar("Config")


def check_local(path: str | pathlib.Path, *, name: str) -> None:
    """Raises ValueError, which calls it `name`, if a path is a URL. To pathlib `gs://b/run` is the folder `run` in `b`
    in `gs:`, which it would make here."""
    if re.match(r"[a-zA-Z][\w+.-]+:/", str(path)):
        raise ValueError(
            f"{name} {path}: expected a local path; of a bucket, one below the folder where it is mounted"
        )


def read_object(file: str | pathlib.Path, *, keys: Sequence[str] = ()) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: it holds something else, or lacks one of `keys`; names the file.
      OSError: storage failed for the moment.
    """
    try:
        value = json.loads(pathlib.Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: missing") from None
    except (ValueError, RecursionError, OSError) as error:
        if passes(error):
            raise
        raise ValueError(f"{file}: expected JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(value).__name__}")
    if missing := [key for key in keys if key not in value]:
        raise ValueError(f"{file}: damaged: found an object without {', '.join(missing)}")
    return value


def read_config(file: str | pathlib.Path, parse: Callable[[dict[str, Any]], Config]) -> Config:
    """What `parse` makes of the JSON object in a file.

    Raises:
      FileNotFoundError, OSError: as `read_object`.
      ValueError: as `read_object` and `parse`; names the file.
    """
    value = read_object(file)
    try:
        return parse(value)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Where to write what takes the place of `path`, in one step, when the block ends; gone if it fails.

    The name is nobody else's: hosts share folders, and in containers of their own they share process ids too. Nor is it
    longer for a `path` whose name is as long as a name may be.
    """
    partial = path.with_name(f".partial-{uuid.uuid4()}")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: pathlib.Path, value: dict) -> None:
    """Writes a file in one step, so that it is never seen half there."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=2, default=str) + "\n")
