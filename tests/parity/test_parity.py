"""Every row of the parity and the sabotage table, as tests. `make parity` prints the same rows."""

import pytest

from tests.parity.rows import all_cases, all_sabotage


def _params(rows):
    return [pytest.param(r, id=r.name, marks=[pytest.mark.slow] if r.slow else []) for r in rows]


@pytest.mark.parametrize("case", _params(all_cases()))
def test_parity(case):
    error = case.measure()
    assert error <= case.tolerance, f"{case.name}: {error:.2e} > {case.tolerance:.0e}"


@pytest.mark.parametrize("sabotage", _params(all_sabotage()))
def test_sabotage_is_noticed(sabotage):
    error = sabotage.measure()
    assert error >= 10 * sabotage.tolerance, f"{sabotage.name}: only {error:.2e}"
