"""Every row of the parity and the sabotage table, as tests. `make parity` prints the same rows."""

import pytest

from tests.parity.harness import Case
from tests.parity.rows import modules, release


def _rows():
    for module in modules():
        for row in (*module.cases(), *module.sabotage()):
            marks = [pytest.mark.slow] if row.slow else []
            yield pytest.param((module, row), id=row.name, marks=marks)


@pytest.fixture(scope="module")
def shared_models():
    """Which module's models are in memory: those of the one before are let go."""
    held = []

    def hold(module):
        if held and held[-1] is not module:
            release(held[-1])
        held.append(module)

    yield hold
    if held:
        release(held[-1])


@pytest.mark.parametrize("where", _rows())
def test_row(where, shared_models):
    module, row = where
    shared_models(module)
    error = row.measure()
    if isinstance(row, Case):
        assert error <= row.tolerance, f"{row.name}: {error:.2e} > {row.tolerance:.0e}"
    else:
        assert error >= 10 * row.tolerance, f"{row.name}: the break shows only {error:.2e}"
