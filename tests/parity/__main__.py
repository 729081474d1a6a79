"""`python -m tests.parity [pattern]`: prints the parity table and the sabotage table; exit code 1 on a miss."""

import sys
import time

from tests import conftest  # noqa: F401  (the same JAX settings as in the tests)
from tests.parity.rows import all_cases, all_sabotage


def main() -> int:
    """Measures every row whose name contains the pattern, the slow ones too."""
    pattern = sys.argv[1] if len(sys.argv) > 1 else ""
    missed = 0
    for title, rows, sign in (("parity", all_cases(), "<="), ("sabotage", all_sabotage(), ">=")):
        print(f"\n{title:64} {'error':>9}    {'bound':>7}  {'s':>5}")
        for row in (r for r in rows if pattern in r.name):
            start = time.perf_counter()
            error = row.measure()
            bound = row.tolerance if sign == "<=" else 10 * row.tolerance
            good = error <= bound if sign == "<=" else error >= bound
            missed += not good
            mark = "" if good else "  MISSED"
            seconds = time.perf_counter() - start
            print(
                f"{row.name:64} {error:9.2e} {sign} {bound:7.0e}  {seconds:5.1f}{mark}", flush=True
            )
    print(f"\n{missed} rows missed" if missed else "\nall rows within their bounds")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
