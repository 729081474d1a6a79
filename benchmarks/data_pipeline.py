"""From tar to device-ready arrays: this pipeline, torch's DataLoader with webdataset and the HF processor, and the bare
decoding and resizing that both rest on; in one run, in turns.

    python -m benchmarks.data_pipeline                         # 512 and 1024 px, two processes each
    python -m benchmarks.data_pipeline --pictures 32 --rows 32 --rounds 1 --sizes 512      # is it whole?

Both give the same tensors, which is checked first: prompt ids, the ViT's patches, the DC-AE's sources and targets.
Ours come as the device wants them: the ViT's pixels as bytes, which a program on the device cuts into patches and
packs; the line `+ patches on the host` has that done here as well, where the peer does it too. Rows are stage 1's, Rec
50, T2I 47, Uncond 3, and then edits, of which each decodes a source and a target. Pictures are photographs of 1.5 times
the bucket's sides as JPEG of quality 90, with texts of sixty words. Needs requirements-dev.txt.

Rates are rows a second by the clock, which other jobs slow, and milliseconds of a core for each row, by all processes,
which they disturb less.
"""

import argparse
import dataclasses
import functools
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from benchmarks import torch_pipeline
from benchmarks.processes import cpu_seconds
from benchmarks.torch_pipeline import TEXT_LENGTH, Tools, pillow_cover
from wemmu_jax.data.buckets import Bucket
from wemmu_jax.data.index import Found
from wemmu_jax.data.pictures import cover, open_picture
from wemmu_jax.data.pipeline import MicroBatches
from wemmu_jax.data.prompts import RECONSTRUCTION_PROMPT
from wemmu_jax.data.sources import build_feeds
from wemmu_jax.data.tasks import Task
from wemmu_jax.data.workers import keep_memory
from wemmu_jax.models.qwen2_5_vl.images import MEAN, STD, pack_images, patchify
from wemmu_jax.models.qwen2_5_vl.prompt import PromptEncoder
from wemmu_jax.models.wemmu.config import BridgeConfig
from wemmu_jax.models.wemmu.inputs import RowEncoder
from wemmu_jax.models.wemmu.published import published_wemmu

