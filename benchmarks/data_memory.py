"""Memory and opening time of an index of 25 million records, with eight workers that read from it.

    python -m benchmarks.data_memory

The index is synthesised: its columns are as large as a real one's, all its records are one small picture. Memory is
the proportional set size of this process and all that it started (`/proc/PID/smaps_rollup`): what they share, pages of
the index's files among them, counts once; and shared memory, in which micro-batches lie. Needs Linux, 3 GB of disk
and requirements-dev.txt.
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
from wemmu_jax.data.sources import IndexedSource
from wemmu_jax.data.tasks import Task
from wemmu_jax.files import write_json

MIXTURE = {Task.REC: 50.0, Task.T2I: 47.0, Task.UNCOND: 3.0}
GIB = 2**30


def main() -> None:
    """Prints seconds and memory."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, default=25_000_000)
    parser.add_argument("--workers", type=int, default=8)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        opened, before, after = measure(pathlib.Path(folder), args.records, args.workers)
    print(f"{args.records:,} records, {args.workers} workers")
    print(f"opened in {opened:.1f} s")
    print(f"memory of all processes {after / GIB:.2f} GiB, of them the imports {before / GIB:.2f}")


def measure(folder: pathlib.Path, records: int, workers: int) -> tuple[float, int, int]:
    """(seconds until the first micro-batch is planned, bytes before the index, bytes with all workers at work)."""
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
    grids = [encoder.config.source_grid(b.height, b.width) for b in data.buckets]
    encoder = encoder.sized(grids, multiple=128)
    data.maker = type(data.maker)(data.feeds, encoder.encode_example, encoder.text_length)
    read = data.iterate(0, workers=workers, prefetch=4)
    for _ in range(10):
        next(read)
    return opened, before, memory()


def synthesise(folder: pathlib.Path, records: int) -> None:
    """An index whose columns are those of `records` records, all of them one picture of changing size."""
    out = io.BytesIO()
    Image.new("RGB", (64, 64)).save(out, "JPEG")
    picture, key, text = out.getvalue(), b"00000/000000000", b"a caption of some words " * 8
    (folder / "0.bin").write_bytes(picture)
    target = folder / "index"
    target.mkdir()
    rng = np.random.default_rng(0)
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
                part["text_size"], part["key_size"] = len(text), len(key)
                part["pictures_at"] = np.arange(start, start + len(part))
            elif name == "pictures":
                part["size"], part["crc"] = len(picture), zlib.crc32(picture)
                part["height"] = part["width"] = 64
        column.flush()
    name = str(folder / "0.bin").encode()
    np.save(target / "names.npy", np.array([0, len(name)]))
    np.save(target / "stamps.npy", np.zeros(1, np.uint64))
    np.save(target / "units.npy", np.array([[records, 0]]))
    (target / "names.bin").write_bytes(name)
    (target / "texts.bin").write_bytes(key + text)
    (target / "problems.jsonl").touch()
    rows = dict.fromkeys(columns, records) | {"names": 2, "stamps": 1, "units": 1}
    write_json(target / "meta.json", {"version": index.VERSION, "rows": rows, "problems": 0})


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
