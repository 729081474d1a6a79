"""`python -m wemmu_jax` is `wemmu`."""

import sys

from wemmu_jax.cli.main import main

sys.exit(main())
