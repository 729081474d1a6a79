"""`wemmu chat`: answers a question, about pictures or without any."""

import argparse

from wemmu_jax.cli.arguments import add_images, add_model, add_seed, finite, whole
from wemmu_jax.cli.requests import load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run` reads."""
    parser.add_argument("question", metavar="QUESTION")
    add_images(parser, required=False)
    add_model(parser)
    parser.add_argument("--max-new-tokens", type=whole(1), default=256, metavar="N")
    parser.add_argument("--temperature", type=finite, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--top-p", type=finite, help="draw among the tokens that reach p together")
    add_seed(parser)


def run(args: argparse.Namespace) -> None:
    """Prints the answer."""
    if args.top_p is not None and args.temperature == 0:
        raise ValueError("--top-p does nothing at --temperature 0 (greedy); give a temperature too")
    model = load_model(
        args.checkpoint, args.dtype, lambda bare: bare.check_chat(args.question, args.images)
    )
    answer = model.chat(
        args.question,
        images=args.images,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    print(answer)
