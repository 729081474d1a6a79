"""A stage, and the programs in `samples/`, which `make_samples.py` compiled for four chips of a v5p."""

import functools
import pathlib

import numpy as np

from wemmu_jax.planning.chips import CHIPS
from wemmu_jax.planning.predict import Predictor
from wemmu_jax.planning.program import Region, read_program
from wemmu_jax.planning.programs import Setting
from wemmu_jax.planning.torus import Torus

V5P = CHIPS["TPU v5"]
# As in `make_samples.py`, which cannot be imported where libtpu is missing.
OUTER, INNER, WIDTH, ROWS, DEVICES = 3, 4, 1024, 512, 4
LAYER_FLOPS = 2 * ROWS * WIDTH**2
WEIGHT_BYTES = 2 * WIDTH**2


def text(name: str) -> str:
    """Of the program `name`."""
    return (pathlib.Path(__file__).parent / f"samples/{name}.hlo").read_text()


@functools.cache
def program(name: str, taken: tuple[float, ...] = (0.0, 1.0)) -> Region:
    """Read, with its conditionals' branches taken so often."""
    return read_program(text(name), lambda op_name, count: taken)


def torus(*sides: int, cores: int = 1, slices: int = 1) -> Torus:
    """Of a v5p, the last axis running fastest."""
    places = np.array(list(np.ndindex(*sides, cores)) * slices)
    return Torus(places, np.repeat(np.arange(slices), len(places) // slices), V5P)


def predictor() -> Predictor:
    """Of the four chips."""
    return Predictor(torus(2, 2))


def setting(stage: str = "stage1", **overrides) -> Setting:
    """A stage of the paper on eight chips."""
    return Setting.of(f"configs/wemmu_3b.py:{stage}", overrides, topology="v5e:2x4")
