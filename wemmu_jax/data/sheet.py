"""A sheet of samples as training sees them: an HTML page that needs no other file."""

import base64
import html
import io
import pathlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from wemmu_jax.data.pipeline import MicroBatches
from wemmu_jax.data.rows import Row
from wemmu_jax.data.tasks import Example

ROWS = 4  # of each micro-batch: it has one arity and one bucket, so that others are worth more than the rest of it
SIDE = 192  # pixels of a picture's longer side on the page

_STYLE = (
    "body{font:14px sans-serif;margin:2em}table{border-collapse:collapse}td{border-top:1px solid #ccc;"
    "padding:.5em;vertical-align:top}code{white-space:pre-wrap}"
)


def write_sheet(
    page: pathlib.Path,
    data: MicroBatches,
    *,
    count: int,
    source_size: Callable[[int, int], tuple[int, int]] = lambda height, width: (height, width),
) -> int:
    """Draws a few rows of each of the first micro-batches, and says what could not be used in their place.

    Args:
      page: the HTML file.
      data: whose order is shown; its `text_length` counts the tokens.
      count: of rows.
      source_size: (height, width) of a target -> that of its sources as the DC-AE sees them.

    Returns:
      How many rows are on the page.

    Raises:
      ValueError: nothing can be used for a row.
    """
    lines, number = [], 0
    while len(lines) < count:
        bucket = data.buckets[data.plan(number).bucket]
        size = source_size(bucket.height, bucket.width)
        # Not the first ones: where rows fill whole turns of the tasks, these would always be of the same task.
        rows = np.random.default_rng(number).permutation(data.rows)[: min(ROWS, count - len(lines))]
        for example, row in data.sample(number, sorted(rows.tolist())):
            lines.append(_line(data, number, example, row, bucket, size))
        number += 1
    text = (
        f"<!doctype html><meta charset=utf-8><title>samples</title><style>{_STYLE}</style>"
        f"<h1>{len(lines)} samples, micro-batches 0 to {number - 1}</h1><table>{''.join(lines)}</table>\n"
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")
    return len(lines)


def _line(data, number: int, example: Example, row: Row, bucket, size) -> str:
    about = (
        f"{number} · {example.task.value}<br>{html.escape(row.key)}<br>"
        f"{bucket.height} x {bucket.width}<br>{data.text_length(example)} tokens"
    )
    for bad in row.bad:
        what = f"in the place of {bad.data_set}/{bad.key}: {bad.reason}"
        about += f"<br><b>{html.escape(what)}</b>"
    try:
        sources = "".join(_image(source.load(*size)) for source in example.sources)
        drawn = example.target
        target = "" if drawn is None else _image(drawn.load(bucket.height, bucket.width))
    except (ValueError, OSError) as error:  # of a picture whose cached latents will do
        sources, target = "", f"<b>not drawn: {html.escape(str(error))}</b>"
    said = (
        f"<code>{html.escape(text)}</code>" if text else "<i>empty</i>" for text in example.texts
    )
    return f"<tr><td>{about}<td>{sources}<td>{'<br>'.join(said)}<td>{target}"


def _image(pixels) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}">'
