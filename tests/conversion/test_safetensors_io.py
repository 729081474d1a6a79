"""The file format: agreement with the safetensors library, and what malicious or broken files get."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tests.conversion.conftest import same_bits
from wemmu_jax.conversion import safetensors_io
from wemmu_jax.conversion.safetensors_io import Spec, pack, read_header, sha256_of, write_file

TENSORS = {
    "odd": np.arange(3).astype(ml_dtypes.bfloat16),
    "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
    "scalar": np.array(7, np.int64),
    "empty": np.zeros((0, 4), np.float16),
    "flags": np.array([True, False]),
}


def specs_of(tensors) -> dict[str, Spec]:
    return {name: Spec(array.dtype, array.shape) for name, array in tensors.items()}


def write_raw(file, header, data=b"", length=None):
    """A file with this header (an object, or the text itself) and data, whatever they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    file.write_bytes(size.to_bytes(8, "little") + text + data)
    return file


def test_library_reads_what_is_written(tmp_path):
    file = tmp_path / "a.safetensors"
    digest = write_file(file, specs_of(TENSORS), lambda n: [TENSORS[n]], metadata={"format": "pt"})
    found = safetensors.numpy.load_file(file)
    assert found.keys() == TENSORS.keys()
    assert all(same_bits(found[name], TENSORS[name]) for name in TENSORS)
    with safetensors.safe_open(file, "np") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert digest == sha256_of(file)


def test_reads_what_the_library_writes(tmp_path):
    file = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(TENSORS, file, metadata={"a": "b"})
    header = read_header(file)
    assert header.metadata == {"a": "b"}
    for name, array in TENSORS.items():
        assert same_bits(header.tensors[name].read(), array)
        assert same_bits(header.tensors[name].map(), array)


def test_parts_and_transposed_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_io, "_BLOCK", 64)  # several blocks a part, the last one short
    layers = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)
    file = tmp_path / "a.safetensors"
    spec = Spec(layers.dtype, (3, 7, 5))
    write_file(file, {"x": spec}, lambda _: (layer.T for layer in layers), metadata={})
    assert same_bits(read_header(file).tensors["x"].read(), layers.transpose(0, 2, 1).copy())


def test_every_tensor_is_aligned(tmp_path):
    file = tmp_path / "a.safetensors"
    write_file(file, specs_of(TENSORS), lambda n: [TENSORS[n]], metadata={})
    for stored in read_header(file).tensors.values():
        assert stored.offset % stored.dtype.itemsize == 0


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (np.zeros(3, np.float32), "expected float16, got float32"),
        (np.zeros(3, np.float16), "expected 8 bytes, got 6"),
    ],
)
def test_parts_must_fit_their_spec(tmp_path, part, message):
    with pytest.raises(ValueError, match=f"x: {message}"):
        spec = Spec(np.dtype(np.float16), (4,))
        write_file(tmp_path / "a", {"x": spec}, lambda _: [part], metadata={})


def test_pack_keeps_order_and_never_cuts():
    sizes = {"a": 3, "b": 4, "c": 20, "d": 1, "e": 9, "f": 1}
    specs = {name: Spec(np.dtype(np.int8), (size,)) for name, size in sizes.items()}
    assert [list(file) for file in pack(specs, 10)] == [["a", "b"], ["c"], ["d", "e"], ["f"]]


ROW = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
EIGHT = b"12345678"
BAD = {
    "claims 2 ** 63": (b"{}", b"", 1 << 63, "the header claims 9223372036854775808 bytes"),
    "longer than file": (b"{}", b"", 100, "the header claims 100 bytes"),
    "not json": (b"{", b"", None, "Expecting"),
    "deep": (b"[" * 200_000, b"", None, "not a sound safetensors file"),
    "not utf-8": (b'{"\xff": 1}', b"", None, "utf-8"),
    "list": (b"[]", b"", None, "not a JSON object"),
    "twice": (b'{"a": 1, "a": 2}', b"", None, "named twice in the header: a"),
    "no offsets": (
        {"a": {"dtype": "F32", "shape": [2]}},
        b"",
        None,
        "tensor a has no dtype, shape",
    ),
    "unknown dtype": (
        {"a": ROW | {"dtype": "F4"}},
        EIGHT,
        None,
        "tensor a has the unsupported dtype",
    ),
    "odd dtype": (
        {"a": ROW | {"dtype": ["F32"]}},
        EIGHT,
        None,
        "tensor a has the unsupported dtype",
    ),
    "negative": ({"a": ROW | {"shape": [-2]}}, EIGHT, None, "tensor a has a bad shape"),
    "fraction": ({"a": ROW | {"shape": [2.0]}}, EIGHT, None, "tensor a has a bad shape"),
    "huge": ({"a": ROW | {"shape": [1 << 62, 1 << 62]}}, EIGHT, None, "tensor a .* needs"),
    "backwards": ({"a": ROW | {"data_offsets": [8, 0]}}, EIGHT, None, "its offsets give -8"),
    "overlap": ({"a": ROW, "b": ROW}, EIGHT, None, "tensor b begins at byte .*, expected"),
    "hole": ({"a": ROW | {"data_offsets": [4, 12]}}, EIGHT * 2, None, "tensor a begins at byte"),
    "truncated": ({"a": ROW}, EIGHT[:5], None, "truncated: the header describes"),
    "left over": ({"a": ROW}, EIGHT + b"x", None, "longer than its tensors"),
    "metadata": ({"__metadata__": 3}, b"", None, "__metadata__ is not a JSON object"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_headers_are_refused(tmp_path, name):
    header, data, length, message = BAD[name]
    file = write_raw(tmp_path / "bad.safetensors", header, data, length)
    with pytest.raises(ValueError, match=f"bad.safetensors: .*{message}"):
        read_header(file)


@pytest.mark.parametrize("size", [0, 7])
def test_too_short_for_a_header(tmp_path, size):
    file = tmp_path / "bad.safetensors"
    file.write_bytes(b"\0" * size)
    with pytest.raises(ValueError, match=f"{size} bytes are too few"):
        read_header(file)
