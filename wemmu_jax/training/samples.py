"""A grid of sample pictures: for each task a few held-out requests, what was asked for and what the model drew."""

import pathlib
from collections.abc import Callable, Mapping

import jax
import numpy as np
from PIL import Image

from wemmu_jax.data.tasks import Example, Task
from wemmu_jax.files import replacing
from wemmu_jax.inference.pipeline import WeMMU
from wemmu_jax.sharding.processes import is_first
from wemmu_jax.training.optimizer import merge

ROWS = 4  # pictures of each task
STEPS = 20


def draw_samples(
    run, params: Mapping, path: pathlib.Path, moved: Callable[[], object] = lambda: None
) -> np.ndarray | None:
    """Draws, writes a PNG and returns it, uint8[H, W, 3]: a line for each request: sources, target, drawn. None where
    all requests are longer than one may be. `moved` is told of each line.

    Of several processes all draw the same pictures together, each with its shards of the weights; the first writes.
    """
    model = WeMMU.from_params(
        run.trainer.model, merge(params, run.frozen), run.origin.backbones_folder
    )
    with jax.set_mesh(run.trainer.mesh):  # for the kernels of attention
        lines = _lines(run, model, moved)
    if not lines:
        return None
    width = max(line.shape[1] for line in lines)
    grid = np.concatenate(
        [np.pad(line, ((0, 4), (0, width - line.shape[1]), (0, 0))) for line in lines]
    )
    if is_first():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            Image.fromarray(grid).save(partial, format="PNG")
    return grid


def _lines(run, model: WeMMU, moved: Callable[[], object]) -> list[np.ndarray]:
    """A line for each held-out request."""
    side = run.config.data.resolution
    lines = []
    for task in Task:
        if run.held_out.mixture.get(task) and task is not Task.UNCOND:
            for number, example in enumerate(run.held_out.examples(task, ROWS)):
                if run.encoder.fits(example):
                    lines.append(_line(model, example, side, number))
                    moved()
    return lines


def _line(model: WeMMU, example: Example, side: int, number: int) -> np.ndarray:
    sources = [Image.fromarray(source.load(side, side)) for source in example.sources]
    common = {"height": side, "width": side, "seed": number, "steps": STEPS}
    match example.task:
        case Task.T2I:
            drawn = model.generate(example.text, **common)[0]
        case Task.REC:
            drawn = model.reconstruct(sources[0], **common)
        case Task.S_EDIT:
            drawn = model.edit(sources[0], example.text, **common)
        case Task.M_EDIT:
            drawn = model.compose(sources, example.text, **common)
    pictures = [*sources, example.target.load(side, side), drawn]
    return np.concatenate([np.asarray(picture) for picture in pictures], axis=1)
