"""Writes golden files, see the package."""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # the TPUs are not there

from tests.planning.golden import CASES, described
from wemmu_jax.files import write_json

names = list(CASES) if sys.argv[1:] == ["all"] else sys.argv[1:]
if unknown := [name for name in names if name not in CASES]:
    sys.exit(f"no case {unknown[0]!r}; there are\n  " + "\n  ".join(CASES))
if not names:
    for name, case in CASES.items():
        print(name, case.file if case.file.exists() else "not planned yet")
for name in names:
    write_json(CASES[name].file, described(CASES[name].plan()))
    print(CASES[name].file)
