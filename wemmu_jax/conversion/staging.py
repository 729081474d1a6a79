"""A folder appears whole or not at all."""

import contextlib
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Gives an empty folder beside `out`, which becomes `out` when the block ends without an exception.

    A process that dies inside the block leaves only `OUT.partial-HOST-PID`; the next run on the same host removes
    what dead processes left.

    Raises:
      FileExistsError: `out` exists and is not an empty folder.
    """
    check_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    mine = f"{out.name}.partial-{socket.gethostname()}-"
    for stale in out.parent.glob(f"{mine}*"):
        if _is_dead(stale.name.removeprefix(mine)):
            shutil.rmtree(stale)
    partial = out.parent / f"{mine}{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        sync_folders(partial)
        partial.rename(out)
        _sync(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_free(out: Path) -> None:
    """Raises FileExistsError if there is something at `out` already that a new folder cannot take the place of."""
    if out.is_dir() and (out.is_symlink() or os.path.ismount(out)):
        kind = "a link" if out.is_symlink() else "where a disk is mounted"
        raise FileExistsError(f"{out}: is {kind}; choose a new folder, which may lie in it")
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise FileExistsError(
            f"{out}: exists already; choose a new folder, or remove this one first"
        )


def write_text(file: Path, text: str) -> None:
    """Writes a small file and syncs it to the disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def copy_files(source: Path, names: Iterable[str], target: Path) -> None:
    """Copies files of the folder `source` into the folder `target` byte by byte, and syncs them to the disk."""
    for name in names:
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
        _sync(target / name)


def sync_folders(root: Path) -> None:
    """Syncs the entries of `root` and of all folders in it to the disk."""
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_dead(pid: str) -> bool:
    """Whether no other process has this id. Our own counts: in a restarted container ids come again."""
    if not pid.isdecimal():
        return False  # not a name of ours: leave it
    if int(pid) == os.getpid():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
