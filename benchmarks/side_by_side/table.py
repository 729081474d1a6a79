"""Results as a Markdown table between two marks of a page."""

import dataclasses
import pathlib

from benchmarks.side_by_side.sizes import Sizes
from benchmarks.side_by_side.timing import OURS, Result

PEAK = "peak"  # the row that tells what the device can do; it has no bound
BOUND, MFU, SPEED = "bound", "MFU", "pictures/s"
HEAD = (
    "what",
    "this project, s",
    "torch eager, s",
    "compiled, s",
    "ratio to the better",
    "quartiles",
    "control",
    BOUND,
    "TFLOP/s",
    MFU,
    SPEED,
    "first run, s: ours, compiled",
    "error",
)
OVER_CONTROL = (
    1.05  # how much worse than the bare products' ratio a row of products may be on a CPU
)
CONTROLS = "control ours", "control torch"


def bound(result: Result, device: str) -> float:
    """The most that the ratio may be on "cpu" or "cuda"."""
    if device == "cpu" and CONTROLS[0] in result.seconds:
        return OVER_CONTROL * result.ratio(*CONTROLS)[0]
    return 1.0


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows of one run.

    Attributes:
      sizes: of the comparison, and what is asked of it.
      results: by row; of one that gave none, its error.
    """

    sizes: Sizes
    results: dict[str, Result | str] = dataclasses.field(default_factory=dict)

    @property
    def peak(self) -> float | None:
        """FLOP/s of the faster library's products; None while they have not been measured."""
        found = self.results.get(PEAK)
        if not isinstance(found, Result):
            return None
        return found.flops / min(found.median(side) for side in found.seconds)

    @property
    def said_of_peak(self) -> str:
        """A sentence."""
        if self.peak is None:
            return "Nobody knows the device's peak."
        side = self.sizes.product
        what = f"the faster library's products of {side} x {side} matrices"
        return f"Peak: {self.peak / 1e12:.4g} TFLOP/s, {what}."

    def mfu(self, name: str) -> float | None:
        """The model's FLOP/s by formula over the peak."""
        if self.peak is None:
            return None
        result = self.results[name]
        return result.flops / result.median(OURS) / self.peak

    def asked(self, name: str) -> dict[str, float]:
        """Column -> the least that there should be."""
        sizes, asked = self.sizes, {}
        if sizes.training_mfu and name.startswith("stage"):
            asked[MFU] = sizes.training_mfu
        if sizes.pictures_per_second and name == "T2I":
            asked[SPEED] = sizes.pictures_per_second
        return asked

    def missed(self, name: str) -> set[str]:
        """Columns in which a row falls short, MFU too where it cannot be told; of one without a result its name."""
        result = self.results[name]
        if isinstance(result, str):
            return {name}
        found = {MFU: self.mfu(name) or 0.0, SPEED: result.pictures / result.median(OURS)}
        short = {what for what, least in self.asked(name).items() if found[what] < least}
        too_slow = result.ratio(OURS, result.best)[0] > bound(result, self.sizes.device)
        return short | ({BOUND} if too_slow and name != PEAK else set())

    @property
    def head(self) -> str:
        """The names of the columns."""
        return "| " + " | ".join(HEAD) + " |"

    def line(self, name: str) -> str:
        """A row."""
        result = self.results[name]
        if isinstance(result, str):
            return f"| {name} | {result} |" + " |" * (len(HEAD) - 2)
        missed, asked, mfu = self.missed(name), self.asked(name), self.mfu(name)
        ratio, low, high = result.ratio(OURS, result.best)
        speed = result.pictures / result.median(OURS)

        def told(column: str, text: str) -> str:
            least = f" of {asked[column]}" if column in asked else ""
            return text + least + (" **missed**" if column in missed else "")

        cells = [
            name,
            f"{result.median(OURS):.4g}",
            f"{result.median('eager'):.4g}",
            f"{result.median('compiled'):.4g}" if "compiled" in result.seconds else "",
            f"{ratio:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{result.ratio(*CONTROLS)[0]:.2f}" if CONTROLS[0] in result.seconds else "",
            "" if name == PEAK else told(BOUND, f"{bound(result, self.sizes.device):.2f}"),
            f"{result.flops / result.median(OURS) / 1e12:.3g}",
            told(MFU, "?" if mfu is None else f"{mfu:.2f}"),
            told(SPEED, f"{speed:.2f}") if result.pictures else "",
            ", ".join(f"{result.first[s]:.0f}" for s in (OURS, "compiled") if s in result.first),
            f"{result.error:.0e}",
        ]
        return "| " + " | ".join(cells) + " |"

    def text(self, heading: str) -> str:
        """The section's text."""
        lines = [heading, "", self.head, "|---" * len(HEAD) + "|"]
        return "\n".join([*lines, *map(self.line, self.results)]) + "\n"


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
