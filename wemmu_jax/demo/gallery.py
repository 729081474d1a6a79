"""One HTML page, complete in itself: loss curves of the stages, pictures, answers, scores."""

import base64
import html
import io
import pathlib
from collections.abc import Mapping, Sequence

from PIL import Image

Row = tuple[str, Sequence[Image.Image]]  # a caption, and pictures beside each other

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; color: #222; }
img { image-rendering: pixelated; height: 128px; margin: 0 6px 6px 0; vertical-align: middle; }
table { border-collapse: collapse; } td, th { padding: 2px 12px; text-align: left; }
svg { background: #fafafa; border: 1px solid #ddd; margin: 0 8px 8px 0; }
figure { margin: 0 0 1rem; } figcaption { color: #555; }
"""


def curve(title: str, losses: Sequence[float], *, width: int = 460, height: int = 180) -> str:
    """A polyline of losses as SVG, with its first and last value."""
    low, high = min(losses), max(losses)
    span = (high - low) or 1.0
    points = " ".join(
        f"{40 + (width - 50) * i / max(len(losses) - 1, 1):.1f},"
        f"{height - 20 - (height - 50) * (loss - low) / span:.1f}"
        for i, loss in enumerate(losses)
    )
    return (
        f'<svg width="{width}" height="{height}"><text x="40" y="18">{html.escape(title)}: '
        f"{losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps</text>"
        f'<text x="2" y="{height - 18}" font-size="10">{low:.2f}</text>'
        f'<text x="2" y="34" font-size="10">{high:.2f}</text>'
        f'<polyline points="{points}" fill="none" stroke="#1f6feb" stroke-width="1.5"/></svg>'
    )


def _picture(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, "PNG")
    text = base64.b64encode(data.getvalue()).decode()
    return f'<img src="data:image/png;base64,{text}" alt="">'


def _figures(rows: Sequence[Row]) -> str:
    return "".join(
        f"<figure>{''.join(map(_picture, pictures))}<figcaption>{html.escape(caption)}</figcaption>"
        "</figure>"
        for caption, pictures in rows
    )


def _scores(scores: Mapping[str, Mapping[str, float]]) -> str:
    lines = "".join(
        f"<tr><td>{html.escape(task)}</td><td>{html.escape(kind)}</td><td>{share:.2f}</td></tr>"
        for task, kinds in scores.items()
        for kind, share in kinds.items()
    )
    return f"<table><tr><th>task</th><th>kind</th><th>right</th></tr>{lines}</table>"


def write_gallery(
    path: pathlib.Path,
    *,
    note: str,
    losses: Mapping[str, Sequence[float]],
    sections: Mapping[str, Sequence[Row]],
    scores: Mapping[str, Mapping[str, float]],
) -> None:
    """Writes the page: `losses` of each stage, `sections` of pictures by title, `scores` by task and kind."""
    parts = [f"<h2>{html.escape(title)}</h2>{_figures(rows)}" for title, rows in sections.items()]
    curves = "".join(curve(stage, values) for stage, values in losses.items())
    path.write_text(
        "<!doctype html><meta charset=utf-8><title>WeMMU in JAX: demo</title>"
        f"<style>{_STYLE}</style><h1>WeMMU in JAX: demo</h1><p>{html.escape(note)}</p>"
        f"<h2>Training loss</h2>{curves}{''.join(parts)}<h2>Miniworld scores</h2>{_scores(scores)}\n",
        encoding="utf-8",
    )
