"""What the commands that draw one picture have in common."""

import argparse

from wemmu_jax.cli.pictures import file_name, save, targets
from wemmu_jax.cli.requests import GUIDANCE, Request, load_model


def draw_one(args: argparse.Namespace, task: str, instruction: str) -> None:
    """Draws the picture that the arguments of `add_canvas` and `add_images` describe, and prints its path."""
    request = Request(
        task=task,
        instruction=instruction,
        images=tuple(args.images),
        height=args.height,
        width=args.width,
        seed=args.seed,
        steps=args.steps,
        guidance={name: getattr(args, name) for name in GUIDANCE[task]},
    )
    name = file_name(0, instruction or task, args.seed)
    [path] = targets(args.out, [name], overwrite=args.overwrite)
    model = load_model(args.checkpoint, args.dtype, request.size)
    picture = request.draw(model)
    size = (picture.height, picture.width)
    save(
        picture,
        path,
        request.settings(size, model, checkpoint=args.checkpoint, dtype=args.dtype),
    )
    print(path)
