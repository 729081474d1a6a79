"""Safetensors files, read a tensor at a time and written without holding them.

The format: 8 bytes little-endian length, a JSON header `{name: {dtype, shape, data_offsets}}`, the data. Because
the header comes first and holds only shapes, a file can be written as its tensors arrive, and a tensor in parts.
The library's own writer wants the whole file in memory, and its reader maps the whole file, which counts as this
process's memory; hence this module.
"""

import collections
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from wemmu_jax.files import replacing

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the reference implementation's own limit
_BLOCK = 32 << 20  # bytes written at a time


@dataclasses.dataclass(frozen=True)
class Spec:
    """Type and shape of a tensor."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Stored(Spec):
    """A tensor that lies in `file`, `offset` bytes from the file's start."""

    file: Path
    offset: int

    def read(self) -> np.ndarray:
        """The tensor in fresh memory."""
        array = np.fromfile(self.file, self.dtype, math.prod(self.shape), offset=self.offset)
        return array.reshape(self.shape)

    def map(self) -> np.ndarray:
        """The tensor as a read-only view of the file; only what is touched is read."""
        if self.nbytes == 0:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)


@dataclasses.dataclass(frozen=True)
class Header:
    """What the front of a file says: where each tensor lies, and the free-form strings."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """Reads and checks the header: every tensor inside the file, none overlapping, no byte left over.

    Raises:
      ValueError: the file is not a sound safetensors file; says what is wrong with it.
    """
    try:
        return _parse(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not a sound safetensors file: {error}") from None


def _parse(file: Path) -> Header:
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{size} bytes are too few for a header")
        length = int.from_bytes(prefix, "little")
        if length > min(_MAX_HEADER, size - 8):
            raise ValueError(
                f"the header claims {length} bytes; the file has {size - 8} after the length, "
                f"and {_MAX_HEADER} are the most allowed"
            )
        header = json.loads(stream.read(length), object_pairs_hook=_without_duplicates)
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ValueError("__metadata__ is not a JSON object")
    tensors = {name: _stored(name, row, file, 8 + length) for name, row in header.items()}
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            raise ValueError(f"tensor {name} begins at byte {tensor.offset}, expected {end}")
        end += tensor.nbytes
    if end != size:
        state = "truncated" if size < end else "longer than its tensors"
        raise ValueError(f"{state}: the header describes {end} bytes, the file has {size}")
    return Header(tensors, metadata)


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    twice = [name for name, n in collections.Counter(name for name, _ in pairs).items() if n > 1]
    if twice:
        raise ValueError(f"named twice in the header: {', '.join(twice)}")
    return dict(pairs)


def _stored(name: str, row: object, file: Path, data_start: int) -> Stored:
    """One row of the header, checked by itself."""
    if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name} has no dtype, shape and data_offsets")
    dtype = _DTYPES.get(row["dtype"]) if isinstance(row["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"tensor {name} has the unsupported dtype {row['dtype']!r}")
    shape, offsets = row["shape"], row["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name} has a bad shape or offsets: {shape}, {offsets}")
    stored = Stored(dtype, tuple(shape), file, data_start + offsets[0])
    if offsets[1] - offsets[0] != stored.nbytes:
        raise ValueError(
            f"tensor {name} ({row['dtype']} {tuple(shape)}) needs {stored.nbytes} bytes, "
            f"its offsets give {offsets[1] - offsets[0]}"
        )
    return stored


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def write_file(
    file: Path,
    specs: Mapping[str, Spec],
    parts: Callable[[str], Iterable[np.ndarray]],
    *,
    metadata: Mapping[str, str],
) -> str:
    """Writes a file as its tensors arrive, and syncs it to the disk.

    Args:
      file: where to.
      specs: every tensor that the file will hold.
      parts: gives a tensor's elements in C order as arrays of the spec's dtype, cut wherever suits the caller
        (a layer at a time, say); each is dropped before the next is asked for.
      metadata: strings for the header.

    Returns:
      The file's sha256 in hexadecimal.

    Raises:
      ValueError: `parts` gave another dtype or another number of bytes than `specs` says.
    """
    # Wide elements first, so that no tensor is misaligned behind an odd number of narrow ones.
    names = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
    digest = hashlib.sha256()
    with file.open("wb") as stream:

        def put(data) -> None:
            stream.write(data)
            digest.update(data)

        put(_front(names, specs, metadata))
        for name in names:
            written = 0
            for part in parts(name):
                if part.dtype != specs[name].dtype:
                    raise ValueError(f"{name}: expected {specs[name].dtype}, got {part.dtype}")
                written += _put_blocks(part, put)
                del part  # or it would still be held while the next one is read
            if written != specs[name].nbytes:
                raise ValueError(f"{name}: expected {specs[name].nbytes} bytes, got {written}")
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def _front(names: list[str], specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> bytes:
    """Length and header, padded with spaces so that the data starts on a multiple of 8 bytes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        spec = specs[name]
        if spec.dtype not in _NAMES:
            raise ValueError(f"{name}: safetensors cannot hold {spec.dtype}")
        end = offset + spec.nbytes
        header[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _put_blocks(array: np.ndarray, put: Callable[[memoryview], None]) -> int:
    """Puts the elements of `array` in C order, a few rows at a time: a transposed view is never copied whole."""
    array = array.reshape(1) if array.ndim == 0 else array
    rows = max(1, _BLOCK * len(array) // max(1, array.nbytes))
    for start in range(0, len(array), rows):
        block = np.ascontiguousarray(array[start : start + rows])
        # Through uint8, because the buffer protocol has no code for bfloat16.
        put(block.reshape(-1).view(np.uint8).data)
    return array.nbytes


def pack(specs: Mapping[str, Spec], limit: int) -> list[dict[str, Spec]]:
    """Cuts `specs`, in order, into files of at most `limit` bytes; a tensor larger than that gets its own file."""
    files: list[dict[str, Spec]] = []
    filled = limit
    for name, spec in specs.items():
        if not files or filled + spec.nbytes > limit:
            files.append({})
            filled = 0
        files[-1][name] = spec
        filled += spec.nbytes
    return files


def sha256_of(file: Path) -> str:
    """The file's sha256 in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def save_tensors(path: str | Path, flat: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Writes arrays as one safetensors file under our own leaf paths, e.g. 'expert/layers/...'.

    The file appears only when it is complete; one that was there before is replaced.

    Args:
      path: the file.
      flat: leaf path -> numpy or jax array; each is fetched from its device when its turn comes.
      metadata: strings for the header.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    specs = {name: Spec(np.dtype(array.dtype), tuple(array.shape)) for name, array in flat.items()}
    with replacing(path) as partial:
        write_file(partial, specs, lambda name: [np.asarray(flat[name])], metadata=metadata)
