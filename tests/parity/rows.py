"""Collects the rows of the parity table from the `cases_*` modules beside this file."""

import gc
import importlib
import pkgutil
from types import ModuleType

from tests import parity


def modules() -> list[ModuleType]:
    """The modules that hold rows, by name: each has `cases()` and `sabotage()`."""
    names = sorted(m.name for m in pkgutil.iter_modules(parity.__path__))
    return [importlib.import_module(f"tests.parity.{n}") for n in names if n.startswith("cases_")]


def release(module: ModuleType) -> None:
    """Lets go of the models that a module's rows share: those of real width take gigabytes together."""
    for value in vars(module).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    gc.collect()
