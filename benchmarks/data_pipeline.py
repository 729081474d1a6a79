"""From tar to device-ready arrays: this pipeline, torch's DataLoader with webdataset and the HF processor, and the bare
decoding and resizing that both rest on; in one run, in turns.

    python -m benchmarks.data_pipeline                         # 512 and 1024 px, two processes each
    python -m benchmarks.data_pipeline --pictures 64 --rounds 1 --sizes 512      # is it whole?

Both give the same tensors, which is checked first: prompt ids, the ViT's patches, the DC-AE's sources and targets.
Ours come as the device wants them: the ViT's pixels as bytes, which a program on the device cuts into patches and
packs; the line `+ patches on the host` has that done here as well, where the peer does it too. Rows are stage 1's:
Rec 50, T2I 47, Uncond 3. Pictures are photographs of 1.5 times the bucket's sides as JPEG of quality 90, with
captions of sixty words. Needs requirements-dev.txt.
"""

import argparse
import dataclasses
import functools
import io
import itertools
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from wemmu_jax.data.buckets import Bucket
from wemmu_jax.data.pictures import cover, open_picture
from wemmu_jax.data.pipeline import MicroBatches
from wemmu_jax.data.prompts import RECONSTRUCTION_PROMPT
from wemmu_jax.data.sources import build_feeds
from wemmu_jax.data.tasks import Task
from wemmu_jax.models.qwen2_5_vl.images import MEAN, STD, pack_images, patchify
from wemmu_jax.models.qwen2_5_vl.prompt import PromptEncoder
from wemmu_jax.models.wemmu.config import BridgeConfig
from wemmu_jax.models.wemmu.inputs import RowEncoder
from wemmu_jax.models.wemmu.published import published_wemmu