MIXTURES = {
    "stage 1": {Task.REC: 50.0, Task.T2I: 47.0, Task.UNCOND: 3.0},
    "edits": {Task.S_EDIT: 1.0},
}
# What the peer's batches hold in turns; Uncond counts as T2I, it has no caption to read.
PEER_TURNS = {"stage 1": [Task.REC, Task.T2I], "edits": [Task.S_EDIT]}
# Resolution, samples of the stage, the chip-hours that its FLOPs take on v5p at 50% MFU, and the part of its rows that
# are edits; the others are taken as stage 1's.
STAGES = {"stage 1": (512, 79.4e6, 1343.0, 0.0), "stage 3": (1024, 19.9e6, 1720.0, 0.5)}
ROWS = 32  # of a micro-batch
CHIPS, CHIPS_A_HOST = 128, 4
BARE, OURS, PEER = "bare decode + resize", "wemmu", "DataLoader + webdataset + HF"
WORDS = "a photograph of some red barn by the sea under clouds with birds"


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--pictures", type=int, default=256, help="in the tar")
    parser.add_argument("--rows", type=int, default=256, help="measured a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {args.processes} processes")
    rates = {}
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["WEMMU_INDEX"] = f"{folder}/index"
            bench = Bench.make(pathlib.Path(folder), size, args.pictures)
            for kind in MIXTURES:
                rates[size, kind] = measure(bench, kind, args)
            print_parts(bench)
    print_needs(rates)


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all of them read, and how they tokenise.

    Attributes:
      folder: `captions.tar` and `edits.tar`, whose samples are `jpg`, `txt` and `source.jpg`; `edits.json`; `vlm`.
      bucket: of all rows.
      encoder: of ours.
    """

    folder: pathlib.Path
    bucket: Bucket
    encoder: RowEncoder

    @classmethod
    def make(cls, folder: pathlib.Path, size: int, pictures: int) -> "Bench":
        """Writes the tars and the tokenizer."""
        import webdataset

        from tests.models import qwen_vocabulary
        from wemmu_jax.demo.photographs import random_crops

        rng = np.random.default_rng(0)
        side, edits = size * 3 // 2, []
        with (
            webdataset.TarWriter(f"{folder}/captions.tar") as captioned,
            webdataset.TarWriter(f"{folder}/edits.tar") as edited,
        ):
            for number in range(pictures):
                target, source = map(_jpeg, random_crops(rng, 2, (side, side)))
                key, text = f"{number:06}", " ".join(rng.choice(WORDS.split(), 60))
                sample = {"__key__": key, "jpg": target, "txt": text}
                captioned.write(sample)
                edited.write({**sample, "source.jpg": source})
                one = {"input_prompt": text, "output_image": f"{key}.jpg"}
                edits.append({**one, "input_image": [f"{key}.source.jpg"]})
        (folder / "edits.json").write_text(json.dumps(edits))
        qwen_vocabulary.write_tokenizer(folder / "vlm")
        qwen_vocabulary.small_config().save_pretrained(folder / "vlm")
        config = published_wemmu(BridgeConfig())
        encoder = RowEncoder(
            config, PromptEncoder.load(folder / "vlm"), MEAN, STD, (3136, 12845056)
        )
        encoder = encoder.sized([config.source_grid(size, size)], multiple=128)
        return cls(folder, Bucket(size, size), encoder)

    @property
    def target_size(self) -> tuple[int, int]:
        """Of the picture to be drawn."""
        return self.bucket.height, self.bucket.width

    @property
    def source_sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """What the ViT and what the DC-AE reads of a source."""
        grid = self.encoder.config.source_grid(self.bucket.height, self.bucket.width)
        return self.encoder.source_sizes(grid)

    @property
    def tools(self) -> Tools:
        """The peer's."""
        return Tools.load(self.folder / "vlm", self.bucket, *self.source_sizes)

    def data(self, mixture: dict[Task, float], **changes) -> MicroBatches:
        """Our pipeline over the tars."""
        captions = {"name": "captions", "tasks": ["Rec", "T2I", "Uncond"], "type": "webdataset"}
        edits = {"name": "edits", "tasks": ["S-Edit"], "type": "io-json"}
        listed = {"file": f"{self.folder}/edits.json", "archives": f"{self.folder}/edits.tar"}
        settings = {
            "feeds": build_feeds(
                [{**captions, "paths": f"{self.folder}/captions.tar"}, edits | listed]
            ),
            "mixture": mixture,
            "buckets": [self.bucket],
            "rows": ROWS,
            "seed": 0,
            "encode_row": self.encoder.encode_example,
            "text_length": self.encoder.text_length,
            "text_lengths": (TEXT_LENGTH,),
        }
        return MicroBatches(**settings | changes)


def _jpeg(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=90)
    return out.getvalue()


# -- the three


def ours(bench: Bench, kind: str, processes: int, *, patches: bool = False) -> Iterator[int]:
    """Rows of each micro-batch of this pipeline."""
    encode = PatchesToo(bench.encoder) if patches else bench.encoder.encode_example
    data = bench.data(MIXTURES[kind], encode_row=encode)
    for micro_batch in data.iterate(0, workers=processes, prefetch=4):
        yield len(micro_batch.keys)


@dataclasses.dataclass(frozen=True)
class PatchesToo:
    """`encode_row` that cuts and packs on the host what the device would."""

    encoder: RowEncoder

    def __call__(self, example, bucket, length):
        row = self.encoder.encode_example(example, bucket, length)
        if "vit_pixels" in row:
            row["patches"] = self.encoder.pack(list(row.pop("vit_pixels"))).patches
        return row


def peer(bench: Bench, kind: str, processes: int) -> Iterator[int]:
    """Rows of each batch of the peer."""
    tars = dict.fromkeys(Task, f"{bench.folder}/captions.tar")
    tars[Task.S_EDIT] = f"{bench.folder}/edits.tar"
    how = {"rows": ROWS, "processes": processes}
    yield from torch_pipeline.batches(bench.tools, tars, PEER_TURNS[kind], **how)


