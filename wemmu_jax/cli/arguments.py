"""Arguments that several commands share, and the types of their values."""

import argparse
import math

from wemmu_jax.cli.requests import GUIDANCE, NOTE, SEEDS, STEPS
from wemmu_jax.shipped import MODEL


def whole(least: int, *, below: int | None = None):
    """A type for argparse: whole numbers from `least` on, `below` excluded."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}") from None
        if value < least or (below is not None and value >= below):
            limit = "" if below is None else f" and below {below}"
            raise argparse.ArgumentTypeError(f"expected at least {least}{limit}, found {value}")
        return value

    return number


def finite(text: str) -> float:
    """A type for argparse: a number that is neither infinite nor NaN."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, found {text!r}") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, found {text}")
    return value


def add_model(parser: argparse.ArgumentParser) -> None:
    """--checkpoint, --dtype."""
    parser.add_argument(
        "--checkpoint",
        default=str(MODEL),
        metavar="DIR",
        help=f"a training workdir, or a converted folder (default: {NOTE})",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of weights and large products (default: bfloat16)",
    )


def add_seed(parser: argparse.ArgumentParser) -> None:
    """--seed."""
    parser.add_argument(
        "--seed", type=whole(0, below=SEEDS), default=0, help="the same seed gives the same again"
    )


def add_steps(parser: argparse.ArgumentParser) -> None:
    """--steps."""
    parser.add_argument(
        "--steps", type=whole(1), default=STEPS, help=f"of the solver (default: {STEPS})"
    )


def add_canvas(parser: argparse.ArgumentParser, task: str) -> None:
    """What the drawing of one request of `task` can be told: where to, size, seed, steps, guidance."""
    parser.add_argument(
        "--out",
        default=".",
        metavar="DIR|FILE.png",
        help="where the picture lands, as PNG (default: here)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a picture that is there already"
    )
    for side in ("--height", "--width"):
        parser.add_argument(side, type=whole(1), metavar="PIXELS")
    add_seed(parser)
    add_steps(parser)
    for name in GUIDANCE[task]:
        flag = "--" + name.replace("_", "-")
        parser.add_argument(
            flag, type=finite, help="scale (default: the model's own, else the paper's)"
        )


def add_images(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """--image, once for each picture."""
    parser.add_argument(
        "--image", dest="images", action="append", default=[], metavar="FILE", required=required
    )


def shard(text: str) -> tuple[int, int]:
    """`2/8`: the third of eight."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"expected I/N with I below N, found {text!r}")
    return int(number), int(count)