MIXTURE = {Task.REC: 50.0, Task.T2I: 47.0, Task.UNCOND: 3.0}
TEXT_LENGTH = 128
# Samples of the stage, and the chip-hours that its FLOPs take on v5p at 50% MFU.
STAGES = {"stage 1": (512, 79.4e6, 1343.0), "stage 3": (1024, 19.9e6, 1720.0)}
CHIPS, CHIPS_A_HOST = 128, 4


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
            rates[size] = measure(bench, args)
            print_parts(bench)
    print_needs(rates)


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all of them read, and how they tokenise."""

    tar: str
    bucket: Bucket
    encoder: RowEncoder

    @classmethod
    def make(cls, folder: pathlib.Path, size: int, pictures: int) -> "Bench":
        """Writes the tar and the tokenizer."""
        import webdataset

        from tests.models import qwen_vocabulary
        from wemmu_jax.demo.photographs import random_crops

        rng = np.random.default_rng(0)
        words = [
            "a",
            "photograph",
            "of",
            "some",
            "red",
            "barn",
            "by",
            "the",
            "sea",
            "under",
            "clouds",
            "with",
            "birds",
        ]
        side = size * 3 // 2
        with webdataset.TarWriter(f"{folder}/00000.tar") as tar:
            for number, pixels in enumerate(random_crops(rng, pictures, (side, side))):
                out = io.BytesIO()
                Image.fromarray(pixels).save(out, "JPEG", quality=90)
                text = " ".join(rng.choice(words, 60))
                tar.write({"__key__": f"{number:06}", "jpg": out.getvalue(), "txt": text})
        qwen_vocabulary.write_tokenizer(folder / "vlm")
        qwen_vocabulary.small_config().save_pretrained(folder / "vlm")
        config = published_wemmu(BridgeConfig())
        encoder = RowEncoder(
            config, PromptEncoder.load(folder / "vlm"), MEAN, STD, (3136, 12845056)
        )
        encoder = encoder.sized([config.source_grid(size, size)], multiple=128)
        return cls(f"{folder}/00000.tar", Bucket(size, size), encoder)

    @property
    def source_sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """What the ViT and what the DC-AE reads of a source."""
        grid = self.encoder.config.source_grid(self.bucket.height, self.bucket.width)
        return self.encoder.source_sizes(grid)

    def data(self, **changes) -> MicroBatches:
        """Our pipeline over the tar."""
        entry = {"name": "tar", "tasks": [task.value for task in MIXTURE], "type": "webdataset"}
        settings = {
            "feeds": build_feeds([{**entry, "paths": self.tar}]),
            "mixture": MIXTURE,
            "buckets": [self.bucket],
            "rows": 8,
            "seed": 0,
            "encode_row": self.encoder.encode_example,
            "text_length": self.encoder.text_length,
            "text_lengths": (TEXT_LENGTH,),
        }
        return MicroBatches(**settings | changes)


# -- the three


def ours(bench: Bench, processes: int, *, patches: bool = False) -> Iterator[int]:
    """Rows of each micro-batch of this pipeline."""
    encode = PatchesToo(bench.encoder) if patches else bench.encoder.encode_example
    data = bench.data(encode_row=encode)
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


def peer(bench: Bench, processes: int) -> Iterator[int]:
    """Rows of each batch of webdataset, torch and transformers. Two loaders, because a batch has one arity."""
    import torch
    import webdataset

    def loader(task: Task):
        make = functools.partial(peer_row, PeerTools.of(bench), task)
        data = webdataset.WebDataset(
            bench.tar, shardshuffle=False, resampled=True, nodesplitter=webdataset.split_by_node
        )
        data = data.shuffle(100).map(make)
        return iter(torch.utils.data.DataLoader(data, batch_size=8, num_workers=processes))

    loaders = {task: loader(task) for task in (Task.REC, Task.T2I)}
    number = 0
    while True:
        # Uncond counts as T2I: it has no caption to read.
        batch = next(loaders[Task.REC if number % 2 == 0 else Task.T2I])
        number += 1
        yield len(batch["target"])


@dataclasses.dataclass(frozen=True)
class PeerTools:
    """What a PyTorch user takes: the HF image processor and tokenizer."""

    processor: object
    tokenizer: object
    bucket: Bucket
    sizes: tuple[tuple[int, int], tuple[int, int]]

    @classmethod
    def of(cls, bench: Bench) -> "PeerTools":
        """With the settings that give our tensors."""
        from transformers import AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        vlm = pathlib.Path(bench.tar).parent / "vlm"
        return cls(
            Qwen2VLImageProcessorPil(do_resize=False),
            AutoTokenizer.from_pretrained(vlm),
            bench.bucket,
            bench.source_sizes,
        )


def peer_row(tools: PeerTools, task: Task, sample: dict) -> dict:
    """A sample as torch tensors."""
    import torch

    image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
    bucket = tools.bucket
    row = {"target": torch.from_numpy(cover(image, bucket.height, bucket.width))}
    content = [{"type": "text", "text": RECONSTRUCTION_PROMPT}]
    length = TEXT_LENGTH
    if task is Task.REC:
        vit, vae = tools.sizes
        pixels = tools.processor(images=cover(image, *vit), return_tensors="pt")
        row["patches"] = pixels["pixel_values"]
        row["source_pixels"] = torch.from_numpy(cover(image, *vae))
        content.insert(0, {"type": "image"})
    else:
        content[0]["text"] = sample["txt"].decode()
    text = tools.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    if task is Task.REC:
        tokens = 2 * int(pixels["image_grid_thw"].prod()) // 4  # for the ViT's and for the DC-AE's
        text = text.replace("<|image_pad|>", "<|image_pad|>" * tokens)
        length += tokens
    text += "<|vision_start|>"
    ids = tools.tokenizer(
        text, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return row | {"tokens": ids["input_ids"][0], "valid": ids["attention_mask"][0]}


def bare(bench: Bench, processes: int) -> Iterator[int]:
    """Rows whose pictures were read, decoded and resized as both do, and thrown away."""
    source = bench.data().feeds[0].source
    vit, vae = bench.source_sizes
    target = (bench.bucket.height, bench.bucket.width)
    sizes = ((target, vit, vae), (target,))
    jobs = ((number % len(source), sizes[number % 2]) for number in itertools.count())
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, _remember, (source,)) as pool:
        for _ in pool.imap(_decode, jobs, chunksize=4):
            yield 1


_source = None


def _remember(source) -> None:
    global _source
    _source = source


def _decode(job: tuple) -> None:
    number, sizes = job
    found = _source.index.pictures(number)[0]
    place = found.place
    image = open_picture(_source.format.read(place.path, place.at, place.size), name=place.path)
    for size in sizes:
        cover(image, *size)


# -- measuring


def measure(bench: Bench, args: argparse.Namespace) -> float:
    """Prints rates in turns; returns ours, rows a second."""
    check(bench)
    runs: dict[str, Callable[[], Iterator[int]]] = {
        "bare decode + resize": functools.partial(bare, bench, args.processes),
        "wemmu": functools.partial(ours, bench, args.processes),
        "wemmu + patches on the host": functools.partial(ours, bench, args.processes, patches=True),
        "DataLoader + webdataset + HF": functools.partial(peer, bench, args.processes),
    }
    rates = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, start in runs.items():
            rates[name].append(rate(start(), args.rows))
    title = f"{bench.bucket.height} px, {args.rounds} rounds of {args.rows} rows"
    print(f"\n| {title} | rows/s, median | least and most | of bare | x the peer |")
    print("|---|---|---|---|---|")
    middle = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        of_bare = middle[name] / middle["bare decode + resize"]
        times = middle[name] / middle["DataLoader + webdataset + HF"]
        print(
            f"| {name} | {middle[name]:.1f} | {min(values):.1f} to {max(values):.1f} | {of_bare:.2f} | {times:.2f} |"
        )
    return middle["wemmu"] / args.processes


def rate(batches: Iterator[int], rows: int) -> float:
    """Rows a second, after what was made while the processes started."""
    for _ in range(8):
        next(batches)
    start, done = time.perf_counter(), 0
    while done < rows:
        done += next(batches)
    seconds = time.perf_counter() - start
    del batches
    return done / seconds


def check(bench: Bench) -> None:
    """Ours and the peer's tensors of one record are equal."""
    data = bench.data(mixture={Task.REC: 1.0}, rows=1)
    micro_batch = data[0]
    record = data.feeds[0].source
    number = next(
        n for n in range(len(record)) if f"tar/{record.index.key(n)}" == micro_batch.keys[0]
    )
    own = {name: value[0] for name, value in micro_batch.arrays.items()}
    found = record.index.pictures(number)[0]
    sample = {"jpg": record.read(found), "txt": record.index.text(number).encode()}
    other = {
        name: np.asarray(value)
        for name, value in peer_row(PeerTools.of(bench), Task.REC, sample).items()
    }
    for name in ("target", "source_pixels"):
        np.testing.assert_array_equal(np.squeeze(own[name]), other[name])
    length = int(own["valid"].sum())
    np.testing.assert_array_equal(own["tokens"][:length], other["tokens"][: other["valid"].sum()])
    vision = bench.encoder.config.vlm.vision
    patches = patchify(own["vit_pixels"][0], vision, MEAN, STD)
    np.testing.assert_array_equal(patches, other["patches"])


