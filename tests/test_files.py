"""JSON files that cannot be read."""

import errno
import pathlib

import pytest

from wemmu_jax.files import read_object


def test_storage_that_fails_for_the_moment_is_no_damaged_file(tmp_path, monkeypatch):
    def away(*_, **__):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(pathlib.Path, "read_text", away)
    with pytest.raises(OSError, match="Stale file handle"):
        read_object(tmp_path / "run.json")


def test_what_is_no_json(tmp_path):
    with pytest.raises(ValueError, match=r"expected JSON: .*directory"):
        read_object(tmp_path)
