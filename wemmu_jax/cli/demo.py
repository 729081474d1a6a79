"""`wemmu demo`: the whole life of a model on the tiny preset, from Hugging Face folders to a gallery."""

import argparse
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

STEPS = 50  # of each stage
STAGES = ("stage1", "stage2", "stage3", "stage4")
NOTE = (
    "Everything here ran on this machine, on the tiny preset, which knows miniworld. All is drawn twice. First "
    f"by the model that just learned here, in four stages of {STEPS} steps, far too few: it shows that every part of "
    "the road runs and that the losses fall. Then by the model that comes with the package, which learned for longer; "
    "the answers and the scores are its own."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--out", required=True, type=pathlib.Path, help="folder for all results")


def run(args: argparse.Namespace) -> None:
    """Backbones, conversion, four stages, pictures, answers, scores, gallery; goes on where it was stopped."""
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:5.0f} s] {text}", flush=True)

    out: pathlib.Path = args.out
    _use_compilation_cache(out / "compilation_cache")
    converted = _backbones(out, say)
    losses = _train(out, converted, say)
    _draw(out, losses, say)


def _use_compilation_cache(folder: pathlib.Path) -> None:
    import jax

    # Stages share most of their programs.
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _backbones(out: pathlib.Path, say: Callable[[str], None]) -> pathlib.Path:
    from wemmu_jax.conversion.convert import convert
    from wemmu_jax.demo.photographs import write_photographs
    from wemmu_jax.shipped import BACKBONES

    converted = out / "converted"
    if converted.exists():
        return converted
    say("writing photographs, converting the tiny backbones")
    write_photographs(out / "photographs")
    convert(str(BACKBONES / "vlm"), str(BACKBONES / "sana"), str(converted))
    return converted


def _train(
    out: pathlib.Path, converted: pathlib.Path, say: Callable[[str], None]
) -> dict[str, list[float]]:
    from configs.tiny import get_config, photographs, shortened
    from wemmu_jax.training.loop import train

    start, losses = converted, {}
    for stage in STAGES:
        say(f"training {stage}")
        config = shortened(get_config(stage), STEPS)
        config.batch.micro_batches = 1
        config.paper.batch = config.batch.rows
        config.init = str(start.absolute())
        config.data.sources += tuple(photographs(str((out / "photographs").absolute())))
        # A program for each bucket and arity takes ten seconds to compile, pictures on the way a minute a stage.
        if stage != STAGES[0]:
            config.data.buckets = 1
        config.every.update({"log": 10, "checkpoint": 25, "validate": 25, "sample": 0})
        start = out / stage
        train(config, start)
        lines = (start / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        # By step, because a run that was resumed has some steps twice.
        by_step = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
        losses[stage] = [by_step[step] for step in sorted(by_step)]
        # A step has other tasks than the next; what is held out is the same each time.
        before, after = (_held_out_loss(rows, step) for step in (0, STEPS))
        say(f"{stage}: held-out loss {before:.4f} before, {after:.4f} after")
        if not after < before:
            raise RuntimeError(f"{stage}: the loss did not fall ({before:.4f} to {after:.4f})")
    return losses


def _held_out_loss(rows: Sequence[Mapping], step: int) -> float:
    """Mean over the tasks that were validated at the step."""
    found = {k: v for row in rows if row["step"] == step for k, v in row.items()}
    return float(np.mean([v for k, v in found.items() if k.startswith("validation/")]))


def _draw(out: pathlib.Path, losses: dict[str, list[float]], say: Callable[[str], None]) -> None:
    from wemmu_jax.demo.gallery import write_gallery
    from wemmu_jax.evaluation.miniworld import asked_questions, evaluate
    from wemmu_jax.evaluation.miniworld import show as show_scene
    from wemmu_jax.inference.pipeline import WeMMU
    from wemmu_jax.miniworld.questions import KINDS
    from wemmu_jax.miniworld.sources import MiniworldSource
    from wemmu_jax.shipped import MODEL

    say("drawing pictures")
    shipped = WeMMU.load(MODEL, dtype="float32")
    models = [WeMMU.load(out / STAGES[-1], dtype="float32"), shipped]
    side = shipped.default_size

    def held_out(kind: str) -> list:
        source = MiniworldSource(kind, seed=1, size=3, split="held_out")
        return [source[i] for i in range(len(source))]

    def show(picture) -> Image.Image:
        return Image.fromarray(picture.load(side, side))

    def edited(source: Image.Image, instruction: str) -> list[Image.Image]:
        return [source, *(model.edit(source, instruction, seed=0) for model in models)]

    captions = held_out("caption")
    texts = [record.text for record in captions]
    drawn = zip(*(model.generate(texts, seed=0) for model in models), strict=True)
    photograph = Image.open(out / "photographs/chelsea-1.0-0.png")
    sections = {
        "Generate: drawn twice, and a scene that was meant": [
            (record.text, [*pictures, show(record.target)])
            for record, pictures in zip(captions, drawn, strict=True)
        ],
        "Edit: source, drawn twice, and what was meant": [
            (r.text, [*edited(show(s), r.text), show(r.target)])
            for r in held_out("edit")
            for s in r.sources
        ],
        "Compose: sources, drawn twice, and what was meant": [
            (r.text, [*s, *(m.compose(s, r.text, seed=0) for m in models), show(r.target)])
            for r in held_out("composition")
            for s in [list(map(show, r.sources))]
        ],
        "Reconstruct: source, and drawn twice": [
            ("", [image, *(model.reconstruct(image, seed=0) for model in models)])
            for image in [show(captions[0].target), photograph]
        ],
        "Chat": [
            (f"{q.text} {shipped.chat(q.text, images=[scene], max_new_tokens=32)}", [scene])
            for kind in KINDS
            for q in asked_questions(kind, count=1, seed=1)
            for scene in [show_scene(q.scene, side)]
        ],
    }
    say("scoring on miniworld")
    scores = evaluate(shipped, out / "evaluation", count=4, seed=0, steps=20)
    page = out / "gallery.html"
    write_gallery(page, note=NOTE, losses=losses, sections=sections, scores=scores)
    say(f"done: {page}")
