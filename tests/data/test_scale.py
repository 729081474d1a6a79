"""What the largest sets ask of a host."""

import pytest

from benchmarks import data_memory


@pytest.mark.slow
def test_twenty_five_million_records_and_eight_workers(tmp_path):
    opened, _, memory = data_memory.measure(tmp_path, 25_000_000, 8)
    assert opened < 10
    assert memory < 2 * data_memory.GIB


def test_the_measure_counts_processes_and_what_they_share(tmp_path):
    _, before, after = data_memory.measure(tmp_path, 10_000, 1)
    # A server and a worker with a tokenizer, which are more than nothing and less than two whole processes.
    assert 100 * 2**20 < after - before < 900 * 2**20
