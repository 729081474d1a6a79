"""What a user asks a model for, in one form for the commands and for the lines of `wemmu batch`."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import wemmu_jax
from wemmu_jax.shipped import MODEL

if TYPE_CHECKING:
    from PIL import Image

    from wemmu_jax.inference.pipeline import WeMMU

STEPS = 20
# Each task's keyword arguments in `WeMMU`, and the model's scale (`diffusion.guidance.Scales`) that each is by default.
GUIDANCE: Mapping[str, Mapping[str, str]] = {
    "generate": {"guidance": "generate"},
    "edit": {"image_guidance": "image", "edit_guidance": "edit"},
    "compose": {"guidance": "compose"},
    "reconstruct": {"guidance": "reconstruct"},
}
TASKS = (*GUIDANCE, "chat")
SEEDS = 2**32
NOTE = "the tiny model that comes with the package, which knows miniworld and nothing else"


@dataclasses.dataclass(frozen=True)
class Request:
    """One picture to be drawn.

    Attributes:
      task: a key of `GUIDANCE`.
      instruction: the caption or instruction; empty for `reconstruct`.
      images: paths of the source pictures.
      height, width: pixels, None for the task's default.
      seed: of all noise.
      steps: of the solver.
      guidance: the task's scales; one that is missing or None is the model's own.
    """

    task: str
    instruction: str
    images: tuple[str, ...]
    height: int | None
    width: int | None
    seed: int
    steps: int
    guidance: Mapping[str, float | None]

    def __post_init__(self) -> None:
        check_images(self.task, len(self.images))
        for path in self.images:  # each is written beside the picture
            try:
                path.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{path!r}: expected a path in Unicode") from None

    def size(self, model: "WeMMU") -> tuple[int, int]:
        """(height, width) of the picture; raises what drawing it would raise. The model needs no weights."""
        return model.check(self.instruction, self.images, height=self.height, width=self.width)

    def draw(self, model: "WeMMU") -> "Image.Image":
        """The picture."""
        how = {"height": self.height, "width": self.width, "seed": self.seed, "steps": self.steps}
        how |= self.guidance
        match self.task:
            case "generate":
                return model.generate(self.instruction, **how)[0]
            case "edit":
                return model.edit(self.images[0], self.instruction, **how)
            case "compose":
                return model.compose(self.images, self.instruction, **how)
            case "reconstruct":
                return model.reconstruct(self.images[0], **how)

    def settings(
        self, size: tuple[int, int], model: "WeMMU", *, checkpoint: str, dtype: str
    ) -> dict[str, str]:
        """All that is needed to draw the picture again, as the PNG's metadata. The model needs no weights."""
        given = {name: scale for name, scale in self.guidance.items() if scale is not None}
        own = {name: getattr(model.scales, field) for name, field in GUIDANCE[self.task].items()}
        values: dict[str, Any] = {
            "task": self.task,
            "prompt": self.instruction,
            "images": json.dumps(self.images, ensure_ascii=False),
            "height": size[0],
            "width": size[1],
            "seed": self.seed,
            "steps": self.steps,
            **own,
            **given,
            "checkpoint": pathlib.Path(checkpoint),
            "weights": model.identity,
            "dtype": dtype,
            "wemmu": wemmu_jax.__version__,
        }
        return {name: str(value) for name, value in values.items()}


def check_images(task: str, count: int) -> None:
    """Raises ValueError if `task` cannot be done with `count` pictures."""
    least, most = {"generate": (0, 0), "compose": (2, None), "chat": (0, None)}.get(task, (1, 1))
    if count < least or (most is not None and count > most):
        wanted = f"{least}" if least == most else f"at least {least}"
        raise ValueError(f"{task}: expected {wanted} pictures, found {count}")


def load_model(
    checkpoint: str, dtype: str, check: Callable[["WeMMU"], object] | None = None
) -> "WeMMU":
    """The model. `check` sees it before its weights are read, so that a bad request fails at once."""
    from wemmu_jax.inference.pipeline import WeMMU

    if checkpoint == str(MODEL):
        print(f"without --checkpoint: {NOTE}", file=sys.stderr)
    if check is not None:
        check(WeMMU.without_weights(checkpoint, dtype=dtype))
    return WeMMU.load(checkpoint, dtype=dtype)
