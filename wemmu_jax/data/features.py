"""DC-AE latents that were computed beforehand, found by the picture that they were computed from.

A folder of parts, each a file of values and a sorted column of keys, and one sorted column over all of them that
workers map into memory. A key is the picture's checksum in the index, its bytes and the size at which the DC-AE read
it; so the same latents serve every data set, task and stage of a resolution, and a picture that changed finds none
once its index is renewed.

    meta.json            which DC-AE, of which pictures, how many parts
    parts/00000.npy      PART[n], sorted by key
    parts/00000.bin      float16 values, latents one after the other
    keys.npy, places.npy made of the parts when all are there
"""

import pathlib
import zlib
from collections.abc import Sequence

import numpy as np

from wemmu_jax.data import storage
from wemmu_jax.data.manifest import go_on
from wemmu_jax.data.records import Picture
from wemmu_jax.files import read_object, replacing

DTYPE = np.dtype(np.float16)  # the latents' own spread is 1: rounded by 2**-11 of it
PART = np.dtype([("key", "<u8"), ("at", "<u8"), ("size", "<u4")])
_PLACE = np.dtype([("at", "<u8"), ("size", "<u4"), ("part", "<u4")])


def feature_key(picture: Picture, height: int, width: int) -> int:
    """The key of a picture's latents at a size in pixels.

    Raises:
      ValueError: the picture is drawn, not stored.
    """
    if picture.identity is None:
        raise ValueError("a picture that is drawn anew each time has no cached latents")
    crc, *rest = picture.identity
    return crc << 32 | zlib.crc32(f"{rest} {height} {width}".encode())


class Features:
    """Reads latents. Pickled, it is the folder's name."""

    def __init__(self, folder: str | pathlib.Path, *, model: str | None = None):
        """`model`: the fingerprint of the weights that will use them.

        Raises:
          FileNotFoundError: there is no such folder.
          ValueError: it is not finished, or of other weights.
        """
        self.folder = pathlib.Path(folder)
        meta = read_object(self.folder / "meta.json", keys=("model", "parts", "channels", "ratio"))
        if model is not None and meta["model"] != model:
            raise ValueError(
                f"{folder}: latents of the weights {meta['model'][:12]}, but these are {model[:12]}: encode again"
            )
        self._channels, self._ratio = meta["channels"], meta["ratio"]
        if not (self.folder / "keys.npy").exists():
            there = len(list((self.folder / "parts").glob("*.npy")))
            raise ValueError(
                f"{folder}: {there} of {meta['parts']} parts are there: let `wemmu data encode` finish"
            )
        self._keys = np.load(self.folder / "keys.npy", mmap_mode="r")
        self._places = np.load(self.folder / "places.npy", mmap_mode="r")

    def __reduce__(self):
        return Features, (self.folder,)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: int) -> bool:
        at = int(np.searchsorted(self._keys, np.uint64(key)))
        return at < len(self._keys) and int(self._keys[at]) == key

    def latents(self, picture: Picture, height: int, width: int) -> np.ndarray:
        """float16[h, w, C] of a picture that the DC-AE read at height x width pixels.

        Raises:
          ValueError: there are none, or fewer bytes than they take.
        """
        key = feature_key(picture, height, width)
        at = int(np.searchsorted(self._keys, np.uint64(key)))
        if at == len(self._keys) or int(self._keys[at]) != key:
            raise ValueError(
                f"{self.folder}: no latents of this picture at {height} x {width}: it changed since, or "
                "`wemmu data encode` ran with other data"
            )
        start, size, part = self._places[at].item()
        data = storage.read(str(self.folder / f"parts/{part:05}.bin"), start, size)
        shape = (height // self._ratio, width // self._ratio, self._channels)
        if size != np.prod(shape) * DTYPE.itemsize:
            raise ValueError(f"{self.folder}, part {part}: expected {shape}, found {size} bytes")
        return np.frombuffer(data, DTYPE).reshape(shape)


def start_features(folder: pathlib.Path, meta: dict) -> None:
    """Writes `meta.json`, or sees that it is the same.

    Raises:
      ValueError: the folder holds other latents.
    """
    go_on(folder / "meta.json", meta, made="parts/*.npy")
    (folder / "parts").mkdir(exist_ok=True)


def part_is_there(folder: pathlib.Path, part: int) -> bool:
    """Whether a part is finished."""
    return (folder / f"parts/{part:05}.npy").exists()


def write_part(
    folder: pathlib.Path, part: int, keys: Sequence[int], latents: Sequence[np.ndarray]
) -> None:
    """Writes a part; its column of keys last, so that a part is there or is not."""
    name = folder / f"parts/{part:05}"
    rows, at = [], 0
    with replacing(name.with_suffix(".bin")) as partial, partial.open("wb") as values:
        for key, array in zip(keys, latents, strict=True):
            data = np.ascontiguousarray(array, DTYPE).tobytes()
            values.write(data)
            rows.append((key, at, len(data)))
            at += len(data)
    with replacing(name.with_suffix(".npy")) as partial, partial.open("wb") as column:
        np.save(column, np.sort(np.array(rows, PART), order="key"))


def finish_features(folder: pathlib.Path, parts: int) -> bool:
    """Joins the parts' keys once all are there; whether they are."""
    if not all(part_is_there(folder, part) for part in range(parts)):
        return False
    columns = [np.load(folder / f"parts/{part:05}.npy") for part in range(parts)]
    keys = np.concatenate([column["key"] for column in columns] or [np.zeros(0, np.uint64)])
    places = np.zeros(len(keys), _PLACE)
    places["part"] = np.repeat(np.arange(parts), [len(column) for column in columns])
    for name in ("at", "size"):
        places[name] = np.concatenate([column[name] for column in columns] or [np.zeros(0)])
    order = np.argsort(keys, kind="stable")
    for name, column in (("places", places[order]), ("keys", keys[order])):
        with replacing(folder / f"{name}.npy") as partial, partial.open("wb") as file:
            np.save(file, column)
    return True
