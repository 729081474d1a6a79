"""The latents of everything that a stage trains on, computed beforehand: `wemmu data encode`.

What there is to compute follows from the stage's config, and the order in which it is cut into parts too; so any
number of hosts may share the work, each with every n-th part, and a part that is there is not computed again. The
folder says which pictures its parts are cut from, and does not go on with others.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import ml_collections
import numpy as np

from wemmu_jax.conversion.memory import nest
from wemmu_jax.data import features
from wemmu_jax.data.indexing import Progress
from wemmu_jax.data.pipeline import MicroBatches
from wemmu_jax.data.records import Picture
from wemmu_jax.data.sources import IndexedSource
from wemmu_jax.data.tasks import Task, make_example
from wemmu_jax.models.wemmu.config import WeMMUConfig
from wemmu_jax.models.wemmu.inputs import RowEncoder
from wemmu_jax.models.wemmu.modeling import WeMMUModel
from wemmu_jax.ops.programs import jit
from wemmu_jax.training.curriculum import Stage
from wemmu_jax.training.origin import Origin
from wemmu_jax.training.run import prepare_data

PART = 512  # pictures


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """Pictures that the DC-AE reads at one size.

    Attributes:
      size: (height, width) in pixels.
      source: the data set.
      task: what its records are used for.
      picture: 0 for an example's target, n for its n-th source.
      records: int[n], numbers of the records.
    """

    size: tuple[int, int]
    source: IndexedSource
    task: Task
    picture: int
    records: np.ndarray


def encode_features(
    config: ml_collections.ConfigDict,
    folder: pathlib.Path,
    *,
    shard: int,
    shards: int,
    batch: int,
    threads: int,
    progress: Progress,
) -> tuple[int, bool]:
    """Computes this shard's parts.

    Args:
      config: of the stage; `config.init` names the weights.
      folder: where the latents go.
      shard, shards: every `shards`-th part from `shard` on.
      batch: pictures that the DC-AE reads at a time.
      threads: that decode pictures.
      progress: is told when a part is done.

    Returns:
      How many pictures could not be read, and whether all parts are there now.

    Raises:
      FileNotFoundError, ValueError: the config, the weights, the data or the folder do not fit each other.
    """
    stage, origin = Stage.from_config(config), Origin(config.init)
    model = WeMMUModel(
        WeMMUConfig.from_folder(origin.backbones_folder, stage.bridge), dtype=stage.dtype
    )
    config = config.copy_and_resolve_references()
    config.data.features = ""
    encoder, training, held_out = prepare_data(config, origin, model.config)
    # Validation reads a task at a time: buckets that are short of records in the mixture may not be then.
    tasks = held_out.mixture if held_out else ()
    data = [training, *(held_out.alone(task) for task in tasks if held_out.mixture[task])]
    parts = list(_parts(data, encoder))
    fed = {one.feeds[pool.feed] for one in data for pool in one.pools}
    meta = {
        "model": origin.backbones.fingerprint,
        "sets": sorted({f"{feed.name}: {feed.source.index.picture_identity}" for feed in fed}),
        "pictures and sizes": _identity(parts),
        "parts": len(parts),
        "channels": model.config.dc_ae.latent_channels,
        "ratio": model.config.dc_ae.ratio,
        "dtype": jnp.dtype(stage.dtype).name,
    }
    features.start_features(folder, meta)
    own = list(range(shard, len(parts), shards))
    left = [part for part in own if not features.part_is_there(folder, part)]
    progress(len(own) - len(left), len(own))
    dc_ae = {
        path: origin.backbones.load_leaf(path, dtype=stage.dtype)
        for path in origin.backbones.specs
        if path.startswith("dc_ae/")
    }
    program = jit(model.encode)
    encode = functools.partial(program, nest(dc_ae))
    unread = 0
    with concurrent.futures.ThreadPoolExecutor(max(threads, 1)) as pool:
        for done, part in enumerate(left, len(own) - len(left) + 1):
            keys, latents, bad = _encode_part(parts[part], encode, batch, pool)
            features.write_part(folder, part, keys, latents)
            unread += bad
            progress(done, len(own))
    return unread, features.finish_features(folder, len(parts))


def _parts(data: list[MicroBatches], encoder: RowEncoder) -> Iterator[Work]:
    """Everything that rows of these micro-batches may ask for, each picture and size once."""
    wanted: dict[tuple, list[np.ndarray]] = {}
    for one in data:
        for pool in one.pools:
            source = one.feeds[pool.feed].source
            if not isinstance(source, IndexedSource):
                name = one.feeds[pool.feed].name
                raise ValueError(f"data set {name!r}: its pictures are drawn, not stored")
            for bucket, members in zip(one.buckets, pool.members, strict=True):
                if not len(members):
                    continue
                grid = encoder.config.source_grid(bucket.height, bucket.width)
                source_size = encoder.source_sizes(grid)[1]
                places = [((bucket.height, bucket.width), Task.UNCOND, 0)]
                if pool.task is Task.REC:
                    places.append((source_size, Task.UNCOND, 0))
                elif pool.arity:
                    places += [(source_size, pool.task, n) for n in range(1, pool.arity + 1)]
                # By the task that needs least of a record; several share what is equal.
                for size, task, picture in places:
                    wanted.setdefault((size, source, task, picture), []).append(members)
    for (size, source, task, picture), members in wanted.items():
        records = np.unique(np.concatenate(members))
        for start in range(0, len(records), PART):
            yield Work(size, source, task, picture, records[start : start + PART])


def _identity(parts: Sequence[Work]) -> str:
    """Equal for the same pictures at the same sizes in the same order: what a part's number stands for."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        source = part.source.index.picture_identity
        what = (part.size, source, part.task.value, part.picture, len(part.records))
        found.update(repr(what).encode() + part.records.astype(np.int64).tobytes())
    return found.hexdigest()


def _encode_part(work: Work, encode, batch: int, pool) -> tuple[list[int], list[np.ndarray], int]:
    loaded = list(pool.map(functools.partial(_load, work), work.records.tolist()))
    # The same picture in two records is the same latents.
    found = dict(one for one in loaded if one is not None)
    keys, latents = list(found), []
    pictures = list(found.values())
    for start in range(0, len(pictures), batch):
        group = pictures[start : start + batch]
        # The last one is filled up, so that there is one program for a size.
        pixels = np.stack([*group, *[group[-1]] * (batch - len(group))])
        latents += list(np.asarray(encode(pixels))[: len(group)])
    return keys, latents, loaded.count(None)


def _load(work: Work, number: int) -> tuple[int, np.ndarray] | None:
    try:
        example = make_example(work.task, work.source[number])
        picture: Picture = (example.target, *example.sources)[work.picture]
        return features.feature_key(picture, *work.size), picture.load(*work.size)
    except (ValueError, OSError):
        return None  # training finds it bad again, and says so
