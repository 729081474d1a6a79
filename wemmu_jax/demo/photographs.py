"""A folder of real photographs with captions and simple edits, from those that scikit-image ships."""

import functools
import json
import pathlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

CAPTIONS = {
    "astronaut.png": "a photograph of an astronaut in an orange suit",
    "chelsea.png": "a photograph of a cat",
    "coffee.png": "a photograph of a cup of coffee on a table",
    "rocket.jpg": "a photograph of a rocket on its launch pad",
    "motorcycle_left.png": "a photograph of a motorcycle",
    "hubble_deep_field.jpg": "a photograph of galaxies",
}

EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "Make it black and white.": lambda image: ImageOps.grayscale(image).convert("RGB"),
    "Mirror the picture.": ImageOps.mirror,
    "Invert the colours.": ImageOps.invert,
    "Make it darker.": lambda image: ImageEnhance.Brightness(image).enhance(0.4),
}

ASPECTS = (0.5, 1.0, 2.0)  # height / width
CROPS = 6  # of each photograph and aspect
SIDE = 96  # pixels, square root of a crop's area


def write_photographs(folder: pathlib.Path, *, seed: int = 0) -> None:
    """Writes crops, edited crops and `captions.jsonl`, see `wemmu_jax.data.formats.lists.Folder`.

    Raises:
      FileNotFoundError: scikit-image is not installed.
    """
    originals = _photographs()
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, caption in CAPTIONS.items():
        for aspect in ASPECTS:
            size = (round(SIDE * aspect**0.5), round(SIDE / aspect**0.5))
            for number in range(CROPS):
                crop = _crop(originals[name], size, rng)
                stem = f"{pathlib.Path(name).stem}-{aspect}-{number}"
                crop.save(folder / f"{stem}.png")
                lines.append({"image": f"{stem}.png", "caption": caption})
                for place, (instruction, change) in enumerate(EDITS.items()):
                    change(crop).save(folder / f"{stem}-edit{place}.png")
                    lines.append(
                        {
                            "image": f"{stem}-edit{place}.png",
                            "instruction": instruction,
                            "sources": [f"{stem}.png"],
                        }
                    )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "captions.jsonl").write_text(text)


def random_crops(rng: np.random.Generator, count: int, size: tuple[int, int]) -> list[np.ndarray]:
    """Crops of the photographs, uint8[*size, 3] each.

    Raises:
      FileNotFoundError: scikit-image is not installed.
    """
    photographs = list(_photographs().values())
    chosen = rng.integers(len(photographs), size=count)
    return [np.asarray(_crop(photographs[i], size, rng)) for i in chosen]


@functools.cache
def _photographs() -> dict[str, Image.Image]:
    try:
        import skimage
    except ImportError as error:
        raise FileNotFoundError(
            "the photographs come with scikit-image: pip install scikit-image"
        ) from error
    folder = pathlib.Path(skimage.__file__).parent / "data"
    return {name: Image.open(folder / name).convert("RGB") for name in CAPTIONS}


def _crop(image: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """A random crop of half to all of what the aspect allows, at `size` (height, width)."""
    aspect = size[0] / size[1]
    height = min(image.height, image.width * aspect) * rng.uniform(0.5, 1)
    width = height / aspect
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    box = (left, top, left + width, top + height)
    return image.resize(size[::-1], Image.Resampling.LANCZOS, box=box)
