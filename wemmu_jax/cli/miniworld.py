"""`wemmu miniworld pretrain`: trains a backbone of the tiny preset."""

import argparse
import pathlib

from wemmu_jax.cli.arguments import whole

BACKBONES = ("vlm", "dc-ae", "sana")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run` reads."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    text = "trains a backbone of the tiny preset; `sana` reads what the two others wrote"
    pretrain = actions.add_parser("pretrain", help=text, description=text, allow_abbrev=False)
    pretrain.add_argument("backbone", choices=BACKBONES)
    pretrain.add_argument(
        "--out", required=True, type=pathlib.Path, metavar="DIR", help="DIR/vlm and DIR/sana"
    )
    pretrain.add_argument(
        "--workdir", required=True, type=pathlib.Path, metavar="DIR", help="checkpoints and metrics"
    )
    pretrain.add_argument("--seed", type=whole(0), default=0)
    pretrain.add_argument("--steps", type=whole(2), help="of training; the recipe's own by default")


def run(args: argparse.Namespace) -> None:
    """Trains, then writes the backbone as a Hugging Face folder."""
    from wemmu_jax.tiny.commands import pretrain_backbone

    pretrain_backbone(args.backbone, args.out, args.workdir, seed=args.seed, steps=args.steps)