def bare(bench: Bench, kind: str, processes: int, resize: Callable) -> Iterator[int]:
    """Rows whose pictures were read, decoded and resized as both do, and thrown away."""
    feeds = {feed.task: feed.source for feed in bench.data(MIXTURES["edits"]).feeds}
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, _remember, (feeds, resize)) as pool:
        for _ in pool.imap(_decode, bare_jobs(bench, kind, len(feeds[Task.T2I])), chunksize=4):
            yield 1


def bare_jobs(bench: Bench, kind: str, records: int) -> Iterator[tuple]:
    """(task, record, the sizes that are wanted of each of its pictures) of each row."""
    target = bench.target_size
    wanted = {
        Task.T2I: ((target,),),
        Task.REC: ((target, *bench.source_sizes),),
        Task.S_EDIT: ((target,), bench.source_sizes),
    }
    for number in itertools.count():
        for task in PEER_TURNS[kind]:
            yield task, number % records, wanted[task]


_feeds, _resize = None, None


def _remember(feeds, resize) -> None:
    global _feeds, _resize
    _feeds, _resize = feeds, resize
    keep_memory()


def _decode(job: tuple) -> None:
    task, number, wanted = job
    source = _feeds[task]
    for found, sizes in zip(source.index.pictures(number), wanted, strict=True):
        image = _open(source, found)
        for size in sizes:
            _resize(image, *size)


def _open(source, found: Found) -> Image.Image:
    place = found.place
    return open_picture(source.format.read(place.path, place.at, place.size), name=place.path)


# -- measuring


def measure(bench: Bench, kind: str, args: argparse.Namespace) -> float:
    """Prints rates in turns; returns ours, rows a second and core."""
    for task in set(PEER_TURNS[kind]) - {Task.T2I}:
        check(bench, task)
    runs: dict[str, Callable[[], Iterator[int]]] = {
        BARE: functools.partial(bare, bench, kind, args.processes, cover),
        "the same by Pillow": functools.partial(bare, bench, kind, args.processes, pillow_cover),
        OURS: functools.partial(ours, bench, kind, args.processes),
        "wemmu + patches on the host": functools.partial(
            ours, bench, kind, args.processes, patches=True
        ),
        PEER: functools.partial(peer, bench, kind, args.processes),
    }
    found = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, start in runs.items():
            found[name].append(rate(start(), args.rows))
    title = f"{bench.bucket.height} px, {kind}, {args.rounds} rounds of {args.rows} rows"
    print(
        f"\n| {title} | rows/s, median | least and most | of bare | x the peer | core ms a row | x the peer |"
    )
    print("|---|---|---|---|---|---|---|")
    rates, costs = (
        {name: statistics.median(pair[n] for pair in pairs) for name, pairs in found.items()}
        for n in (0, 1)
    )
    for name, pairs in found.items():
        least, most = min(pairs)[0], max(pairs)[0]
        print(
            f"| {name} | {rates[name]:.1f} | {least:.1f} to {most:.1f} | {rates[name] / rates[BARE]:.2f} | "
            f"{rates[name] / rates[PEER]:.2f} | {costs[name]:.1f} | {costs[PEER] / costs[name]:.2f} |",
            flush=True,
        )
    return rates[OURS] / args.processes


def rate(batches: Iterator[int], rows: int) -> tuple[float, float]:
    """Rows a second and milliseconds of a core a row, after what was made while the processes started."""
    made = 0
    while made < 2 * ROWS:
        made += next(batches)
    start, spent, done = time.perf_counter(), cpu_seconds(), 0
    while done < rows:
        done += next(batches)
    seconds, spent = time.perf_counter() - start, cpu_seconds() - spent
    del batches
    return done / seconds, 1000 * spent / done


