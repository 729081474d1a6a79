"""The programs of a stage without its weights and its data: every argument is a shape, a type and a sharding.

    config, published sizes, mesh --AbstractRun--> lower encode, accumulate, update, validate --> compile anywhere

The mesh may be of devices that are not there, see `sharding.topology`. B rows, n source pictures, L prompt tokens.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from wemmu_jax.conversion.memory import flatten, nest
from wemmu_jax.data.buckets import Bucket
from wemmu_jax.data.features import DTYPE
from wemmu_jax.models.qwen2_5_vl.images import PackedImages
from wemmu_jax.models.wemmu.batch import PromptBatch
from wemmu_jax.models.wemmu.config import WeMMUConfig
from wemmu_jax.models.wemmu.inputs import Shapes
from wemmu_jax.models.wemmu.modeling import WeMMUModel
from wemmu_jax.sharding.rules import parameter_shardings, replicated
from wemmu_jax.training.batch import Pixels, TrainBatch, batch_shardings
from wemmu_jax.training.curriculum import Stage
from wemmu_jax.training.optimizer import split
from wemmu_jax.training.run import check_mesh, leaf_dtype, stage_sizes
from wemmu_jax.training.step import Trainer


def abstract_weights(model: WeMMUModel, stage: Stage, mesh: Mesh) -> tuple[dict, dict]:
    """The trainable and the frozen tree as `run.prepare` would place them."""
    typed = nest(
        {
            path: jax.ShapeDtypeStruct(shape, leaf_dtype(path, stage))
            for path, shape in _shapes(model.config).items()
        }
    )
    return split(placed(typed, parameter_shardings(typed, mesh)), stage.trainable)


@functools.lru_cache(maxsize=8)
def _shapes(config: WeMMUConfig) -> Mapping[str, tuple[int, ...]]:
    """Of every leaf, by path. A search asks for many plans of one model."""
    model, key = WeMMUModel(config), jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(model.init_backbones, key)
    shapes |= jax.eval_shape(model.init_bridge, key, shapes["vlm"]["text"])
    return {path: leaf.shape for path, leaf in flatten(shapes).items()}


def placed(tree, shardings):
    """Shapes and types with their shardings."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        shardings,
    )


