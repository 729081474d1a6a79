"""Memory and opening time of an index of 25 million records, with eight workers that read from it.

    python -m benchmarks.data_memory

The index is synthesised: its columns are as large as a real one's, every record has a key and a text of its own, and
all are one small picture. What several hosts compare before they train is computed too. Memory is the proportional set
size of this process and all that it started (`/proc/PID/smaps_rollup`): what they share, pages of the index's files
among them, counts once; and shared memory, in which micro-batches lie. Needs Linux, 8 GB of disk and
requirements-dev.txt.
"""

import argparse
import io
import pathlib
import tempfile
import time
import zlib

import numpy as np
from PIL import Image

from benchmarks.processes import own_processes
from wemmu_jax.data import index
from wemmu_jax.data.buckets import make_buckets
from wemmu_jax.data.formats.tar import Webdataset
from wemmu_jax.data.pipeline import MicroBatches
from wemmu_jax.data.pools import Feed
from wemmu_jax.data.records import identity
from wemmu_jax.data.sources import IndexedSource
from wemmu_jax.data.tasks import Task
from wemmu_jax.files import write_json

MIXTURE = {Task.REC: 50.0, Task.T2I: 47.0, Task.UNCOND: 3.0}
GIB = 2**30
WORDS = (
    b"another between bicycle bridges chicken country evening flowers "
    b"glasses horizon kitchen morning mounted outside picture shadows "
)
WORDS_OF_A_TEXT = 24


def main() -> None:
    """Prints seconds and memory."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, default=25_000_000)
    parser.add_argument("--workers", type=int, default=8)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        opened, compared, before, after = measure(pathlib.Path(folder), args.records, args.workers)
    print(f"{args.records:,} records, {args.workers} workers")
    print(f"opened in {opened:.1f} s, and what hosts compare computed in {compared:.1f} s")
    print(f"memory of all processes {after / GIB:.2f} GiB, of them the imports {before / GIB:.2f}")


def measure(folder: pathlib.Path, records: int, workers: int) -> tuple[float, float, int, int]:
    """(seconds until the first micro-batch is planned, seconds until the set's identity is known, bytes before the
    index, bytes with all workers at work)."""
    from benchmarks.data_pipeline import Bench

    encoder = Bench.make(folder, 512, 1).encoder
    synthesise(folder, records)
    before = memory()
    start = time.perf_counter()
    source = IndexedSource(Webdataset(f"{folder}/0.bin"), index.Index(folder / "index"))
    data = MicroBatches(
        feeds=[Feed("cc12m", task, source) for task in MIXTURE],
        mixture=MIXTURE,
        buckets=make_buckets(512, multiple=32),
        rows=8,
        seed=0,
        encode_row=lambda *_: None,
        text_length=len,
    )
    data.plan(0)
    opened = time.perf_counter() - start
    start = time.perf_counter()
    identity(source)
    compared = time.perf_counter() - start
    grids = [encoder.config.source_grid(b.height, b.width) for b in data.buckets]
    encoder = encoder.sized(grids, multiple=128)
    data.maker = type(data.maker)(data.feeds, encoder.encode_example, encoder.text_length)
    read = data.iterate(0, workers=workers, prefetch=4)
    for _ in range(10):
        next(read)
    return opened, compared, before, memory()


def synthesise(folder: pathlib.Path, records: int) -> None:
    """An index whose columns are those of `records` records, all of them one picture of changing size."""
    out = io.BytesIO()
    Image.new("RGB", (64, 64)).save(out, "JPEG")
    picture = out.getvalue()
    (folder / "0.bin").write_bytes(picture)
    target = folder / "index"
    target.mkdir()
    rng = np.random.default_rng(0)
    key_size, text_size = _write_texts(target / "texts.bin", records, rng)
    columns = {
        "sizes": (np.int32, (2,)),
        "source_counts": (np.uint8, ()),
        "conversations": (bool, ()),
        "records": (index.RECORD, ()),
        "pictures": (index.PICTURE, ()),
    }
    for name, (dtype, shape) in columns.items():
        column = np.lib.format.open_memmap(
            target / f"{name}.npy", mode="w+", dtype=dtype, shape=(records, *shape)
        )
        for start in range(0, records, 1 << 20):
            part = column[start : start + (1 << 20)]
            if name == "sizes":
                part[:] = rng.integers(256, 1024, part.shape)
            elif name == "records":
                part["text_size"], part["key_size"] = text_size, key_size
                part["pictures_at"] = np.arange(start, start + len(part))
                part["text_at"] = part["pictures_at"] * np.uint64(key_size + text_size)
            elif name == "pictures":
                part["size"], part["crc"] = len(picture), zlib.crc32(picture)
                part["height"] = part["width"] = 64
        column.flush()
    name = str(folder / "0.bin").encode()
    np.save(target / "names.npy", np.array([0, len(name)]))
    np.save(target / "stamps.npy", np.zeros(1, np.uint64))
    np.save(target / "units.npy", np.array([[records, 0]]))
    (target / "names.bin").write_bytes(name)
    (target / "problems.jsonl").touch()
    rows = dict.fromkeys(columns, records) | {"names": 2, "stamps": 1, "units": 1}
    write_json(target / "meta.json", {"version": index.VERSION, "rows": rows, "problems": 0})


def _write_texts(file: pathlib.Path, records: int, rng: np.random.Generator) -> tuple[int, int]:
    """Keys `00012/000123456` and texts, each after the other; their sizes."""
    words = np.frombuffer(WORDS, np.uint8).reshape(-1, 8)
    template = np.frombuffer(b"00000/000000000", np.uint8)
    with file.open("wb") as out:
        for start in range(0, records, 1 << 18):
            numbers = np.arange(start, min(start + (1 << 18), records))
            keys = np.repeat(template[None], len(numbers), axis=0)
            for first, digits, values in ((0, 5, numbers // 10_000), (6, 9, numbers)):
                for digit in range(digits):
                    keys[:, first + digit] += (values // 10 ** (digits - 1 - digit) % 10).astype(
                        np.uint8
                    )
            chosen = rng.integers(0, len(words), (len(numbers), WORDS_OF_A_TEXT), np.uint8)
            texts = words[chosen].reshape(len(numbers), -1)
            out.write(np.concatenate([keys, texts], axis=1).tobytes())
    return keys.shape[1], texts.shape[1]


def memory() -> int:
    """Proportional set size of this process and its descendants, bytes."""
    return sum(map(_share, own_processes())) + _micro_batches()


def _micro_batches() -> int:
    """What micro-batches take, which no process need have mapped: all of this machine's shared memory."""
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("Shmem:")).split()[1])


def _share(process: int) -> int:
    try:
        lines = pathlib.Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * int(next(line for line in lines if line.startswith("Pss:")).split()[1])


if __name__ == "__main__":
    main()
