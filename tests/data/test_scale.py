"""What the largest sets ask of a host."""

import pytest

from benchmarks import data_memory


@pytest.mark.slow
def test_twenty_five_million_records_and_eight_workers(tmp_path):
    opened, _, memory = data_memory.measure(tmp_path, 25_000_000, 8)
    assert opened < 10
    assert memory < 2 * data_memory.GIB
