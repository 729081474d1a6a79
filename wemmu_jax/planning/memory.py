"""Memory a chip, by kind: what lies there all the time, and what the largest program needs beside it."""

import math
from collections.abc import Mapping

import jax

from wemmu_jax.planning.programs import Compiled, Key, Setting


def bytes_a_chip(tree) -> int:
    """Of abstract arrays with shardings, without the padding of tiles."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "sharding")]
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )


def resident(setting: Setting) -> dict[str, int]:
    """Kind -> bytes a chip that lie there between programs, micro-batches apart."""
    run = setting.run
    state = run.trainer.abstract_state
    trainable = bytes_a_chip(run.trainable)
    return {
        "trainable weights": trainable,
        "optimizer": bytes_a_chip(state) - trainable,
        "gradients": trainable,
        "frozen weights": bytes_a_chip(run.frozen),
    }


def memory(setting: Setting, programs: Mapping[Key, Compiled]) -> dict[str, int]:
    """Kind -> bytes a chip while the largest program runs. Two micro-batches are there: the next one is sent while
    one is worked on."""
    widest = max((key for key in programs if key.name == "accumulate"), key=lambda key: key.arity)
    run, beside = setting.run, max(one.beside_arguments for one in programs.values())
    batch = run.batch(widest.bucket, arity=widest.arity, text_length=setting.text_length)
    pixels = run.pixels(widest.bucket, arity=widest.arity)
    return resident(setting) | {
        "two micro-batches": 2 * (bytes_a_chip(batch) + bytes_a_chip(pixels)),
        "temporaries": beside,
    }


def what_fits(setting: Setting, temporaries: int, available: float) -> str:
    """What would work where a stage needs too much: fewer rows if the weights leave room for any, else more `fsdp`."""
    mesh = setting.run.trainer.mesh
    devices, rows = mesh.size, setting.config.batch.rows
    room = available - sum(resident(setting).values())
    fitting = int(rows / devices * room / temporaries) if temporaries else 0
    if room > 0 and fitting:
        return f"about batch.rows={fitting * devices} would (--search looks for what is fastest)"
    wider = [n for n in range(1, devices + 1) if devices % n == 0 and n > mesh.shape["fsdp"]]
    weights = sum(resident(setting).values()) * mesh.shape["fsdp"]
    # Weights alone; what is copied to every chip does not shrink, and so a little more may be needed.
    enough = next((n for n in wider if weights / n < 0.75 * available), None)
    if room <= 0 and enough:
        return f"mesh.fsdp={enough} would leave room beside the weights"
    return "a full remat, one row a chip, or more chips may"
