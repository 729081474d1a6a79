"""Our checkpoint of the frozen backbones: a folder of safetensors with an index, read whole or straight into shards.

FOLDER/wemmu.json                               format, version, fingerprint; written last
FOLDER/weights/index.json                       each leaf's file, dtype and shape; each file's size and sha256
FOLDER/weights/weights-00001-of-000NN.safetensors
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from wemmu_jax.conversion.memory import nest
from wemmu_jax.conversion.safetensors_io import (
    Spec,
    Stored,
    pack,
    read_header,
    sha256_of,
    write_file,
)
from wemmu_jax.conversion.staging import write_text

FORMAT = "wemmu-backbones"
VERSION = 1
_FILE_BYTES = 4_000_000_000  # a file of ours is no larger, unless it holds a single leaf that is

ShardingRule = Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding | None]


def write_weights(
    folder: Path, specs: Mapping[str, Spec], parts: Callable[[str], Iterable[np.ndarray]]
) -> None:
    """Writes `weights/` and `wemmu.json`, a leaf at a time.

    Args:
      folder: an existing folder; the caller sees to it that it is not the final one (see `staging`).
      specs: leaf path -> type and shape.
      parts: as in `safetensors_io.write_file`.
    """
    weights = folder / "weights"
    weights.mkdir()
    shards = pack(specs, _FILE_BYTES)
    index: dict[str, dict] = {"files": {}, "leaves": {}}
    for i, shard in enumerate(shards):
        file = weights / f"weights-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        digest = write_file(file, shard, parts, metadata={"format": FORMAT})
        index["files"][file.name] = {"bytes": file.stat().st_size, "sha256": digest}
        for path, spec in shard.items():
            leaf = {"file": file.name, "dtype": spec.dtype.name, "shape": list(spec.shape)}
            index["leaves"][path] = leaf
    text = json.dumps(index, indent=1) + "\n"
    write_text(weights / "index.json", text)
    front = {"format": FORMAT, "version": VERSION, "fingerprint": _fingerprint(text)}
    write_text(folder / "wemmu.json", json.dumps(front, indent=1) + "\n")


def _fingerprint(index: str) -> str:
    """What identifies the weights: the index holds the sha256 of every file, so its own sha256 covers them all."""
    return hashlib.sha256(index.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Weights:
    """An opened checkpoint of the backbones; nothing but headers is in memory.

    Attributes:
      folder: where it is; `vlm/` and `sana/` in it hold the configs, the tokenizer and the rest.
      fingerprint: the same for the same weights, converted anywhere.
    """

    folder: Path
    fingerprint: str
    _leaves: Mapping[str, Stored] = dataclasses.field(repr=False)
    _digests: Mapping[str, str] = dataclasses.field(repr=False)

    @classmethod
    def open(cls, folder: str | Path) -> "Weights":
        """Opens what `convert` wrote, and checks that all of it is there.

        Raises:
          FileNotFoundError: there are no weights, or a file of them is missing.
          ValueError: the folder is another format or version, is half a checkpoint, or was changed.
        """
        folder = Path(folder)
        fingerprint = _read_front(folder)
        index_file = folder / "weights" / "index.json"
        if not index_file.is_file():
            raise FileNotFoundError(f"{index_file}: missing; half a checkpoint, convert again")
        text = index_file.read_text(encoding="utf-8")
        if _fingerprint(text) != fingerprint:
            raise ValueError(
                f"{index_file}: sha256 {_fingerprint(text)}, wemmu.json expects {fingerprint}; it was "
                "changed, or the folder mixes two checkpoints"
            )
        index = json.loads(text)
        stored: dict[str, Stored] = {}
        for name, row in index["files"].items():
            file = index_file.parent / name
            _check_size(file, row["bytes"])
            stored |= read_header(file).tensors
        _check_leaves(index_file, index["leaves"], stored)
        digests = {name: row["sha256"] for name, row in index["files"].items()}
        return cls(folder, fingerprint, stored, digests)

    @functools.cached_property
    def specs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Every leaf's shape and dtype, by its whole path ('vlm/...', 'dit/...', 'dc_ae/...')."""
        return {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for path, leaf in self._leaves.items()
        }

    def map(self, path: str) -> np.ndarray:
        """One leaf as a read-only view of its file."""
        return self._leaves[path].map()

    def load(
        self, prefix: str, *, dtype: jnp.dtype | None = None, sharding: ShardingRule | None = None
    ) -> dict:
        """The leaves below `prefix` as a nested tree of jax arrays, without the prefix.

        Args:
          prefix: 'vlm', 'dit', 'dc_ae', or a longer path such as 'vlm/text'.
          dtype: what floating-point leaves are cast to; None leaves them as stored.
          sharding: called with a leaf's whole path and its spec (after the cast); where it gives a sharding, each
            host reads only the slices of its own devices. None, or a rule that gives None: the default device.

        Raises:
          ValueError: no leaf lies below `prefix`.
        """
        below = {path: leaf for path, leaf in self._leaves.items() if path.startswith(f"{prefix}/")}
        if not below:
            known = sorted({path.split("/")[0] for path in self._leaves})
            raise ValueError(f"{self.folder}: no weights below {prefix!r}; there are {known}")
        return nest(
            {
                path.removeprefix(f"{prefix}/"): load_stored(path, leaf, dtype, sharding)
                for path, leaf in below.items()
            }
        )

    def load_leaf(
        self, path: str, *, dtype: jnp.dtype | None = None, sharding: ShardingRule | None = None
    ) -> jax.Array:
        """One leaf by its whole path; the arguments as in `load`."""
        return load_stored(path, self._leaves[path], dtype, sharding)

    def verify(self) -> None:
        """Reads every file and compares its sha256.

        Raises:
          ValueError: names each file that is damaged.
        """
        damaged = [
            f"{self.folder / 'weights' / name}: sha256 {found}, expected {expected}"
            for name, expected in self._digests.items()
            if (found := sha256_of(self.folder / "weights" / name)) != expected
        ]
        if damaged:
            raise ValueError("damaged weights:\n  " + "\n  ".join(damaged))