def print_parts(bench: Bench) -> None:
    """Where a row's time goes, on one core."""
    data = bench.data(mixture={Task.REC: 1.0}, rows=1)
    source, vision = data.feeds[0].source, bench.encoder.config.vlm.vision
    numbers = range(min(32, len(source)))
    found = [source.index.pictures(number)[0] for number in numbers]
    bytes_of = [source.read(one) for one in found]
    images = [open_picture(data, name="x") for data in bytes_of]
    vit, vae = bench.source_sizes
    target = (bench.bucket.height, bench.bucket.width)
    pixels = [cover(image, *vit) for image in images]
    grid = (vit[0] // vision.unit, vit[1] // vision.unit)
    t2i = [data.maker.example(1, number) for number in numbers]
    rec = [data.maker.example(0, number) for number in numbers]
    whole = [bench.encoder.encode_example(example, bench.bucket, TEXT_LENGTH) for example in rec]
    shapes = bench.encoder.shapes
    parts = {
        "read and checksum": lambda i: source.read(found[i]),
        "decode": lambda i: open_picture(bytes_of[i], name="x"),
        "resize to the target": lambda i: cover(images[i], *target),
        "resize for the ViT (Rec)": lambda i: cover(images[i], *vit),
        "resize for the DC-AE (Rec)": lambda i: cover(images[i], *vae),
        "tokenise to count (T2I)": lambda i: bench.encoder.text_length(t2i[i]),
        "tokenise and place (Rec)": lambda i: bench.encoder.prompt_row(
            bench.encoder.prompt(RECONSTRUCTION_PROMPT, [grid], overflow="cut"),
            text_length=TEXT_LENGTH,
            sources=1,
        ),
        "write the row": lambda i: [np.array(value) for value in whole[i].values()],
        "patches on the host (left out)": lambda i: pack_images(
            [patchify(pixels[i], vision, MEAN, STD)],
            [grid],
            vision,
            slots=shapes.slots,
            tokens=shapes.tokens,
        ),
    }
    print(f"\n| {bench.bucket.height} px, one core | ms |")
    print("|---|---|")
    for name, part in parts.items():
        times = []
        for number in numbers:
            start = time.perf_counter()
            part(number)
            times.append(time.perf_counter() - start)
        print(f"| {name} | {1000 * statistics.median(times):.2f} |")


def print_needs(rates: dict[int, float]) -> None:
    """What a host must deliver, and the cores that takes at the rate measured here."""
    title = f"{CHIPS} v5p at 50% MFU, hosts of {CHIPS_A_HOST}"
    print(f"\n| {title} | rows/s in all | a host | rows/s a core here | cores a host |")
    print("|---|---|---|---|---|")
    for name, (size, samples, chip_hours) in STAGES.items():
        if size in rates:
            total = samples / (chip_hours / CHIPS * 3600)
            host = total / (CHIPS / CHIPS_A_HOST)
            print(
                f"| {name}, {size} px | {total:.0f} | {host:.1f} | {rates[size]:.1f} | {host / rates[size]:.1f} |"
            )


if __name__ == "__main__":
    main()
