"""What a run is built from: config -> weights, data, compiled steps, and what is said about them before step 0."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from wemmu_jax.conversion.memory import flatten, nest
from wemmu_jax.data.buckets import Bucket, make_buckets
from wemmu_jax.data.features import Features
from wemmu_jax.data.pipeline import MicroBatch, MicroBatches
from wemmu_jax.data.records import identity
from wemmu_jax.data.sources import build_feeds
from wemmu_jax.data.tasks import Task
from wemmu_jax.models.wemmu.config import WeMMUConfig
from wemmu_jax.models.wemmu.inputs import RowEncoder
from wemmu_jax.models.wemmu.modeling import WeMMUModel
from wemmu_jax.rng import Stream, stream_key
from wemmu_jax.sharding.mesh import check_heads, check_rows, make_mesh
from wemmu_jax.sharding.processes import together
from wemmu_jax.sharding.rules import parameter_shardings
from wemmu_jax.training.batch import TrainBatch, on_devices, packer, train_batch
from wemmu_jax.training.checkpoints import code_version, differences
from wemmu_jax.training.curriculum import Stage
from wemmu_jax.training.optimizer import count_parameters, learns, split
from wemmu_jax.training.origin import Origin
from wemmu_jax.training.step import Trainer

EXPERT_FROM = ("vlm/text/layers/", "vlm/text/norm/")  # what the generation expert starts from
BRIDGE = {"expert", "vae_branch", "queries", "position_mlp"}


@dataclasses.dataclass
class Run:
    """Everything that the loop needs, built from a config."""

    config: ml_collections.ConfigDict
    stage: Stage
    trainer: Trainer
    origin: Origin
    encoder: RowEncoder
    data: MicroBatches
    held_out: MicroBatches | None
    trainable: Mapping
    frozen: Mapping

    @functools.cached_property
    def validation_batches(self) -> dict[str, MicroBatch]:
        """A micro-batch of held-out samples for each task, made once."""
        tasks = [task for task, weight in self.held_out.mixture.items() if weight]
        return {task.value: self.held_out.fixed_batches(task, 1)[0] for task in tasks}

    def batch(self, micro_batch: MicroBatch) -> TrainBatch:
        """A micro-batch on the devices, its pictures encoded."""
        bucket, model, mesh = micro_batch.bucket, self.trainer.model, self.trainer.mesh
        grid = model.config.query_grid(bucket.height, bucket.width)
        rows, pixels = train_batch(micro_batch, grid=grid, query_tokens=self.encoder.shapes.tokens)
        pixels = on_devices(pixels, mesh)
        return on_devices(rows, mesh).replace(
            images=None if pixels.vit is None else self._pack(pixels.vit),
            target=self._latents(pixels.target),
            source_latents=tuple(map(self._latents, pixels.sources)),
        )

    @functools.cached_property
    def _pack(self):
        return packer(self.encoder, self.trainer.mesh)

    def _latents(self, picture: jax.Array) -> jax.Array:
        """Pixels through the DC-AE; cached latents are what they are."""
        if picture.dtype == jnp.uint8:
            return self.trainer.encode({"dc_ae": self.frozen["dc_ae"]}, picture)
        return picture.astype(jnp.float32)


def prepare(config: ml_collections.ConfigDict, *, step: int | None = None) -> Run:
    """Loads weights and data sets. Of several processes, what one refuses before it loads weights all refuse.

    Args:
      config: of the run.
      step: of which checkpoint of the workdir `config.init`; the latest by default.

    Raises:
      FileNotFoundError: `config.init` names no weights: a run never starts from random backbones.
      ValueError: the config, the weights and the data do not fit each other.
      ValueError, ConnectionError: another process failed, see `together`.
    """
    with together("preparing the run"):
        stage = Stage.from_config(config)
        if not config.init:
            raise FileNotFoundError(
                "no weights to start from: give --init a folder of `wemmu convert`, or the workdir of the stage before"
            )
        origin = Origin(config.init, step=step)
        bridge = stage.bridge.to_dict()
        if origin.bridge is not None and (other := differences(origin.bridge, bridge)):
            raise ValueError(
                f"{config.init} was trained with another bridge:\n  " + "\n  ".join(other)
            )
        model = WeMMUModel(
            WeMMUConfig.from_folder(origin.backbones_folder, stage.bridge),
            dtype=stage.dtype,
            remat=stage.remat,
        )
        origin.check(model)
        mesh = make_mesh(**config.mesh)
        check_mesh(config, model.config, mesh)
        encoder, data, held_out = prepare_data(config, origin, model.config)
    # Not in the block: Orbax and programs over the mesh wait for all processes, without an end if one is in
    # `exchange` by then. One that fails here ends, which ends the others.
    trainable, frozen = _weights(origin, model, stage, mesh)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trainable)
    trainer = Trainer(model, stage, mesh, abstract)
    return Run(config, stage, trainer, origin, encoder, data, held_out, trainable, frozen)


def check_mesh(config: ml_collections.ConfigDict, model: WeMMUConfig, mesh: Mesh) -> None:
    """Raises ValueError naming the key, and what would work, if the mesh does not divide rows or heads."""
    check_rows(config.batch.rows, mesh, key="batch.rows")
    if config.data.held_out:
        check_rows(config.validation_rows, mesh, key="validation_rows")
    check_heads(model, mesh)


def stage_sizes(
    config: ml_collections.ConfigDict, model: WeMMUConfig
) -> tuple[tuple[Bucket, ...], list[tuple[int, int]]]:
    """The buckets of a stage, and every grid of source or query tokens that they lead to."""
    fields = config.data
    buckets = make_buckets(
        fields.resolution,
        multiple=model.dc_ae.ratio,
        count=fields.buckets,
        max_ratio=fields.max_aspect,
    )
    grids = [model.source_grid(b.height, b.width) for b in buckets]
    grids += [model.query_grid(b.height, b.width) for b in buckets]
    return buckets, grids


def prepare_data(
    config: ml_collections.ConfigDict, origin: Origin, model: WeMMUConfig
) -> tuple[RowEncoder, MicroBatches, MicroBatches | None]:
    """What a stage trains on and, where there is any, what it is validated on.

    Raises:
      FileNotFoundError, ValueError: as `build_feeds`, `Features` and `MicroBatches`.
    """
    fields = config.data
    buckets, grids = stage_sizes(config, model)
    encoder = RowEncoder.load(origin.backbones_folder, model)
    encoder = encoder.sized(grids, multiple=fields.pad_multiple)
    if fields.features:
        cached = Features(fields.features, model=origin.backbones.fingerprint)
        encoder = dataclasses.replace(encoder, features=cached)
    common = functools.partial(
        MicroBatches,
        mixture={Task(name): weight for name, weight in fields.mixture.items()},
        buckets=buckets,
        seed=config.seed,
        encode_row=encoder.encode_example,
        text_length=encoder.text_length,
        text_lengths=tuple(fields.text_lengths),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    feeds = functools.partial(build_feeds, bad_share=fields.bad_share)
    data = common(feeds=feeds(fields.sources), rows=config.batch.rows)
    if not fields.held_out:
        return encoder, data, None
    held_out = common(feeds=feeds(fields.held_out), rows=config.validation_rows)
    return encoder, data, held_out


def data_identities(run: Run) -> dict[str, str]:
    """Of every data set; hosts that saw different ones would train on some samples twice and on others never, and so
    would a run that goes on with others than it began with. Reads all texts."""
    feeds = [*run.data.feeds, *(run.held_out.feeds if run.held_out else ())]
    sources = {id(feed.source): feed for feed in feeds}.values()
    # No name in a key, for in `differences` a dot parts keys.
    return {str(i): f"{feed.name}: {identity(feed.source)}" for i, feed in enumerate(sources)}


def leaf_dtype(path: str, stage: Stage) -> jnp.dtype:
    """Trainable leaves are float32, frozen ones have the compute type."""
    return jnp.dtype(jnp.float32) if learns(path, stage.trainable) else stage.dtype


def _leaf_sharding(mesh: Mesh) -> Callable:
    """(path, shape and type) -> where the leaf lies."""
    return lambda path, spec: flatten(parameter_shardings({path: spec}, mesh))[path]


def _weights(origin: Origin, model: WeMMUModel, stage: Stage, mesh: Mesh) -> tuple[dict, dict]:
    """Every leaf in its type, all of them sharded."""
    dtype = functools.partial(leaf_dtype, stage=stage)
    params = origin.load(dtype=dtype, sharding=_leaf_sharding(mesh))
    if origin.bridge is None:
        params |= _fresh_bridge(origin, model, stage, mesh)
    elif stage.redrawn:
        params = _redrawn(params, _fresh_bridge(origin, model, stage, mesh), stage)
    trainable, frozen = split(params, stage.trainable)
    if "dc_ae" in trainable:
        raise ValueError(
            "the freezing table (trainable) lets the DC-AE learn, through which no loss passes: a rule for dc_ae/ must "
            "say false before one that says true"
        )
    if origin.bridge is None and (never := BRIDGE & frozen.keys()):
        raise ValueError(
            f"{origin.folder} has no trained bridge, and the freezing table keeps {', '.join(sorted(never))} as drawn "
            "from the seed, which no checkpoint would hold"
        )
    return trainable, frozen


def _fresh_bridge(origin: Origin, model: WeMMUModel, stage: Stage, mesh: Mesh) -> dict:
    """The bridge as it is before any training: the expert from the language model, the rest from the seed."""
    sharding = _leaf_sharding(mesh)
    # As they are stored: the frozen tree may be rounded to the compute type.
    below = [path for path in origin.backbones.specs if path.startswith(EXPERT_FROM)]
    text = nest(
        {
            path.removeprefix("vlm/text/"): origin.backbones.load_leaf(
                path, dtype=jnp.float32, sharding=sharding
            )
            for path in below
        }
    )
    key = stream_key(stage.seed, Stream.INIT)
    shapes = parameter_shardings(jax.eval_shape(model.init_bridge, key, text), mesh)
    return jax.jit(model.init_bridge, out_shardings=shapes, donate_argnums=1)(key, text)


def _redrawn(params: Mapping, fresh: Mapping, stage: Stage) -> dict:
    """`params` with the leaves of `fresh` that the stage wants drawn anew."""
    flat, new = flatten(params), flatten(fresh)
    chosen = {
        pattern: [path for path in new if re.match(pattern, path)] for pattern in stage.redrawn
    }
    if idle := [pattern for pattern, paths in chosen.items() if not paths]:
        raise ValueError(f"redrawn: {idle} match no parameter of the bridge: {sorted(new)}")
    paths = {path for paths in chosen.values() for path in paths}
    if never := [path for path in sorted(paths) if not learns(path, stage.trainable)]:
        raise ValueError(f"redrawn: {never} are frozen, so no checkpoint would hold them")
    return nest(flat | {path: new[path] for path in paths})


def describe(run: Run) -> dict:
    """What is printed before step 0: version, parameters of each part, mixture, buckets, batch, weights' origin."""
    parts = {}
    for name, tree in (("trainable", run.trainable), ("frozen", run.frozen)):
        for part, leaves in tree.items():
            parts.setdefault(part, {})[name] = count_parameters(leaves)
    weights = {name: weight for name, weight in run.config.data.mixture.items() if weight}
    total = sum(weights.values())
    paper, steps = run.config.paper, run.stage.optimizer.steps
    return {
        "code": code_version(),
        "weights": str(run.origin.folder),
        "bridge": "fresh, from the seed" if run.origin.bridge is None else "trained",
        "parameters": parts,
        "trainable": count_parameters(run.trainable),
        "frozen": count_parameters(run.frozen),
        "mixture": {name: round(weight / total, 4) for name, weight in weights.items()},
        "buckets": {
            f"{own} sources": " ".join(
                f"{bucket.height}x{bucket.width}"
                for arity, bucket in run.data.shares
                if arity == own
            )
            for own in dict.fromkeys(arity for arity, _ in run.data.shares)
        },
        "batch": f"{run.stage.micro_batches} micro-batches x {run.stage.rows} rows = {run.stage.batch}"
        f" (the paper: {paper.batch})",
        "steps": f"{steps} (the paper: {paper.steps})",
        "samples": f"{steps * run.stage.batch} (the paper: {paper.steps * paper.batch})",
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {jax.process_count()} processes, "
        f"mesh {dict(run.trainer.mesh.shape)}",
    }
