"""`wemmu reconstruct`: the same picture again."""

import argparse

from wemmu_jax.cli.arguments import add_canvas, add_images, add_model
from wemmu_jax.cli.drawing import draw_one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run` reads."""
    add_images(parser, required=True)
    add_model(parser)
    add_canvas(parser, "reconstruct")


def run(args: argparse.Namespace) -> None:
    """Draws; the size is the bucket nearest to the source unless one is given."""
    draw_one(args, "reconstruct", "")
