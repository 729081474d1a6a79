"""Pictures that tell each other apart, and what the formats' own tools make of them."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from wemmu_jax.data.sources import build_source

# (height, width) and grey level of the pictures of every fixture.
PICTURES = {f"p{number}": ((24 + 8 * number, 40), 30 * number) for number in range(6)}


def picture(name: str, format: str = "PNG") -> bytes:
    """The encoded picture of that name."""
    (height, width), grey = PICTURES[name]
    out = io.BytesIO()
    Image.new("RGB", (width, height), (grey, 10, 10)).save(out, format)
    return out.getvalue()


@pytest.fixture
def pictures(tmp_path):
    """A folder with all of them as PNG."""
    for name in PICTURES:
        (tmp_path / f"{name}.png").write_bytes(picture(name))
    return tmp_path


def shown(picture) -> str:
    """Which of PICTURES a loaded `Picture` is: by its own size and by its pixels."""
    pixels = picture.load(8, 8)
    assert np.ptp(pixels[..., 0].astype(int)) <= 2
    sizes = {(size, grey): name for name, (size, grey) in PICTURES.items()}
    near = {
        (picture.height, picture.width, g) for g in range(256) if abs(g - int(pixels[0, 0, 0])) < 12
    }
    return next(name for (size, grey), name in sizes.items() if (*size, grey) in near)


def records(spec) -> list[tuple[str, str, str, tuple[str, ...]]]:
    """(key, text, target, sources) of every record of a data set."""
    source = build_source(spec)
    found = [source[number] for number in range(len(source))]
    assert source.sizes().tolist() == [[r.target.height, r.target.width] for r in found]
    assert source.source_counts().tolist() == [len(r.sources) for r in found]
    return [(r.key, r.text, shown(r.target), tuple(map(shown, r.sources))) for r in found]


def write_json(path, value, *, lines=False) -> str:
    """A JSON array or an object a line; its path."""
    text = "".join(json.dumps(row) + "\n" for row in value) if lines else json.dumps(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)
