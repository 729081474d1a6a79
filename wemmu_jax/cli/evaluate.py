"""`wemmu evaluate`: draws a benchmark's pictures and scores them."""

import argparse
import dataclasses

from wemmu_jax.cli.arguments import add_model, add_seed, add_steps, whole
from wemmu_jax.cli.requests import load_model

BATCH = 16  # pictures drawn at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run` reads."""
    parser.add_argument("benchmark", choices=("miniworld",))
    add_model(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="the pictures and the scores")
    parser.add_argument("--count", type=whole(1), default=16, help="requests of each kind")
    add_seed(parser)
    add_steps(parser)


def run(args: argparse.Namespace) -> None:
    """Evaluates, and prints the scores as a table."""
    from wemmu_jax.evaluation.miniworld import evaluate

    model = dataclasses.replace(load_model(args.checkpoint, args.dtype), batch_size=BATCH)
    scores = evaluate(model, args.out, count=args.count, seed=args.seed, steps=args.steps)
    rows = _rows(scores)
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        print(f"{name:<{width}}  {text:>8}")


def _rows(scores: dict, prefix: str = "") -> list[tuple[str, object]]:
    """Nested scores as lines."""
    return [
        row
        for name, value in scores.items()
        for row in (
            _rows(value, f"{prefix}{name} / ")
            if isinstance(value, dict)
            else [(prefix + name, value)]
        )
    ]
