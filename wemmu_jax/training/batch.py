"""A micro-batch on the device: one bucket, one arity. B rows, n source pictures."""

import functools
from collections.abc import Callable
from typing import TypeVar

import flax.struct
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from wemmu_jax.data.pipeline import MicroBatch
from wemmu_jax.data.tasks import Task
from wemmu_jax.models.qwen2_5_vl.images import PackedImages
from wemmu_jax.models.wemmu.batch import PromptBatch
from wemmu_jax.models.wemmu.inputs import RowEncoder, prompt_batch
from wemmu_jax.sharding.rules import replicated, rows_sharding


@flax.struct.dataclass
class Pixels:
    """Pictures as the host hands them over.

    Attributes:
      target: what the DC-AE encodes, uint8[B, H, W, 3]; or latents float16[B, h, w, C] that were cached.
      sources: for each source the same, uint8[B, 32 gh, 32 gw, 3] or float16[B, gh, gw, C].
      vit: what the ViT reads, uint8[B * n, 28 gh, 28 gw, 3], or None without sources.
    """

    target: jax.Array
    sources: tuple[jax.Array, ...]
    vit: jax.Array | None


@flax.struct.dataclass
class TrainBatch:
    """Everything that the loss of one micro-batch reads.

    Attributes:
      number: uint32[], which micro-batch of the run this is.
      sample_numbers: uint32[B], global sample numbers; all that is drawn for a row folds them in.
      picture_ids: uint32[B], equal where two rows draw the same picture.
      unconditional: bool[B], rows that take no contrastive negative.
      prompt: B prompts.
      images: [B * n, ...] for the ViT, or None without sources and until packed.
      place: int32[B, n * S], see `Sources`.
      target: float32[B, h, w, C], latents of the picture to be drawn; with `source_latents` None until encoded.
      source_latents: for each of the n pictures float32[B, gh, gw, C].
      grid: rows and columns of the queries; static.
      query_tokens: Q, static.
    """

    number: jax.Array
    sample_numbers: jax.Array
    picture_ids: jax.Array
    unconditional: jax.Array
    prompt: PromptBatch
    images: PackedImages | None
    place: jax.Array
    target: jax.Array | None
    source_latents: tuple[jax.Array, ...] | None
    grid: tuple[int, int] = flax.struct.field(pytree_node=False)
    query_tokens: int = flax.struct.field(pytree_node=False)


def train_batch(
    micro_batch: MicroBatch, *, grid: tuple[int, int], query_tokens: int
) -> tuple[TrainBatch, Pixels]:
    """This process's rows of a micro-batch, still numpy, and its pictures, not encoded yet."""
    arrays = micro_batch.arrays
    batch = TrainBatch(
        number=np.uint32(micro_batch.number),
        sample_numbers=np.asarray(micro_batch.sample_numbers, np.uint32),
        picture_ids=arrays["picture_id"],
        unconditional=np.asarray([task is Task.UNCOND for task in micro_batch.tasks]),
        prompt=prompt_batch(arrays),
        images=None,
        place=arrays["place"],
        target=None,
        source_latents=None,
        grid=grid,
        query_tokens=query_tokens,
    )
    if not micro_batch.arity:
        return batch, Pixels(arrays["target"], (), None)
    sources = tuple(np.moveaxis(arrays["source_pixels"], 1, 0))
    vit = arrays["vit_pixels"]
    return batch, Pixels(arrays["target"], sources, vit.reshape(-1, *vit.shape[2:]))


def packer(encoder: RowEncoder, mesh: Mesh) -> Callable[[jax.Array], PackedImages]:
    """The program that makes `TrainBatch.images` of `Pixels.vit`."""
    return jax.jit(encoder.pack_pixels, out_shardings=rows_sharding(mesh))


Host = TypeVar("Host", TrainBatch, Pixels, dict[str, np.ndarray])


def batch_shardings(tree: Host, mesh: Mesh) -> Host:
    """Where the leaves of a micro-batch lie: rows over all devices."""

    def one(path: tuple, leaf: np.ndarray) -> NamedSharding:
        name = getattr(path[-1], "name", getattr(path[-1], "key", ""))
        if name == "number":
            return replicated(mesh)
        return rows_sharding(mesh, axis=1 if name == "position_ids" else 0)

    return jax.tree_util.tree_map_with_path(one, tree)


def on_devices(tree: Host, mesh: Mesh) -> Host:
    """The global arrays of which every process hands in its own rows."""
    put = jax.make_array_from_process_local_data
    return jax.tree.map(put, batch_shardings(tree, mesh), tree)


def on_every_process(tree: Host, mesh: Mesh) -> Host:
    """Rows of which every process hands in its own, whole on each; devices do it in their turn, nobody waits."""
    return _copied(mesh)(on_devices(tree, mesh))


@functools.lru_cache(maxsize=4)
def _copied(mesh: Mesh) -> Callable:
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))