@dataclasses.dataclass(frozen=True)
class AbstractRun:
    """What of a run is known before its weights and data are.

    Attributes:
      trainer: the programs.
      trainable, frozen: abstract weights.
      buckets: target sizes, from wide to tall.
      shapes: paddings that all buckets share.
      text_lengths: what texts are padded to.
      cached: whether latents come from a cache and not from the DC-AE.
    """

    trainer: Trainer
    trainable: Mapping
    frozen: Mapping
    buckets: tuple[Bucket, ...]
    shapes: Shapes
    text_lengths: tuple[int, ...]
    cached: bool

    @classmethod
    def of(cls, config: ml_collections.ConfigDict, sizes: WeMMUConfig, mesh: Mesh) -> "AbstractRun":
        """The run of a stage.

        Args:
          config: of the stage; its `mesh` is not read.
          sizes: of the model, its bridge that of the config.
          mesh: of devices that need not be there.

        Raises:
          ValueError: the mesh does not divide rows or heads, or `sizes` has another bridge than the config.
        """
        stage = Stage.from_config(config)
        if sizes.bridge != stage.bridge:
            raise ValueError(
                f"the model has the bridge {sizes.bridge}, the config asks for {stage.bridge}"
            )
        check_mesh(config, sizes, mesh)
        model = WeMMUModel(sizes, dtype=stage.dtype, remat=stage.remat)
        trainable, frozen = abstract_weights(model, stage, mesh)
        buckets, grids = stage_sizes(config, sizes)
        return cls(
            trainer=Trainer(model, stage, mesh, trainable),
            trainable=trainable,
            frozen=frozen,
            buckets=buckets,
            shapes=Shapes.of(grids, sizes, multiple=config.data.pad_multiple),
            text_lengths=tuple(config.data.text_lengths),
            cached=bool(config.data.features),
        )

    @property
    def square(self) -> Bucket:
        """The bucket whose sides are equal."""
        return next(bucket for bucket in self.buckets if bucket.height == bucket.width)

    # -- arguments

    def batch(self, bucket: Bucket, *, arity: int, text_length: int) -> TrainBatch:
        """A micro-batch of `arity` sources a row, its pictures encoded."""
        sizes, rows = self.trainer.model.config, self.trainer.stage.rows
        ratio, channels = sizes.dc_ae.ratio, sizes.dc_ae.latent_channels
        source_grid = sizes.source_grid(bucket.height, bucket.width)
        tokens = arity * self.shapes.tokens
        latents = jax.ShapeDtypeStruct((rows, *source_grid, channels), jnp.float32)
        target = (rows, bucket.height // ratio, bucket.width // ratio, channels)
        batch = TrainBatch(
            number=jax.ShapeDtypeStruct((), jnp.uint32),
            sample_numbers=jax.ShapeDtypeStruct((rows,), jnp.uint32),
            picture_ids=jax.ShapeDtypeStruct((rows,), jnp.uint32),
            unconditional=jax.ShapeDtypeStruct((rows,), jnp.bool),
            prompt=self._prompt(rows, arity=arity, text_length=text_length),
            images=self._images(rows * arity) if arity else None,
            place=jax.ShapeDtypeStruct((rows, tokens), jnp.int32),
            target=jax.ShapeDtypeStruct(target, jnp.float32),
            source_latents=(latents,) * arity,
            grid=sizes.query_grid(bucket.height, bucket.width),
            query_tokens=self.shapes.tokens,
        )
        return placed(batch, batch_shardings(batch, self.trainer.mesh))

    def pixels(self, bucket: Bucket, *, arity: int) -> Pixels:
        """The pictures, or their latents, that the host hands over for it."""
        sizes, rows = self.trainer.model.config, self.trainer.stage.rows
        ratio, unit = sizes.dc_ae.ratio, sizes.vlm.vision.unit
        grid = sizes.source_grid(bucket.height, bucket.width)

        def pictures(count: int, height: int, width: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((count, height, width, 3), jnp.uint8)

        def latents(height: int, width: int) -> jax.ShapeDtypeStruct:
            if not self.cached:
                return pictures(rows, height, width)
            shape = (rows, height // ratio, width // ratio, sizes.dc_ae.latent_channels)
            return jax.ShapeDtypeStruct(shape, DTYPE)

        pixels = Pixels(
            target=latents(bucket.height, bucket.width),
            sources=(latents(*(side * ratio for side in grid)),) * arity,
            vit=pictures(rows * arity, *(side * unit for side in grid)) if arity else None,
        )
        return placed(pixels, batch_shardings(pixels, self.trainer.mesh))

    def _prompt(self, rows: int, *, arity: int, text_length: int) -> PromptBatch:
        in_prompt = self.trainer.stage.bridge.vae_in_prompt
        length = self.shapes.prompt_length(text_length, arity, vae_in_prompt=in_prompt)
        ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
        return PromptBatch(
            tokens=ids,
            feature_index=ids,
            position_ids=jax.ShapeDtypeStruct((3, rows, length), jnp.int32),
            valid=jax.ShapeDtypeStruct((rows, length), jnp.bool),
            next_position=jax.ShapeDtypeStruct((rows,), jnp.int32),
        )

    def _images(self, count: int) -> PackedImages:
        vision = self.trainer.model.config.vlm.vision
        patches = vision.slot_units * vision.spatial_merge_size**2
        slot = (count, self.shapes.slots, patches)
        return PackedImages(
            patches=jax.ShapeDtypeStruct((*slot, vision.patch_dim), jnp.float32),
            positions=jax.ShapeDtypeStruct((*slot, 2), jnp.int32),
            segments=jax.ShapeDtypeStruct(slot, jnp.int32),
            order=jax.ShapeDtypeStruct((count, self.shapes.tokens), jnp.int32),
        )

    # -- programs

    def encode(self, pixels: jax.ShapeDtypeStruct) -> jax.stages.Lowered:
        """Lowers the DC-AE's encoder for a leaf of `pixels`."""
        return self.trainer.encode.lower({"dc_ae": self.frozen["dc_ae"]}, pixels)

    def accumulate(self, batch: TrainBatch) -> jax.stages.Lowered:
        """Lowers a micro-batch's gradients."""
        return self.trainer.accumulate.lower(self.trainable, self.trainable, self.frozen, batch)

    def validate(self, batch: TrainBatch) -> jax.stages.Lowered:
        """Lowers a micro-batch's validation losses."""
        return self.trainer.validate.lower(self.trainable, self.frozen, batch)

    def update(self) -> jax.stages.Lowered:
        """Lowers the optimizer's step."""
        everywhere = functools.partial(jax.ShapeDtypeStruct, sharding=replicated(self.trainer.mesh))
        stage = self.trainer.stage
        losses = [everywhere((stage.rows,), jnp.float32)] * stage.micro_batches
        step = everywhere((), jnp.int32)
        return self.trainer.update.lower(self.trainer.abstract_state, self.trainable, losses, step)
