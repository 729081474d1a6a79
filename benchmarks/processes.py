"""What this process and those that it started take."""

import os
import pathlib


def own_processes() -> set[int]:
    """This process's id and those of its descendants."""
    parents = {process: int(fields[1]) for process, fields in _all().items()}
    own, found = {os.getpid()}, True
    while found:
        found = {child for child, parent in parents.items() if parent in own} - own
        own |= found
    return own


def cpu_seconds() -> float:
    """Seconds of a core that they have taken so far, those that have ended left out."""
    fields, own = _all(), own_processes()
    ticks = sum(sum(map(int, fields[one][11:13])) for one in own if one in fields)
    return ticks / os.sysconf("SC_CLK_TCK")


def _all() -> dict[int, list[str]]:
    """Process -> the fields of its `stat` after its name."""
    found = {}
    for status in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            found[int(status.parent.name)] = status.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
    return found
