"""`wemmu train`: one stage of the curriculum."""

import argparse
import os
import pathlib

from wemmu_jax.cli.arguments import whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run` reads; `--config.KEY=VALUE` reaches it as `args.overrides`."""
    parser.set_defaults(overrides={})
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE.py:STAGE",
        help="any key of it can be set: --config.batch.rows=64",
    )
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        help="checkpoints and logs; resumed if it is there",
    )
    parser.add_argument(
        "--init",
        metavar="DIR",
        help="converted weights, or the workdir of the stage before; a resumed run knows its own",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="trace a few steps with the JAX profiler, after some that warm up, into DIR/profile",
    )
    several = parser.add_argument_group(
        "several processes", "found out on TPU pods and under Slurm; elsewhere all three are needed"
    )
    for flag, variable, kind, metavar, text in (
        ("--coordinator", "JAX_COORDINATOR_ADDRESS", str, "HOST:PORT", "where process 0 listens"),
        ("--processes", "JAX_NUM_PROCESSES", whole(1), "N", "how many there are"),
        ("--process", "JAX_PROCESS_ID", whole(0), "I", "which of them this is, from 0"),
    ):
        several.add_argument(
            flag,
            type=kind,
            default=os.environ.get(variable),
            metavar=metavar,
            help=f"{text} (default: ${variable})",
        )
    several.add_argument(
        "--join-timeout",
        type=whole(1),
        default=os.environ.get("WEMMU_JOIN_TIMEOUT", "300"),
        metavar="SECONDS",
        help="that all may take to come; then exit code 75 (default: $WEMMU_JOIN_TIMEOUT, or 300)",
    )


def run(args: argparse.Namespace) -> None:
    """Trains to the stage's last step."""
    from wemmu_jax.sharding.processes import join

    join(args.coordinator, args.processes, args.process, timeout=args.join_timeout)
    from wemmu_jax.training.curriculum import load_config
    from wemmu_jax.training.loop import train

    config = load_config(args.config, args.overrides)
    init = args.init or config.init or _known_init(pathlib.Path(args.workdir))
    config.init = str(pathlib.Path(init).absolute()) if init else ""
    _keep_programs(pathlib.Path(args.workdir).absolute().parent / "compilation_cache")
    train(config, args.workdir, profile=args.profile)


def _keep_programs(folder: pathlib.Path) -> None:
    """What is compiled is kept in `folder` unless the environment names another, and short programs too: a stage has
    hundreds. Beside the workdir, where all processes see what the first one, which alone writes, has put there."""
    import jax

    for name, value in (
        ("jax_compilation_cache_dir", str(folder)),
        ("jax_persistent_cache_min_compile_time_secs", 0.0),
        ("jax_persistent_cache_min_entry_size_bytes", -1),
    ):
        if name.upper() not in os.environ:
            jax.config.update(name, value)


def _known_init(workdir: pathlib.Path) -> str:
    """What the run in `workdir` started from; empty if there is none."""
    from wemmu_jax.files import read_object

    known = workdir / "config.json"
    return read_object(known, keys=["init"])["init"] if known.is_file() else ""
