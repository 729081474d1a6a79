"""`wemmu data ACTION SPEC`: what a data set holds, and what can be made of it before training.

SPEC is a YAML file of data sets, or a stage's config, `FILE.py:STAGE`, whose sets it then means.
"""

import argparse
import dataclasses
import math
import os
import pathlib
import sys
from collections.abc import Callable

from wemmu_jax.cli.arguments import shard, whole

ACTIONS = {
    "index": "reads the sets once, so that training opens them at once; again, what changed since",
    "check": "reads and decodes everything, and says what is wrong; fails if anything is",
    "show": "an HTML page of samples as training sees them",
    "encode": "computes the DC-AE latents of all that a stage trains on",
    "caption": "new captions by the VLM, as sidecars",
    "pack": "copies the sets into ArrayRecord files; fails if something is left out",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run` reads."""
    parser.set_defaults(overrides={})
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    made = {}
    for name, text in ACTIONS.items():
        one = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        one.add_argument("spec", metavar="SPEC", help="a YAML file of data sets, or FILE.py:STAGE")
        if name != "encode":  # a folder of features is of all that a stage reads
            one.add_argument(
                "--set",
                dest="names",
                action="append",
                default=[],
                metavar="NAME",
                help="only this one",
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
        made[name].add_argument("--shard", type=shard, default=(0, 1), metavar="I/N")
        made[name].add_argument("--batch", type=whole(1), default=32, help="pictures at a time")
        made[name].add_argument("--threads", type=whole(1), default=os.cpu_count(), metavar="N")
    for name in ("encode", "caption", "show"):
        made[name].add_argument(
            "--init",
            required=name != "show",
            metavar="DIR",
            help="converted weights or a workdir; show reads its tokenizer",
        )
    text = "of the buckets; by default the stage's, or 512"
    made["check"].add_argument("--resolution", type=whole(1), help=text)
    made["show"].add_argument("--count", type=whole(1), default=64, help="samples")
    text = "of the buckets of a YAML file's sets (default: 512)"
    made["show"].add_argument("--resolution", type=whole(1), help=text)
    made["caption"].add_argument("--resolution", type=whole(1), default=512)
    made["caption"].add_argument("--prompt", help="what is asked about a picture")
    made["caption"].add_argument("--max-new-tokens", type=whole(1), default=256)
    made["caption"].add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    made["pack"].add_argument("--shard-size", type=whole(1), default=4096, help="records of a file")


def run(args: argparse.Namespace) -> None:
    """Does one of ACTIONS."""
    if args.overrides and not _is_config(args):
        raise ValueError(
            f"--config.{next(iter(args.overrides))} is for a stage's config, FILE.py:STAGE; found {args.spec}"
        )
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

    def show(one, source) -> None:
        if _is_stored(one, source):
            index = source.index
            left_out = f"{index.left_out:,} left out"
            print(f"{one.name}: {len(index):,} records, {left_out}; {index.folder}")

    _for_each(_data_sets(args), show, processes=args.processes, renewal=Renewal.CHANGED)


def _check(args: argparse.Namespace) -> None:
    from wemmu_jax.data.checking import check, check_task, duplicate_keys
    from wemmu_jax.data.indexing import Renewal

    buckets = _buckets(args)
    sets, tasks = _data_sets(args), _trained(args)

    def work(one, source) -> None:
        wrong = []
        for feed in one.feeds(source):
            try:
                if feed.task in tasks:
                    check_task(feed)
            except ValueError as error:
                wrong.append(str(error))
        if _is_stored(one, source):
            with _bar(f"{one.name}: decoding") as progress:
                report = check(source, buckets, processes=args.processes, progress=progress)
            twice = duplicate_keys(source)
            print(f"\n{one.name}", *report.lines(), sep="\n")
            for problem in report.problems[:20]:
                print(f"  {problem.key}: {problem.reason}")
            if twice:
                print(f"  {len(twice)} keys are there twice: {', '.join(twice[:5])}")
            if report.problems or twice:
                wrong.append(f"{len(report.problems)} unreadable, {len(twice)} keys twice")
        if wrong:
            raise ValueError("; ".join(wrong))

    _for_each(sets, work, processes=args.processes, renewal=Renewal.LEFT_OUT)


def _buckets(args: argparse.Namespace):
    """Those that SPEC's stage trains in, or of --resolution; by the ratio of Sana's autoencoder, as far as that divides
    the resolution, for no weights are here that would tell."""
    from wemmu_jax.data.buckets import make_buckets

    if args.resolution or not _is_config(args):
        return make_buckets(args.resolution or 512, multiple=32)
    fields = _config(args).data
    return make_buckets(
        fields.resolution,
        multiple=math.gcd(32, fields.resolution),
        count=fields.buckets,
        max_ratio=fields.max_aspect,
    )


def _show(args: argparse.Namespace) -> None:
    from wemmu_jax.data.buckets import make_buckets
    from wemmu_jax.data.pipeline import MicroBatches
    from wemmu_jax.data.sheet import write_sheet
    from wemmu_jax.data.sources import build_source
    from wemmu_jax.data.tasks import Task

    if _is_config(args):
        from wemmu_jax.models.wemmu.config import BridgeConfig, WeMMUConfig
        from wemmu_jax.training.origin import Origin
        from wemmu_jax.training.run import prepare_data

        config = _config(args)
        if args.names or args.resolution:
            raise ValueError(
                f"{args.spec}: a stage's samples are shown as it draws them; --set and --resolution are for a YAML file"
            )
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
        feeds = [feed for one in _data_sets(args) for feed in one.feeds(build_source(one.spec))]
        data = MicroBatches(
            feeds=feeds,
            mixture={task: 1.0 for task in Task if any(feed.task is task for feed in feeds)},
            buckets=make_buckets(args.resolution or 512, multiple=32),
            rows=1,
            seed=0,
            encode_row=_pixels,
            text_length=_token_counter(args.init),
        )
        shown = write_sheet(args.out, data, count=args.count)
    print(f"{args.out}: {shown} samples")


def _pixels(example, bucket, length) -> dict:
    """Finds out whether the pictures of an example can be read."""
    pictures = [*example.sources, *([] if example.target is None else [example.target])]
    return {str(n): one.load(bucket.height, bucket.width) for n, one in enumerate(pictures)}


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

    # Of an entry that names the sidecars that are made here, the set as it is without them.
    sets = [
        dataclasses.replace(one, spec={k: v for k, v in one.spec.items() if k != "captions"})
        for one in _data_sets(args)
    ]
    captioner = Captioner(
        args.init,
        dtype=args.dtype,
        prompt=args.prompt or DESCRIPTION_PROMPT,
        resolution=args.resolution,
        batch=args.batch,
        max_new_tokens=args.max_new_tokens,
    )

    def work(one, source) -> None:
        if not _is_stored(one, source):
            return
        folder = args.out / one.name
        with _bar(f"{one.name}: captioning") as progress:
            bad = caption_records(
                source,
                captioner,
                folder,
                shard=args.shard[0],
                shards=args.shard[1],
                threads=args.threads,
                progress=progress,
            )
        print(f"{folder}: {bad} without a caption")

    _for_each(sets, work, processes=0)


def _pack(args: argparse.Namespace) -> None:
    from wemmu_jax.data.packing import pack

    def work(one, source) -> None:
        if not _is_stored(one, source):
            return
        with _bar(f"{one.name}: packing") as progress:
            problems = pack(
                source,
                args.out,
                name=one.name,
                shard_size=args.shard_size,
                processes=args.processes,
                progress=progress,
            )
        left_out = f"{sum(problem.records for problem in problems):,} records left out"
        print(f"{args.out}/{one.name}-*.arrayrecord: {left_out}")
        for problem in problems[:20]:
            print(f"  {problem.key}: {problem.reason}")
        if problems:
            file = args.out / f"{one.name}.bad.jsonl"
            raise ValueError(f"{left_out}, see {file}")

    _for_each(_data_sets(args), work, processes=args.processes)


def _is_config(args: argparse.Namespace) -> bool:
    return ".py:" in args.spec


def _config(args: argparse.Namespace):
    from wemmu_jax.training.curriculum import load_config

    if not _is_config(args):
        raise ValueError(f"{args.spec}: expected a stage's config, FILE.py:STAGE")
    return load_config(args.spec, args.overrides)


def _data_sets(args: argparse.Namespace) -> list:
    """The sets that SPEC and --set name; their entries make sense, their files have not been looked at."""
    from wemmu_jax.data.sources import data_sets

    sets = [one for group in _groups(args) for one in data_sets(group)]
    found = {one.name: None for one in sets}
    if unknown := set(args.names) - set(found):
        raise ValueError(f"--set {', '.join(unknown)}: {args.spec} has {', '.join(found)}")
    return [one for one in sets if not args.names or one.name in args.names]


def _groups(args: argparse.Namespace) -> list[list]:
    """Entries that are read together: those of a YAML file, or what a config trains on and what it holds out."""
    if not _is_config(args):
        return [[args.spec]]
    data = _config(args).data
    return [
        [entry if isinstance(entry, str) else dict(entry) for entry in group]
        for group in (data.sources, data.held_out)
    ]


def _trained(args: argparse.Namespace) -> set:
    """The tasks that SPEC's sets must serve: those of a config's mixture, all that a YAML file names.

    Raises ValueError: the config makes no sense, or one of its tasks has no set.
    """
    from wemmu_jax.data.sources import data_sets
    from wemmu_jax.data.tasks import Task

    if not _is_config(args):
        return set(Task)
    from wemmu_jax.training.curriculum import Stage

    config = _config(args)
    Stage.from_config(config)
    tasks = {Task(name) for name, weight in config.data.mixture.items() if weight}
    sources, held_out = (data_sets(group) for group in _groups(args))
    for name, sets in (("sources", sources), ("held_out", held_out or sources)):
        if hungry := tasks.difference(*(one.tasks for one in sets)):
            names = ", ".join(sorted(task.value for task in hungry))
            raise ValueError(f"data.{name}: no data set feeds {names}, which the mixture asks for")
    return tasks


def _for_each(sets: list, work: Callable, **options) -> None:
    """`work(set, its source)` for each set; what is wrong with one keeps no other from its turn. `options`: of
    `build_source`.

    Raises ValueError: names every set that failed, and why.
    """
    from wemmu_jax.data.sources import build_source

    failed = []
    for one in sets:
        try:
            with _bar(f"{one.name}: indexing") as progress:
                source = build_source(one.spec, progress=progress, **options)
            work(one, source)
        except (ValueError, OSError) as error:
            failed.append(f"{one.name}: {error}")
    if failed:
        raise ValueError("\n".join(failed))


def _is_stored(one, source) -> bool:
    """Whether a set is on disk; says so where it is not."""
    from wemmu_jax.data.sources import IndexedSource

    if stored := isinstance(source, IndexedSource):
        return stored
    print(f"{one.name}: drawn, nothing on disk")
    return False


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
