"""`wemmu train`: one stage of the curriculum."""

import argparse
import pathlib


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run` reads; `--config.KEY=VALUE` reaches it as `args.overrides`."""
    parser.set_defaults(overrides={})
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE.py:STAGE",
        help="any key of it can be set: --config.optimizer.steps=60",
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


def run(args: argparse.Namespace) -> None:
    """Trains to the stage's last step."""
    from wemmu_jax.training.curriculum import load_config
    from wemmu_jax.training.loop import train

    config = load_config(args.config, args.overrides)
    init = args.init or config.init or _known_init(pathlib.Path(args.workdir))
    config.init = str(pathlib.Path(init).absolute()) if init else ""
    train(config, args.workdir)


def _known_init(workdir: pathlib.Path) -> str:
    """What the run in `workdir` started from; empty if there is none."""
    from wemmu_jax.files import read_object

    known = workdir / "config.json"
    return read_object(known, keys=["init"])["init"] if known.is_file() else ""
