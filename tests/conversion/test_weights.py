"""Reading a checkpoint of the backbones: whole, cast, into shards; and folders that are not one."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.conversion.conftest import edit_json, same_bits
from wemmu_jax.conversion.memory import flatten
from wemmu_jax.conversion.safetensors_io import Stored
from wemmu_jax.conversion.weights import Weights


@pytest.fixture
def damaged(checkpoint, tmp_path):
    """A copy of a checkpoint that a test may damage."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


def test_prefixes(checkpoint):
    weights = Weights.open(str(checkpoint))
    assert {path.split("/")[0] for path in weights.specs} == {"vlm", "dit", "dc_ae"}
    text = weights.load("vlm/text")
    whole = weights.load("vlm")["text"]
    assert jax.tree.structure(text) == jax.tree.structure(whole)
    with pytest.raises(
        ValueError, match=r"no weights below 'vl'; there are \['dc_ae', 'dit', 'vlm'\]"
    ):
        weights.load("vl")


def test_cast(checkpoint):
    weights = Weights.open(checkpoint)
    stored, cast = flatten(weights.load("dit")), flatten(weights.load("dit", dtype=jnp.float32))
    for path, array in stored.items():
        assert array.dtype == jnp.bfloat16
        assert same_bits(cast[path], np.asarray(array).astype(np.float32))


@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_sharded(checkpoint, dtype, monkeypatch):
    """Every leaf that can be cut is cut over four devices and repeated on two; only slices of it are read."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "data"))
    weights = Weights.open(checkpoint)
    asked = {}

    def rule(path, spec):
        asked[path] = spec
        if path.startswith("dit/proj"):
            return None
        axes = [None] * len(spec.shape)
        for axis in reversed(range(len(axes))):
            if spec.shape[axis] % 4 == 0:
                axes[axis] = "fsdp"
                break
        return NamedSharding(mesh, PartitionSpec(*axes))

    monkeypatch.setattr(Stored, "read", None)
    whole = flatten(weights.load("dit", dtype=dtype))
    sharded = flatten(weights.load("dit", dtype=dtype, sharding=rule))
    assert asked.keys() == {f"dit/{path}" for path in whole}
    cut = 0
    for path, array in sharded.items():
        spec = asked[f"dit/{path}"]
        assert (array.shape, array.dtype) == (spec.shape, spec.dtype)
        assert same_bits(array, whole[path])
        if (expected := rule(f"dit/{path}", spec)) is not None:
            assert array.sharding == expected
            cut += array.addressable_shards[0].data.size * 4 == array.size
    assert cut > 20


def test_verify_names_the_damaged_file(damaged):
    name = "weights-00001-of-00001.safetensors"
    with (damaged / "weights" / name).open("r+b") as stream:
        stream.seek(-1, 2)
        byte = stream.read(1)
        stream.seek(-1, 2)
        stream.write(bytes([byte[0] ^ 1]))
    weights = Weights.open(damaged)
    with pytest.raises(ValueError, match=f"damaged weights:\n.*{name}: sha256 .*, expected"):
        weights.verify()


def shorten(folder):
    file = next((folder / "weights").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])


def change_header(folder):
    """Another shape under the same size: the index and the file no longer tell the same story."""
    file = next((folder / "weights").glob("*.safetensors"))
    file.write_bytes(file.read_bytes().replace(b"[3,64,96]", b"[3,96,64]"))


BAD = {
    "no folder": (shutil.rmtree, FileNotFoundError, "no weights: there is no wemmu.json"),
    "empty folder": (
        lambda f: [shutil.rmtree(f), f.mkdir()],
        FileNotFoundError,
        "no weights: there is no wemmu.json; expected a folder that `wemmu convert` wrote",
    ),
    "a folder of the hub": (
        lambda f: [shutil.rmtree(f / "weights"), (f / "wemmu.json").unlink()],
        FileNotFoundError,
        "no weights",
    ),
    "half": (
        lambda f: (f / "wemmu.json").unlink(),
        ValueError,
        "wemmu.json: missing, though .* half",
    ),
    "no index": (
        lambda f: (f / "weights/index.json").unlink(),
        FileNotFoundError,
        "index.json: missing; half a checkpoint",
    ),
    "another index": (
        lambda f: edit_json(f / "weights/index.json", lambda i: i["leaves"].popitem()),
        ValueError,
        "index.json: sha256 .*, wemmu.json expects .* changed",
    ),
    "another format": (
        lambda f: edit_json(f / "wemmu.json", lambda w: w.update(format="else")),
        ValueError,
        "wemmu.json: expected format 'wemmu-backbones', found",
    ),
    "not an object": (
        lambda f: (f / "wemmu.json").write_text("3"),
        ValueError,
        "expected format 'wemmu-backbones', found 3",
    ),
    "not json": (
        lambda f: (f / "wemmu.json").write_text("{"),
        ValueError,
        "wemmu.json: cannot be read as JSON",
    ),
    "newer": (
        lambda f: edit_json(f / "wemmu.json", lambda w: w.update(version=2)),
        ValueError,
        "this program reads version 1, found 2",
    ),
    "missing file": (
        lambda f: next((f / "weights").glob("*.safetensors")).unlink(),
        FileNotFoundError,
        "weights-00001-of-00001.safetensors: missing; the index names it",
    ),
    "short file": (shorten, ValueError, r"safetensors: \d+ bytes, the index expects \d+"),
    "another header": (
        change_header,
        ValueError,
        r"does not fit its files:\n  vlm/text/layers/mlp/gate_proj/kernel: .*\(3, 64, 96\).* in the index",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folder(damaged, name):
    damage, kind, message = BAD[name]
    damage(damaged)
    with pytest.raises(kind, match=message):
        Weights.open(damaged)


def test_index_is_readable(checkpoint):
    index = json.loads((checkpoint / "weights" / "index.json").read_text())
    assert index["leaves"]["vlm/text/layers/mlp/gate_proj/kernel"] == {
        "file": "weights-00001-of-00001.safetensors",
        "dtype": "bfloat16",
        "shape": [3, 64, 96],
    }
    (file,) = index["files"].values()
    assert file["bytes"] > 300_000
    assert len(file["sha256"]) == 64
