"""`python -m tests.parity [pattern]`: the parity and the sabotage table, as Markdown; exit code 1 on a miss."""

import sys
import time
from collections.abc import Sequence

from tests import conftest  # noqa: F401  (the same JAX settings as in the tests)
from tests.parity.harness import Case, Sabotage
from tests.parity.rows import all_cases, all_sabotage


def _table(title: str, rows: Sequence[Case | Sabotage], *, factor: int, least: bool) -> int:
    """Measures and prints the rows, whose errors must be >= (`least`) or <= factor x tolerance; counts misses."""
    width = max(len(row.name) for row in rows)
    sign, missed = ">=" if least else "<=", 0
    print(
        f"| {title:{width}} | error   | bound    | s    |\n|{'-' * (width + 2)}|---------|----------|------|"
    )
    for row in rows:
        start = time.perf_counter()
        error, bound = row.measure(), factor * row.tolerance
        good = error >= bound if least else error <= bound
        missed += not good
        seconds = time.perf_counter() - start
        mark = "" if good else " **missed**"
        print(
            f"| {row.name:{width}} | {error:7.1e} | {sign} {bound:.0e} | {seconds:4.1f} |{mark}",
            flush=True,
        )
    print()
    return missed


def main() -> int:
    """Measures every row whose name contains the pattern, the slow ones too."""
    pattern = sys.argv[1] if len(sys.argv) > 1 else ""
    print("# Parity with transformers and diffusers\n")
    print(
        "Made by `make parity`: relative L2 error in float32 on CPU, random models without constant parameters.\n"
    )
    missed = 0
    for title, rows, factor in (("parity", all_cases(), 1), ("sabotage", all_sabotage(), 10)):
        chosen = [row for row in rows if pattern in row.name]
        if chosen:
            missed += _table(title, chosen, factor=factor, least=factor > 1)
    print(f"{missed} rows missed" if missed else "All rows are within their bounds.")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
