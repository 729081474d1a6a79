"""One optimizer step: K times `accumulate`, once `update`. B rows of a micro-batch, C channels."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from wemmu_jax.diffusion.flow import TIMESTEPS, draw_flow_noise, draw_sigma, noised, target_velocity
from wemmu_jax.diffusion.losses import (
    contrastive_flow_matching,
    flow_matching,
    negatives,
    partners,
)
from wemmu_jax.models.wemmu.batch import Sources
from wemmu_jax.models.wemmu.modeling import WeMMUModel
from wemmu_jax.models.wemmu.queries import draw_noise
from wemmu_jax.ops.programs import compiler_options
from wemmu_jax.planning.flops import Learns
from wemmu_jax.sharding.rules import parameter_shardings, placed, replicated, rows_sharding
from wemmu_jax.training.batch import TrainBatch
from wemmu_jax.training.curriculum import Loss, Stage
from wemmu_jax.training.optimizer import make_optimizer, merge
from wemmu_jax.training.state import TrainState, running_mean


def predicted_velocity(
    model: WeMMUModel,
    params: Mapping,
    batch: TrainBatch,
    *,
    noisy: jax.Array,
    sigma: jax.Array,
    seed: int,
    frozen_vlm: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """read, write, paint: the velocity float32[B * D, h, w, C], and the connector's own loss float32[B] if it has one.
    `noisy` has D draws of each row, side by side, and `sigma` their times."""
    sources = None
    if batch.images is not None:
        sources = Sources(batch.images, batch.place, batch.source_latents)
    context = model.read(params, batch.prompt, sources, frozen_vlm=frozen_vlm)
    noise = draw_noise(seed, batch.sample_numbers, grid=batch.grid, width=model.width)
    condition = model.write(
        params, context, noise, grid=batch.grid, query_tokens=batch.query_tokens
    )
    velocity = model.paint(params, noisy, TIMESTEPS * sigma, condition)
    return velocity, context.distillation


def _repeated(leaf: jax.Array, draws: int) -> jax.Array:
    """Each row `draws` times, one after the other."""
    return leaf if draws == 1 else jnp.repeat(leaf, draws, axis=0)


def row_losses(
    model: WeMMUModel,
    stage: Stage,
    params: Mapping,
    batch: TrainBatch,
    *,
    frozen_vlm: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """float32[B] what is minimised, and float32[B] the plain flow matching part of it, for logs; of several draws of
    noise and time their mean. `frozen_vlm` is for gradients, see `WeMMUModel.read`."""
    draws, rows = stage.draws, len(batch.target)
    clean, numbers = _repeated(batch.target, draws), _repeated(batch.sample_numbers, draws)
    numbers = draws * numbers + jnp.tile(jnp.arange(draws, dtype=jnp.uint32), rows)
    noise = draw_flow_noise(stage.seed, numbers, clean.shape[1:])
    sigma = draw_sigma(stage.seed, numbers, law=stage.time_law, shift=stage.shift)
    velocity, distillation = predicted_velocity(
        model,
        params,
        batch,
        noisy=noised(clean, noise, sigma),
        sigma=sigma,
        seed=stage.seed,
        frozen_vlm=frozen_vlm,
    )
    target = target_velocity(clean, noise)
    plain = flow_matching(velocity, target)
    losses = plain
    if stage.loss is Loss.CONTRASTIVE:
        by = draws * partners(stage.seed, batch.number, rows)
        pictures, unconditional = (
            _repeated(leaf, draws) for leaf in (batch.picture_ids, batch.unconditional)
        )
        negative, contrasted = negatives(target, pictures, unconditional, by)
        losses = contrastive_flow_matching(
            velocity, target, negative, contrasted=contrasted, weight=stage.contrast
        )
    losses, plain = (jnp.mean(each.reshape(rows, draws), axis=1) for each in (losses, plain))
    if distillation is not None:
        losses = losses + stage.bridge.distillation * distillation
    return losses, plain


def validation_losses(
    model: WeMMUModel, stage: Stage, params: Mapping, batch: TrainBatch
) -> jax.Array:
    """float32[B]: flow matching at fixed times, spread evenly over the rows, and fixed noise."""
    clean = batch.target
    noise = draw_flow_noise(stage.seed, batch.sample_numbers, clean.shape[1:])
    sigma = (jnp.arange(len(clean), dtype=jnp.float32) + 0.5) / len(clean)
    velocity, _ = predicted_velocity(
        model, params, batch, noisy=noised(clean, noise, sigma), sigma=sigma, seed=stage.seed
    )
    return flow_matching(velocity, target_velocity(clean, noise))


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
    """The compiled functions of a stage. Every array that they return has a pinned sharding.

    Attributes:
      model: the parts.
      stage: the settings.
      mesh: the devices.
      abstract: shapes and types of the trainable tree.
    """

    model: WeMMUModel
    stage: Stage
    mesh: Mesh
    abstract: Mapping

    @property
    def learns(self) -> Learns:
        """What FLOPs of a sample depend on."""
        return Learns(
            dit="dit" in self.abstract,
            branch="vae_branch" in self.abstract,
            expert="expert" in self.abstract,
            position_mlp="position_mlp" in self.abstract,
            vision="vision" in self.abstract.get("vlm", {}),
            draws=self.stage.draws,
        )

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """Of the stage."""
        return make_optimizer(self.stage.optimizer, self.mesh)

    @functools.cached_property
    def _param_shardings(self) -> Mapping:
        return parameter_shardings(self.abstract, self.mesh)

    @functools.cached_property
    def _state_shardings(self) -> TrainState:
        return parameter_shardings(jax.eval_shape(self._create, self.abstract), self.mesh)

    def _create(self, params: Mapping) -> TrainState:
        return TrainState.create(params, self.optimizer, ema=self.stage.ema > 0)

    def _jit(self, function: Callable, **options) -> Callable:
        kind = self.mesh.devices.flat[0].device_kind
        return jax.jit(function, compiler_options=compiler_options(kind), **options)

    @property
    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the state, to restore one into."""
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            jax.eval_shape(self._create, self.abstract),
            self._state_shardings,
        )

    @functools.cached_property
    def init_state(self):
        """params -> a fresh state around them, which owns them from now on."""
        return jax.jit(self._create, out_shardings=self._state_shardings, donate_argnums=0)

    @functools.cached_property
    def zero_gradients(self):
        """() -> zeros in the form of the trainable tree."""

        def zeros() -> Mapping:
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.abstract)

        return jax.jit(zeros, out_shardings=self._param_shardings)

    @functools.cached_property
    def encode(self):
        """(frozen, uint8[B, H, W, 3]) -> latents float32[B, h, w, C].

        A program of its own, because it does not depend on the micro-batch's arity, and because latents may as
        well come from a cache.
        """

        def encode(frozen: Mapping, pixels: jax.Array) -> jax.Array:
            with placed(self.mesh, self.stage.attention):
                return self.model.encode(frozen, pixels)

        return self._jit(encode, out_shardings=rows_sharding(self.mesh))

    @functools.cached_property
    def accumulate(self):
        """(gradients, params, frozen, batch) -> (gradients + 1/K of this micro-batch's, losses [B], plain [B]).

        The gradients handed in are donated.
        """

        frozen_vlm = "vlm" not in self.abstract

        def loss(params: Mapping, frozen: Mapping, batch: TrainBatch):
            tree = merge(params, frozen)
            with placed(self.mesh, self.stage.attention):
                losses, plain = row_losses(
                    self.model, self.stage, tree, batch, frozen_vlm=frozen_vlm
                )
            return jnp.mean(losses) / self.stage.micro_batches, (losses, plain)

        def step(gradients: Mapping, params: Mapping, frozen: Mapping, batch: TrainBatch):
            new, (losses, plain) = jax.grad(loss, has_aux=True)(params, frozen, batch)
            return jax.tree.map(jnp.add, gradients, new), losses, plain

        everywhere = replicated(self.mesh)
        shardings = (self._param_shardings, everywhere, everywhere)
        return self._jit(step, donate_argnums=0, out_shardings=shardings)

    @functools.cached_property
    def update(self):
        """(state, gradients, losses of each micro-batch, step) -> (new state, gradient norm float32[]).

        The state is donated. Where a loss or the gradient is not finite, or `state` is not the one before `step`,
        it stays as it is, its own step included. So a caller that sees the losses late, with more steps on their
        way, still holds the last good state.
        """

        def apply(state: TrainState, gradients: Mapping) -> TrainState:
            updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            ema = state.ema
            if ema is not None:
                ema = running_mean(ema, params, state.step, self.stage.ema)
            return TrainState(state.step + 1, params, opt_state, ema)

        def update(
            state: TrainState, gradients: Mapping, losses: Sequence[jax.Array], step: jax.Array
        ) -> tuple[TrainState, jax.Array]:
            norm = optax.global_norm(gradients)
            good = jnp.isfinite(norm) & jnp.isfinite(jnp.stack(losses)).all()
            good &= state.step == step - 1
            return jax.lax.cond(good, apply, lambda state, _: state, state, gradients), norm

        shardings = (self._state_shardings, replicated(self.mesh))
        return self._jit(update, donate_argnums=0, out_shardings=shardings)

    @functools.cached_property
    def validate(self):
        """(params, frozen, batch) -> float32[B], see `validation_losses`."""

        def losses(params: Mapping, frozen: Mapping, batch: TrainBatch) -> jax.Array:
            with placed(self.mesh, self.stage.attention):
                return validation_losses(self.model, self.stage, merge(params, frozen), batch)

        return self._jit(losses, out_shardings=replicated(self.mesh))
