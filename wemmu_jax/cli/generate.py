"""`wemmu generate`: pictures from text."""

import argparse

from wemmu_jax.cli.arguments import add_canvas, add_model
from wemmu_jax.cli.pictures import file_name, save, targets
from wemmu_jax.cli.requests import Request, load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run` reads."""
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="a caption; '' for none")
    add_model(parser)
    add_canvas(parser, "generate")


def run(args: argparse.Namespace) -> None:
    """Draws picture i under the seed for prompt i."""
    names = [file_name(i, prompt, args.seed) for i, prompt in enumerate(args.prompts)]
    paths = targets(args.out, names, overwrite=args.overwrite)
    guidance = {"guidance": args.guidance}
    common = (args.height, args.width, args.seed, args.steps, guidance)
    requests = [Request("generate", prompt, (), *common) for prompt in args.prompts]
    model = load_model(args.checkpoint, args.dtype, lambda bare: [r.size(bare) for r in requests])
    pictures = model.generate(
        args.prompts,
        height=args.height,
        width=args.width,
        seed=args.seed,
        steps=args.steps,
        guidance=args.guidance,
    )
    for number, (request, path, picture) in enumerate(zip(requests, paths, pictures, strict=True)):
        size = (picture.height, picture.width)
        settings = request.settings(size, model, checkpoint=args.checkpoint, dtype=args.dtype)
        save(picture, path, {**settings, "number": str(number)})
        print(path)
