"""Files that several processes of one folder write, and JSON files that cannot be read."""

import errno
import json
import os
import pathlib

import numpy as np
import pytest

from wemmu_jax import files
from wemmu_jax.data import features
from wemmu_jax.files import read_config, read_object, replacing, write_json
from wemmu_jax.models.sana.config import SanaConfig
from wemmu_jax.tiny.backbones import DIT_CONFIG


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    with pytest.raises(ZeroDivisionError), replacing(file) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert read_object(file) == {"a": 1} and list(tmp_path.iterdir()) == [file]


def test_two_processes_that_write_one_file(tmp_path, monkeypatch):
    """They may share even their id, each in a container of its own."""
    replace, file = os.replace, tmp_path / "a.json"

    def slow(source, target):
        monkeypatch.setattr(files.os, "replace", replace)
        write_json(file, {"by": "the other"})
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", slow)
    write_json(file, {"by": "this one"})
    assert read_object(file) == {"by": "this one"} and list(tmp_path.iterdir()) == [file]


class Slow(list):
    """Latents during whose writing another process writes the same part."""

    folder: pathlib.Path

    def __iter__(self):
        features.write_part(self.folder, 0, [1, 2], list(self[:]))
        return super().__iter__()


def test_two_processes_that_write_one_part_of_the_latents(tmp_path):
    features.start_features(tmp_path, {"model": "m", "parts": 1, "channels": 1, "ratio": 32})
    latents = Slow([np.full((1, 1, 1), value, np.float16) for value in (3, 4)])
    latents.folder = tmp_path
    features.write_part(tmp_path, 0, [1, 2], latents)
    assert features.finish_features(tmp_path, 1)
    assert (tmp_path / "parts/00000.bin").read_bytes() == np.float16([3, 4]).tobytes()
    names = sorted(path.name for path in tmp_path.rglob("*"))
    assert names == ["00000.bin", "00000.npy", "keys.npy", "meta.json", "parts", "places.npy"]
    assert len(features.Features(tmp_path)) == 2
    assert json.loads((tmp_path / "meta.json").read_text())["parts"] == 1


def test_storage_that_fails_for_the_moment_is_no_damaged_file(tmp_path, monkeypatch):
    def away(*_, **__):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(pathlib.Path, "read_text", away)
    with pytest.raises(OSError, match="Stale file handle"):
        read_object(tmp_path / "run.json")


def test_a_config_that_cannot_be_read_is_named(tmp_path):
    file = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match=r"config\.json: missing"):
        read_config(file, SanaConfig.from_hf)
    write_json(file, DIT_CONFIG | {"patch_size": 2})
    with pytest.raises(ValueError, match=r"config\.json: patch_size: expected 1, found 2"):
        read_config(file, SanaConfig.from_hf)
    write_json(file, DIT_CONFIG)
    assert read_config(file, SanaConfig.from_hf) == SanaConfig.from_hf(DIT_CONFIG)


def test_a_file_whose_name_is_as_long_as_a_name_may_be(tmp_path):
    file = tmp_path / ("a" * 255)
    write_json(file, {"a": 1})
    assert read_object(file) == {"a": 1}


def test_what_is_no_json(tmp_path):
    with pytest.raises(ValueError, match=r"expected JSON: .*directory"):
        read_object(tmp_path)
