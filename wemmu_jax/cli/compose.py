"""`wemmu compose`: several pictures and an instruction -> a picture."""

import argparse

from wemmu_jax.cli.arguments import add_canvas, add_images, add_model
from wemmu_jax.cli.drawing import draw_one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run` reads."""
    parser.add_argument("instruction", metavar="INSTRUCTION")
    add_images(parser, required=True)
    add_model(parser)
    add_canvas(parser, "compose")


def run(args: argparse.Namespace) -> None:
    """Draws; the size is the bucket nearest to the first picture unless one is given."""
    draw_one(args, "compose", args.instruction)
