"""`python -m tests.parity [pattern]`: the parity and the sabotage table, as Markdown on stdout, rows as they come on
stderr; exit code 1 on a miss."""

import sys
import time
from collections.abc import Sequence

from tests import conftest  # noqa: F401  (the same JAX settings as in the tests)
from tests.parity.harness import Case, Sabotage
from tests.parity.rows import modules, release


def _measure(rows: Sequence[Case | Sabotage], *, factor: int, least: bool) -> tuple[list[str], int]:
    """Lines of the table, and how many errors are not >= (`least`) or <= factor x tolerance."""
    sign, missed, lines = ">=" if least else "<=", 0, []
    for row in rows:
        start = time.perf_counter()
        error, bound = row.measure(), factor * row.tolerance
        good = error >= bound if least else error <= bound
        missed += not good
        seconds = time.perf_counter() - start
        mark = "" if good else " **missed**"
        lines.append(f"| {row.name} | {error:.1e} | {sign} {bound:.0e} | {seconds:.1f} |{mark}")
        print(lines[-1], file=sys.stderr, flush=True)
    return lines, missed


def main() -> int:
    """Measures every row whose name contains the pattern, the slow ones too."""
    pattern = sys.argv[1] if len(sys.argv) > 1 else ""
    parity, sabotage, missed = [], [], 0
    for module in modules():
        for lines, rows, factor in (
            (parity, module.cases(), 1),
            (sabotage, module.sabotage(), 10),
        ):
            chosen = [row for row in rows if pattern in row.name]
            new, misses = _measure(chosen, factor=factor, least=factor > 1)
            lines += new
            missed += misses
        release(module)
    head = "| {} | error | bound | s |\n|---|---|---|---|"
    print("# Parity with transformers and diffusers\n")
    print(
        "Made by `make parity`: relative L2 error in float32 on CPU, random models without constant parameters;"
    )
    print("in the second table our side is broken on purpose.\n")
    print(head.format("parity"), *parity, "", head.format("sabotage"), *sabotage, "", sep="\n")
    print(f"{missed} rows missed" if missed else "All rows are within their bounds.")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