def load_stored(
    path: str, leaf: Stored, dtype: jnp.dtype | None, sharding: ShardingRule | None
) -> jax.Array:
    """A tensor of a file on the devices; the arguments as in `Weights.load`."""
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    wanted = np.dtype(dtype) if dtype is not None and is_float else leaf.dtype
    placement = sharding and sharding(path, jax.ShapeDtypeStruct(leaf.shape, wanted))

    def read(index) -> np.ndarray:
        # A copy, because on CPU a jax array may otherwise go on living in the mapped file.
        return np.array(leaf.map()[index], wanted)

    if placement is None:
        return jnp.asarray(read(...))
    return jax.make_array_from_callback(leaf.shape, placement, read)


def _read_front(folder: Path) -> str:
    """Checks `wemmu.json` and gives its fingerprint."""
    file = folder / "wemmu.json"
    if not file.is_file():
        if (folder / "weights").is_dir():
            raise ValueError(
                f"{file}: missing, though there are weights; half a checkpoint, convert again"
            )
        raise FileNotFoundError(
            f"{folder}: no weights: there is no wemmu.json; expected a folder that `wemmu convert` wrote"
        )
    try:
        front = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(front, dict) or front.get("format") != FORMAT:
        raise ValueError(f"{file}: expected format {FORMAT!r}, found {front!r:.200}")
    if front.get("version") != VERSION:
        raise ValueError(
            f"{file}: this program reads version {VERSION}, found {front.get('version')!r}; convert "
            "again with this program, or use the one that wrote it"
        )
    return str(front.get("fingerprint"))


def _check_size(file: Path, expected: int) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing; the index names it")
    if file.stat().st_size != expected:
        raise ValueError(f"{file}: {file.stat().st_size} bytes, the index expects {expected}")


def _check_leaves(index_file: Path, rows: Mapping[str, dict], stored: Mapping[str, Stored]) -> None:
    """Every leaf of the index is stored where, and as, the index says; and no other."""
    said = {p: (row["file"], row["dtype"], tuple(row["shape"])) for p, row in rows.items()}
    found = {p: (leaf.file.name, leaf.dtype.name, leaf.shape) for p, leaf in stored.items()}
    wrong = sorted(p for p in said.keys() | found.keys() if said.get(p) != found.get(p))
    if wrong:
        lines = (f"{p}: {said.get(p)} in the index, {found.get(p)} in the files" for p in wrong)
        raise ValueError(f"{index_file}: does not fit its files:\n  " + "\n  ".join(lines))
