"""What the largest sets ask of a host."""

import hashlib
import re

import numpy as np
import pytest

from benchmarks import data_memory
from wemmu_jax.data import index as index_lib


@pytest.mark.slow
def test_twenty_five_million_records_and_eight_workers(tmp_path):
    opened, _, _, memory = data_memory.measure(tmp_path, 25_000_000, 8)
    assert opened < 10
    assert memory < 2 * data_memory.GIB


def mapped(folder):
    """Bytes of a file, or of a folder's files, in this process's memory."""
    size, ours = 0, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if re.match("[0-9a-f]+-", line):
                ours = str(folder) in line
            elif ours and line.startswith("Rss:"):
                size += 1024 * int(line.split()[1])
    return size


def test_what_hosts_compare_maps_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(index_lib, "_AT_ONCE", 1 << 15)
    data_memory.synthesise(tmp_path, 100_000)
    found = index_lib.Index(tmp_path / "index")
    assert found.key(12_345) == "00001/000012345" and found.text(1) != found.text(2)
    before = mapped(tmp_path)
    identity = found.identity
    assert mapped(tmp_path) - before < 1e6, "of 20 MB of texts and 6 MB of columns"
    assert mapped(tmp_path / "index/texts.bin") == 0, "nor does a text that is read"
    columns = {name: np.load(tmp_path / f"index/{name}.npy") for name in ("records", "pictures")}
    flags = [np.load(tmp_path / f"index/{name}.npy") for name in ("source_counts", "conversations")]
    pictures = [*flags, *(columns["pictures"][name] for name in ("crc", "size"))]
    first = hashlib.blake2b(b"".join(one.tobytes() for one in pictures), digest_size=16)
    assert found.picture_identity == f"100,000 records, {first.hexdigest()}"
    sizes = [columns["records"][name].tobytes() for name in ("text_size", "key_size")]
    texts = (tmp_path / "index/texts.bin").read_bytes()
    parts = [found.picture_identity.encode(), *sizes, texts]
    assert (
        identity
        == f"100,000 records, {hashlib.blake2b(b''.join(parts), digest_size=16).hexdigest()}"
    )
