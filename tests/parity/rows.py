"""Collects the rows of the parity table from the `cases_*` modules beside this file."""

import importlib
import pkgutil

from tests import parity
from tests.parity.harness import Case, Sabotage


def _modules():
    names = sorted(m.name for m in pkgutil.iter_modules(parity.__path__))
    return [importlib.import_module(f"tests.parity.{n}") for n in names if n.startswith("cases_")]


def all_cases() -> list[Case]:
    """Every parity row, in the order of the modules' names."""
    return [case for module in _modules() for case in module.cases()]


def all_sabotage() -> list[Sabotage]:
    """Every sabotage row."""
    return [row for module in _modules() for row in module.sabotage()]
