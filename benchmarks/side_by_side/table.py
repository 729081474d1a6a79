"""Results as a Markdown table between two marks of a page."""

import pathlib
import statistics
from collections.abc import Mapping

from benchmarks.side_by_side.timing import OURS, Result

HEAD = (
    "what",
    "this project, s",
    "torch eager, s",
    "compiled, s",
    "ratio to the better",
    "quartiles",
    "control",
    "bound",
    "TFLOP/s",
    "first run, s: ours, compiled",
    "error",
)
OVER_CONTROL = 1.05  # how much worse than the bare products' ratio a row of products may be


def bound(result: Result) -> float:
    """The most that the ratio may be."""
    if "control ours" in result.seconds:
        return OVER_CONTROL * result.ratio("control ours", "control torch")[0]
    return 1.0


def line(name: str, result: Result) -> str:
    """A row of the table."""
    middle = {side: statistics.median(times) for side, times in result.seconds.items()}
    ratio, low, high = result.ratio(OURS, result.best)
    control = "" if "control ours" not in middle else f"{bound(result) / OVER_CONTROL:.2f}"
    cells = [
        name,
        f"{middle[OURS]:.4g}",
        f"{middle['eager']:.4g}",
        f"{middle['compiled']:.4g}" if "compiled" in middle else "",
        f"{ratio:.2f}",
        f"{low:.2f} to {high:.2f}",
        control,
        f"{bound(result):.2f}" + ("" if ratio <= bound(result) else " **missed**"),
        f"{result.flops / middle[OURS] / 1e12:.3g}",
        f"{result.first[OURS]:.0f}, {result.first.get('compiled', float('nan')):.0f}",
        f"{result.error:.0e}",
    ]
    return "| " + " | ".join(cells) + " |"


def table(results: Mapping[str, Result | str], heading: str) -> str:
    """The section's text. A row that gave no result is its error."""
    lines = [heading, "", "| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    for name, result in results.items():
        if isinstance(result, str):
            lines.append(f"| {name} | {result} |" + " |" * (len(HEAD) - 2))
        else:
            lines.append(line(name, result))
    return "\n".join(lines) + "\n"


def write_section(page: pathlib.Path, name: str, text: str) -> None:
    """Puts `text` between `<!-- begin NAME -->` and `<!-- end NAME -->` of a page.

    Raises:
      ValueError: the page has no such marks.
    """
    begin, end = (f"<!-- {word} {name} -->" for word in ("begin", "end"))
    whole = page.read_text() if page.exists() else ""
    if begin not in whole or end not in whole:
        raise ValueError(f"{page}: expected the marks {begin} and {end}, to write between them")
    before, rest = whole.split(begin, 1)
    page.write_text(f"{before}{begin}\n\n{text}\n{end}{rest.split(end, 1)[1]}")
