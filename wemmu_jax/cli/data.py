"""`wemmu data ACTION SPEC`: what a data set holds, and what can be made of it before training.

SPEC is a YAML file of data sets, or a stage's config, `FILE.py:STAGE`, whose sets it then means.
"""

import argparse
import os
import pathlib
import sys
from typing import Any

from wemmu_jax.cli.arguments import whole

ACTIONS = {
    "index": "reads the sets once, so that training opens them at once; again, what changed since",
    "check": "reads and decodes everything, and says what is wrong; fails if anything is",
    "show": "an HTML page of samples as training sees them",
    "encode": "computes the DC-AE latents of all that a stage trains on",
    "caption": "new captions by the VLM, as sidecars",
    "pack": "copies the sets into ArrayRecord files",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run` reads."""
    parser.set_defaults(overrides={})
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    made = {}
    for name, text in ACTIONS.items():
        one = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        one.add_argument("spec", metavar="SPEC", help="a YAML file of data sets, or FILE.py:STAGE")
        one.add_argument(
            "--set", dest="names", action="append", default=[], metavar="NAME", help="only this one"
        )
        made[name] = one
    for name in ("index", "check", "pack"):
        made[name].add_argument("--processes", type=whole(0), default=os.cpu_count(), metavar="N")
    for name in ("encode", "caption", "pack", "show"):
        file = name == "show"
        made[name].add_argument(
            "--out", required=True, type=pathlib.Path, metavar="FILE.html" if file else "DIR"
        )
    for name in ("encode", "caption"):
        made[name].add_argument("--shard", type=_shard, default=(0, 1), metavar="I/N")
        made[name].add_argument("--batch", type=whole(1), default=32, help="pictures at a time")
        made[name].add_argument("--threads", type=whole(1), default=os.cpu_count(), metavar="N")
    for name in ("encode", "caption", "show"):
        made[name].add_argument(
            "--init",
            required=name != "show",
            metavar="DIR",
            help="converted weights or a workdir; show reads its tokenizer",
        )
    made["check"].add_argument("--resolution", type=whole(1), default=512, help="of the buckets")
    made["show"].add_argument("--count", type=whole(1), default=64, help="samples")
    made["show"].add_argument("--resolution", type=whole(1), default=512, help="of the buckets")
    made["caption"].add_argument("--resolution", type=whole(1), default=512)
    made["caption"].add_argument("--prompt", help="what is asked about a picture")
    made["caption"].add_argument("--max-new-tokens", type=whole(1), default=256)
    made["caption"].add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    made["pack"].add_argument("--shard-size", type=whole(1), default=4096, help="records of a file")


def run(args: argparse.Namespace) -> None:
    """Does one of ACTIONS."""
    {
        "index": _index,
        "check": _check,
        "show": _show,
        "encode": _encode,
        "caption": _caption,
        "pack": _pack,
    }[args.action](args)


def _index(args: argparse.Namespace) -> None:
    from wemmu_jax.data.indexing import Renewal

    for name, source in _sources(args, processes=args.processes, renewal=Renewal.CHANGED):
        index = source.index
        print(f"{name}: {len(index):,} records, {index.problem_count:,} left out; {index.folder}")


def _check(args: argparse.Namespace) -> None:
    from wemmu_jax.data.buckets import make_buckets
    from wemmu_jax.data.checking import check, duplicate_keys
    from wemmu_jax.data.indexing import Renewal

    buckets = make_buckets(args.resolution, multiple=32)
    bad = []
    for name, source in _sources(args, processes=args.processes, renewal=Renewal.LEFT_OUT):
        with _bar(f"{name}: decoding") as progress:
            report = check(source, buckets, processes=args.processes, progress=progress)
        twice = duplicate_keys(source)
        print(f"\n{name}", *report.lines(), sep="\n")
        for problem in report.problems[:20]:
            print(f"  {problem.key}: {problem.reason}")
        if twice:
            print(f"  {len(twice)} keys are there twice: {', '.join(twice[:5])}")
        if report.problems or twice:
            bad.append(f"{name}: {len(report.problems)} unreadable, {len(twice)} keys twice")
    if bad:
        raise ValueError("; ".join(bad))


def _show(args: argparse.Namespace) -> None:
    from wemmu_jax.data.buckets import make_buckets
    from wemmu_jax.data.pipeline import MicroBatches
    from wemmu_jax.data.sheet import write_sheet
    from wemmu_jax.data.sources import build_feeds
    from wemmu_jax.data.tasks import Task

    if _is_config(args):
        from wemmu_jax.models.wemmu.config import BridgeConfig, WeMMUConfig
        from wemmu_jax.training.origin import Origin
        from wemmu_jax.training.run import prepare_data

        config = _config(args)
        if not args.init:
            raise ValueError("--init: a config's samples are shown as its model reads them")
        origin = Origin(args.init)
        bridge = BridgeConfig.from_dict(config.model.bridge.to_dict())
        model = WeMMUConfig.from_folder(origin.backbones_folder, bridge)
        encoder, data, _ = prepare_data(config, origin, model)

        def source_size(height: int, width: int) -> tuple[int, int]:
            return encoder.source_sizes(model.source_grid(height, width))[1]

        shown = write_sheet(args.out, data, count=args.count, source_size=source_size)
    else:
        feeds = build_feeds(_entries(args))
        data = MicroBatches(
            feeds=feeds,
            mixture={task: 1.0 for task in Task if any(feed.task is task for feed in feeds)},
            buckets=make_buckets(args.resolution, multiple=32),
            rows=1,
            seed=0,
            encode_row=lambda example, bucket, length: {},
            text_length=_token_counter(args.init),
        )
        shown = write_sheet(args.out, data, count=args.count)
    print(f"{args.out}: {shown} samples")


def _token_counter(init: str | None):
    """Tokens of an example's text; without a tokenizer 0, which the page's reader is told once."""
    if init is None:
        print("no --init: the page counts no tokens", file=sys.stderr)
        return lambda example: 0
    from wemmu_jax.models.qwen2_5_vl.prompt import PromptEncoder
    from wemmu_jax.training.origin import Origin

    prompts = PromptEncoder.load(Origin(init).backbones_folder / "vlm")
    return lambda example: sum(len(prompts.words(text)) for text in example.texts)


def _encode(args: argparse.Namespace) -> None:
    from wemmu_jax.training.features import encode_features

    config = _config(args)
    config.init = args.init
    with _bar("encoding") as progress:
        unread, done = encode_features(
            config,
            args.out,
            shard=args.shard[0],
            shards=args.shard[1],
            batch=args.batch,
            threads=args.threads,
            progress=progress,
        )
    state = "complete" if done else "other shards are missing"
    print(f"{args.out}: {state}; {unread} pictures could not be read")


def _caption(args: argparse.Namespace) -> None:
    from wemmu_jax.data.prompts import DESCRIPTION_PROMPT
    from wemmu_jax.inference.captioning import Captioner, caption_records

    sources = list(_sources(args, processes=0))
    captioner = Captioner(
        args.init,
        dtype=args.dtype,
        prompt=args.prompt or DESCRIPTION_PROMPT,
        resolution=args.resolution,
        batch=args.batch,
        max_new_tokens=args.max_new_tokens,
    )
    for name, source in sources:
        with _bar(f"{name}: captioning") as progress:
            bad = caption_records(
                source,
                captioner,
                args.out / name,
                shard=args.shard[0],
                shards=args.shard[1],
                threads=args.threads,
                progress=progress,
            )
        print(f"{args.out / name}: {bad} without a caption")


def _pack(args: argparse.Namespace) -> None:
    from wemmu_jax.data.packing import pack

    for name, source in _sources(args, processes=args.processes):
        with _bar(f"{name}: packing") as progress:
            problems = pack(
                source,
                args.out,
                name=name,
                shard_size=args.shard_size,
                processes=args.processes,
                progress=progress,
            )
        print(f"{args.out}/{name}-*.arrayrecord: {len(problems)} records left out")
        for problem in problems[:20]:
            print(f"  {problem.key}: {problem.reason}")


def _is_config(args: argparse.Namespace) -> bool:
    return ".py:" in args.spec


def _config(args: argparse.Namespace):
    from wemmu_jax.training.curriculum import load_config

    if not _is_config(args):
        raise ValueError(f"{args.spec}: expected a stage's config, FILE.py:STAGE")
    return load_config(args.spec, args.overrides)


def _entries(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The entries that SPEC and --set name."""
    from wemmu_jax.data.sources import read_entries

    if _is_config(args):
        data = _config(args).data
        specs = [s if isinstance(s, str) else dict(s) for s in (*data.sources, *data.held_out)]
    else:
        specs = [args.spec]
    entries = read_entries(specs)
    found = [str(entry.get("name", number)) for number, entry in enumerate(entries)]
    if unknown := set(args.names) - set(found):
        raise ValueError(f"--set {', '.join(unknown)}: {args.spec} has {', '.join(found)}")
    return [
        e for e, name in zip(entries, found, strict=True) if not args.names or name in args.names
    ]


def _sources(args: argparse.Namespace, **options):
    """(name, source) of each set that is on disk. `options`: of `build_source`."""
    from wemmu_jax.data.sources import IndexedSource, build_source

    for number, entry in enumerate(_entries(args)):
        name = str(entry.get("name", number))
        spec = {k: v for k, v in entry.items() if k not in ("name", "tasks", "weight")}
        with _bar(f"{name}: indexing") as progress:
            source = build_source(spec, progress=progress, **options)
        if isinstance(source, IndexedSource):
            yield name, source
        else:
            print(f"{name}: drawn, nothing on disk")


class _bar:
    """A progress bar that is told (done, all), on stderr while it is a terminal."""

    def __init__(self, text: str):
        self._text, self._bar = text, None

    def __enter__(self):
        return self._tell

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()

    def _tell(self, done: int, total: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(desc=self._text, total=total, unit="part", disable=None)
        self._bar.update(done - self._bar.n)


def _shard(text: str) -> tuple[int, int]:
    """`2/8`: the third of eight."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"expected I/N with I below N, found {text!r}")
    return int(number), int(count)
