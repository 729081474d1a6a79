"""Memory a chip, by kind: what lies there all the time, and what the largest program needs beside it."""

import itertools
import math
from collections.abc import Mapping

import jax

from wemmu_jax.planning.programs import Compiled, Key, Setting
from wemmu_jax.sharding.mesh import row_shards


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
    """Kind -> bytes a chip while the largest program runs. The micro-batches of two steps are there: those of the next
    are sent while one is worked on."""
    widest = max((key for key in programs if key.name == "accumulate"), key=lambda key: key.arity)
    each = setting.config.batch.micro_batches
    run, beside = setting.run, max(one.beside_arguments for one in programs.values())
    batch = run.batch(widest.bucket, arity=widest.arity, text_length=setting.text_length)
    pixels = run.pixels(widest.bucket, arity=widest.arity)
    return resident(setting) | {
        "micro-batches": 2 * each * (bytes_a_chip(batch) + bytes_a_chip(pixels)),
        "temporaries": beside,
    }


def what_fits(setting: Setting, temporaries: float, available: float) -> str:
    """What would work where a stage needs more than `available` bytes a device.

    Fewer rows if there is room beside the weights, else weights cut into more parts. An estimate: temporaries are
    taken to grow with the rows, weights to shrink with `fsdp`.
    """
    mesh, rows, weights = setting.run.trainer.mesh, setting.config.batch.rows, resident(setting)
    parts = row_shards(mesh)
    room = available - sum(weights.values())
    fitting = int(rows / parts * room / temporaries) if room > 0 and temporaries else 0
    # Those of now do not fit, though the micro-batches themselves may be all that is too much.
    if fitting := min(fitting, rows // parts - 1):
        return f"about batch.rows={fitting * parts} would; --search looks for what is fastest"
    doublings = next(
        n
        for n in itertools.count(1)
        if 2**n * available > 1.5 * sum(weights.values()) * mesh.shape["fsdp"]
    )
    if 2**doublings > mesh.shape["fsdp"]:
        in_slice = mesh.size // setting.slices // mesh.shape["sequence"] // mesh.shape["tensor"]
        where = (
            "" if in_slice % 2**doublings == 0 else f" on slices of {2**doublings} devices and more"
        )
        return f"mesh.fsdp={2**doublings}{where} would leave room beside the weights"
    return "model.remat=full, more chips, or larger ones may"
