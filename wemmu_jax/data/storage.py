"""Files on a disk or in a bucket: which there are, and bytes of them at random.

A path is a local one or a URL that fsspec knows (`gs://...` needs gcsfs). Local files are opened for each read:
that takes ten microseconds, and a data set may have more shards than a process may have open files.
"""

import contextlib
import glob
import io
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Iterator
from typing import BinaryIO

import fsspec

from wemmu_jax.errors import passes

_READ_AHEAD = 2**20  # bytes of a remote file that is read from end to end
TRIES = 4  # of a remote read; a network fails for a moment, a disk does not
# Remote files of which this process has a copy for the time being, see `local_copy`.
_COPIES: dict[str, str] = {}

_BRACES = re.compile(r"\{([^{}]*)\}")


def is_remote(path: str) -> bool:
    """Whether fsspec reads it."""
    return "://" in path


def join(folder: str, name: str) -> str:
    """`name` inside `folder`; an absolute path or a URL as it is written.

    Raises:
      ValueError: it is empty or leads out of the folder.
    """
    if not name:
        raise ValueError(f"expected a path below {folder}, found an empty one")
    parts = pathlib.PurePosixPath(name)
    if parts.is_absolute() or is_remote(name):
        return name
    if ".." in parts.parts:
        raise ValueError(f"{name!r} leads out of its folder {folder}")
    # Of a bucket, unlike of a disk, `folder/./name` is another name; `.` has no parts.
    return "/".join((folder.rstrip("/"), *parts.parts))


def parent(path: str) -> str:
    """The folder that a file lies in."""
    return path.rpartition("/")[0] or ("/" if path.startswith("/") else ".")


def expand(patterns: str | list | tuple) -> list[str]:
    """The files that patterns name, in order.

    `{00000..01242}` and `{a,b}` name every file they spell, there or not, so that a missing shard is noticed; `*`,
    `?` and `[...]` name what is there. A local file whose own name has such signs is found by it.

    Raises:
      FileNotFoundError: a pattern with `*` matches nothing.
      ValueError: a file is named twice, or none is.
    """
    found = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for name in _spell(pattern):
            if not glob.has_magic(name) or (not is_remote(name) and os.path.exists(name)):
                found.append(name)
                continue
            matches = _glob(name)
            if not matches:
                hint = "; a [ that is part of a name is written [[]" * ("[" in name)
                raise FileNotFoundError(f"{name}: matches no file{hint}")
            found += matches
    if len(set(found)) != len(found):
        twice = next(name for name in found if found.count(name) > 1)
        raise ValueError(f"{twice}: named twice by {patterns!r}")
    if not found:
        raise ValueError("paths: expected at least one file, found none")
    return found


def stamp(path: str) -> tuple | None:
    """What changes when the file does: its size and its time or hash. None: there is no such file."""
    try:
        if not is_remote(path):
            status = os.stat(path)
            return status.st_size, status.st_mtime_ns
        system, name = _system(path)
        info = _patiently(path, system.info, name)
        changed = next((info[k] for k in ("etag", "md5Hash", "mtime", "created") if k in info), "")
        return info["size"], str(changed)
    except FileNotFoundError:
        return None


def size_of(path: str) -> int:
    """Bytes of a file.

    Raises:
      FileNotFoundError: there is none.
    """
    found = stamp(_COPIES.get(path, path))
    if found is None:
        raise FileNotFoundError(f"{path}: no such file")
    return found[0]


def read(path: str, offset: int = 0, size: int = -1) -> bytes:
    """Exactly `size` bytes from `offset` on; -1: all that follow.

    Raises:
      FileNotFoundError: there is no such file.
      OSError: the disk or the network fails.
      ValueError: it ends before that.
    """
    path = _COPIES.get(path, path)
    if is_remote(path):
        system, name = _system(path)
        end = None if size < 0 else offset + size
        data = _patiently(path, system.cat_file, name, start=offset, end=end)
    else:
        data = _read_local(path, offset, size)
    if size >= 0 and len(data) != size:
        raise ValueError(
            f"{path}: expected {size} bytes at {offset}, found {len(data)}: the file is cut"
        )
    return data


def open_file(path: str) -> BinaryIO:
    """The file, open for reading and seeking. Errors, of its reads as well, as those of `read`."""
    path = _COPIES.get(path, path)
    if not is_remote(path):
        return open(path, "rb")
    system, name = _system(path)
    file = _patiently(path, system.open, name, "rb")
    return io.BufferedReader(_RemoteFile(path, file), _READ_AHEAD)


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[None]:
    """While open, this process reads a remote file from a copy on its disk: to scan a shard is to read it from end
    to end, and a bucket answers one long read faster than ten thousand short ones."""
    if not is_remote(path) or path in _COPIES:
        yield
        return
    system, name = _system(path)
    with tempfile.NamedTemporaryFile() as copy:
        _patiently(path, system.get_file, name, copy.name)
        _COPIES[path] = copy.name
        try:
            yield
        finally:
            del _COPIES[path]


def _system(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        return fsspec.core.url_to_fs(path)
    except (
        ImportError,
        ValueError,
    ) as error:  # of a protocol that nobody knows, or whose package is not installed
        raise ValueError(f"{path}: cannot be opened: {error}") from error


def _read_local(path: str, offset: int, size: int) -> bytes:
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    try:
        if size < 0:
            size = os.fstat(file).st_size - offset
        parts = []
        while size > 0 and (part := os.pread(file, size, offset)):
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
    except OSError as error:  # of a descriptor, which has no name
        raise OSError(error.errno, error.strerror, path) from error
    finally:
        os.close(file)


class _RemoteFile(io.RawIOBase):
    """A file of fsspec, whose errors are ours."""

    def __init__(self, path: str, file: BinaryIO):
        self._path, self._file = path, file

    def readinto(self, buffer) -> int:
        data = _patiently(self._path, self._read_at, self._file.tell(), len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _read_at(self, place: int, size: int) -> bytes:
        self._file.seek(place)  # an attempt that failed may have moved it
        return self._file.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


def _patiently(path: str, function, *arguments, **options):
    """What `function` gives, tried again where the network fails; what it raises at last is an OSError that names the
    path, and a ConnectionError where the same may go well later."""
    for attempt in range(TRIES):
        try:
            return function(*arguments, **options)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file") from None
        except Exception as error:
            if attempt == TRIES - 1:
                kind = ConnectionError if _may_pass(error) else OSError
                raise kind(f"{path}: {error}") from error
            time.sleep(2.0**attempt)


def _may_pass(error: Exception) -> bool:
    """Clients of buckets have errors of their own, such as gcsfs's HttpError, with the status of the answer: of those
    that blame the request only a timeout and too many requests pass."""
    status = getattr(error, "code", None) or getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in (408, 429)
    return passes(error) or not isinstance(error, OSError | ValueError | TypeError | LookupError)


def _spell(pattern: str) -> list[str]:
    found = _BRACES.search(pattern)
    if not found:
        return [pattern]
    before, after = pattern[: found.start()], pattern[found.end() :]
    first, dots, last = found[1].partition("..")
    if dots and first.isdigit() and last.isdigit():
        if int(first) > int(last):
            raise ValueError(f"{pattern}: {found[0]} names no file: it counts down")
        choices = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    else:
        choices = found[1].split(",")
    return [name for choice in choices for name in _spell(before + choice + after)]


def _glob(pattern: str) -> list[str]:
    if not is_remote(pattern):
        return sorted(glob.glob(pattern, recursive=True))
    system, name = _system(pattern)
    found = _patiently(pattern, system.glob, name)
    return sorted(system.unstrip_protocol(match) for match in found)
