"""What the device can do: large products, one after the other, in both libraries."""

import functools

import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.side_by_side.inputs import normal
from benchmarks.side_by_side.pair import Pair
from benchmarks.side_by_side.parts import on_torch, tolerance
from benchmarks.side_by_side.timing import Row, Side
from wemmu_jax.ops.programs import jit

PRODUCTS = 16  # of one run, so that starting it and waiting for it take no part of its time


def peak(pair: Pair) -> Row:
    """x @ w @ w ... of square matrices in the compute type; torch.compile has nothing to do here."""
    side = pair.sizes.product
    x = normal(side, side, seed=1)
    weight = normal(side, side, seed=2) / np.float32(side**0.5)

    def multiplied(x, weight):
        for _ in range(PRODUCTS):
            x = x @ weight
        return x

    program = jit(multiplied)
    own = tuple(jnp.asarray(array, pair.sizes.dtype) for array in (x, weight))
    given = tuple(on_torch(pair, array) for array in (x, weight))

    @torch.no_grad()
    def theirs():
        return multiplied(*given)

    return Row(
        ours=Side(functools.partial(program, *own)),
        theirs={"eager": Side(theirs)},
        compared=lambda ours, theirs: [(ours, theirs)],
        tolerance=tolerance(pair),
        flops=2.0 * PRODUCTS * side**3,
    )