def check(bench: Bench, task: Task) -> None:
    """Ours and the peer's tensors of one record are equal, but for what the weights' last bits do (`data.resize`)."""
    data = bench.data({task: 1.0}, rows=1)
    micro_batch = data[0]
    [source] = {feed.source for feed in data.feeds if feed.task is task}
    name = micro_batch.keys[0].partition("/")[2]
    number = next(n for n in range(len(source)) if source.index.key(n) == name)
    own = {name: value[0] for name, value in micro_batch.arrays.items()}
    pictures = [source.read(found) for found in source.index.pictures(number)]
    sample = dict(zip(("jpg", "source.jpg"), pictures, strict=False))
    sample["txt"] = source.index.text(number).encode()
    row = torch_pipeline.make_row(bench.tools, task, sample)
    other = {name: np.asarray(value) for name, value in row.items()}
    patches = patchify(own["vit_pixels"][0], bench.encoder.config.vlm.vision, MEAN, STD)
    length = int(own["valid"].sum())
    np.testing.assert_array_equal(own["tokens"][:length], other["tokens"][: other["valid"].sum()])
    for mine, theirs, step in (
        (own["target"], other["target"], 1),
        (own["source_pixels"][0], other["source_pixels"], 1),
        (patches, other["patches"], 1 / (255 * min(STD))),
    ):
        apart = np.abs(mine.astype(np.float64) - theirs) / step
        assert apart.max() < 2.5 and np.mean(apart > 0.1) < 0.01, (apart.max(), np.mean(apart))


def print_parts(bench: Bench) -> None:
    """Where a row's time goes, on one core."""
    data, vision = bench.data(MIXTURES["stage 1"]), bench.encoder.config.vlm.vision
    feed = {feed.task: number for number, feed in enumerate(data.feeds)}
    source = data.feeds[feed[Task.REC]].source
    numbers = range(min(32, len(source)))
    found = [source.index.pictures(number)[0] for number in numbers]
    images = [_open(source, one) for one in found]
    pixels = [np.asarray(image) for image in images]
    vit, vae = bench.source_sizes
    seen = [cover(one, *vit) for one in pixels]
    grid = (vit[0] // vision.unit, vit[1] // vision.unit)
    t2i = [data.maker.example(feed[Task.T2I], number) for number in numbers]
    rec = [data.maker.example(feed[Task.REC], number) for number in numbers]
    whole = [bench.encoder.encode_example(example, bench.bucket, TEXT_LENGTH) for example in rec]
    shapes = bench.encoder.shapes
    parts = {
        "read and checksum": lambda i: source.read(found[i]),
        "read and decode": lambda i: np.asarray(_open(source, found[i])),
        "resize to the target": lambda i: cover(pixels[i], *bench.target_size),
        "resize for the ViT (Rec, S-Edit)": lambda i: cover(pixels[i], *vit),
        "resize for the DC-AE (Rec, S-Edit)": lambda i: cover(pixels[i], *vae),
        "tokenise to count (T2I)": lambda i: bench.encoder.text_length(t2i[i]),
        "tokenise and place (Rec)": lambda i: bench.encoder.prompt_row(
            bench.encoder.prompt(RECONSTRUCTION_PROMPT, [grid], overflow="cut"),
            text_length=TEXT_LENGTH,
            sources=1,
        ),
        "write the row": lambda i: [np.array(value) for value in whole[i].values()],
        "Pillow's resize to the target (the peer's)": lambda i: pillow_cover(
            images[i], *bench.target_size
        ),
        "patches on the host (left out)": lambda i: pack_images(
            [patchify(seen[i], vision, MEAN, STD)],
            [grid],
            vision,
            slots=shapes.slots,
            tokens=shapes.tokens,
        ),
    }
    print(f"\n| {bench.bucket.height} px | ms of a core |")
    print("|---|---|")
    for name, part in parts.items():
        times = []
        for number in numbers:
            start = time.process_time()
            part(number)
            times.append(time.process_time() - start)
        print(f"| {name} | {1000 * statistics.median(times):.2f} |")


def print_needs(rates: dict[tuple[int, str], float]) -> None:
    """What a host must deliver, and the cores that takes at the rates measured here."""
    title = f"{CHIPS} v5p at 50% MFU, hosts of {CHIPS_A_HOST}"
    print(f"\n| {title} | rows/s in all | a host | rows/s a core here | cores a host |")
    print("|---|---|---|---|---|")
    for name, (size, samples, chip_hours, edits) in STAGES.items():
        if (size, "stage 1") in rates:
            total = samples / (chip_hours / CHIPS * 3600)
            host = total / (CHIPS / CHIPS_A_HOST)
            core = 1 / ((1 - edits) / rates[size, "stage 1"] + edits / rates[size, "edits"])
            print(
                f"| {name}, {size} px | {total:.0f} | {host:.1f} | {core:.1f} | {host / core:.1f} |"
            )


if __name__ == "__main__":
    main()
