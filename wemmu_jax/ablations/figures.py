"""Pictures for the tables: loss curves, attention maps, answers side by side."""

import itertools
import pathlib
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from wemmu_jax.evaluation.attention import GROUPS

# What begins there; the first two are the paper's colours.
_LINES = {"vae": "tab:blue", "text": "tab:red", "template": "tab:green"}


def curves(
    path: pathlib.Path,
    lines: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    *,
    label: str,
    scale: str = "log",
) -> None:
    """One line for each name: (steps, values). `scale` as in matplotlib: "log" for losses, "linear" for shares."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, (steps, values) in lines.items():
        axes.plot(steps, values, label=name, linewidth=1.2)
    axes.set(xlabel="optimizer step", ylabel=label, yscale=scale)
    # Losses fall by less than ten times, and a log axis names powers of ten alone.
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", fontsize="small")
    _save(figure, path)


def maps(path: pathlib.Path, found: Mapping[str, tuple[np.ndarray, Sequence[str]]]) -> None:
    """Attention from queries (rows) to prompt tokens (columns), each map with its tokens' groups."""
    figure, every = plt.subplots(
        len(found), 1, figsize=(8, 1.8 * len(found)), layout="constrained", squeeze=False
    )
    for axes, (name, (attention, groups)) in zip(every[:, 0], found.items(), strict=True):
        # A few tokens draw much more than all others, which could not be told apart on one scale with them.
        axes.imshow(attention, aspect="auto", vmax=np.quantile(attention, 0.99), cmap="magma")
        for column, (before, group) in enumerate(itertools.pairwise(groups), 1):
            if group != before and group in _LINES:
                axes.axvline(column - 0.5, color=_LINES[group], linewidth=1.2)
        shares = ", ".join(f"{name} {groups.count(name)}" for name in GROUPS if name in groups)
        axes.set_title(f"{name} ({shares} tokens)", fontsize="small")
        axes.set_ylabel("queries", fontsize="small")
    _save(figure, path)


def smoothed(values: Sequence[float], *, window: int) -> np.ndarray:
    """The mean of the last `window` values at each place."""
    sums = np.cumsum(np.insert(np.asarray(values, float), 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def sheet(
    path: pathlib.Path, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[Image.Image]]]
) -> None:
    """A table of pictures under `heads`, each row with its text."""
    figure, every = plt.subplots(
        len(rows),
        len(heads),
        figsize=(1.3 * len(heads), 1.55 * len(rows)),
        gridspec_kw={"left": 0.01, "right": 0.99, "bottom": 0.01, "wspace": 0.05, "hspace": 0.2},
        squeeze=False,
    )
    for line, (text, pictures) in zip(every, rows, strict=True):
        for axes, picture in zip(line, pictures, strict=True):
            axes.imshow(np.asarray(picture), interpolation="nearest")
            axes.set_axis_off()
        line[0].set_title(text, fontsize=7, loc="left")
    for number, head in enumerate(heads):
        every[0, number].text(
            0.5, 1.25, head, transform=every[0, number].transAxes, ha="center", fontsize=8
        )
    _save(figure, path)


def _save(figure, path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
