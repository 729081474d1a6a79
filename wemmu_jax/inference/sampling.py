"""From prompts to pictures: `read` and `write` once for each guidance branch, then a loop over `paint` alone.

B batch, G guidance branches, Q query tokens, D width, C latent channels.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from wemmu_jax.diffusion.guidance import Guidance, guided
from wemmu_jax.diffusion.solvers import Solver, solve
from wemmu_jax.models.qwen2_5_vl.decode import generate
from wemmu_jax.models.wemmu.batch import PromptBatch, Sources
from wemmu_jax.models.wemmu.modeling import Condition, WeMMUModel
from wemmu_jax.models.wemmu.queries import draw_noise
from wemmu_jax.ops.programs import jit, jit_stack
from wemmu_jax.rng import Stream, per_sample, stream_key


@dataclasses.dataclass(frozen=True)
class SolverSettings:
    """How the flow is integrated from noise to picture."""

    steps: int = 20
    shift: float = 3.0
    solver: Solver = Solver.DPM_SOLVER_PP


@dataclasses.dataclass(frozen=True)
class Canvas:
    """Static sizes of the pictures of one call.

    Attributes:
      height, width: pixels.
      grid: rows and columns of the queries.
      query_tokens: Q, to which they are padded.
    """

    height: int
    width: int
    grid: tuple[int, int]
    query_tokens: int


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Compiled sampling. Each of its parts is one program, so that only what a part needs is live at a time."""

    model: WeMMUModel

    @functools.cached_property
    def encode(self):
        """(params, uint8[B, H, W, 3]) -> latents float32[B, h, w, C]."""
        return jit(self.model.encode)

    @functools.cached_property
    def decode(self):
        """(params, latents float32[B, h, w, C]) -> uint8[B, H, W, 3]."""
        return jit(self.model.decode)

    @functools.cached_property
    def embed(self):
        """(VLM's params, tokens, feature_index, images) -> prompts [B, L, D] from which an answer is decoded."""
        return jit_stack(self.model.embed_prompt)

    @functools.cached_property
    def answer(self):
        """`decode.generate`, as a stack's program."""
        static = ("model", "max_new_tokens", "eos_ids", "sampling")
        return jit_stack(generate, static_argnames=static)

    @functools.cached_property
    def condition(self):
        """(params, prompt, sources, noise, grid=, query_tokens=) -> Condition of B rows."""

        def read_and_write(params, prompt, sources, noise, *, grid, query_tokens) -> Condition:
            context = self.model.read(params, prompt, sources)
            return self.model.write(params, context, noise, grid=grid, query_tokens=query_tokens)

        return jit_stack(read_and_write, static_argnames=("grid", "query_tokens"))

    @functools.cached_property
    def _integrate(self):
        def run(params, condition: Condition, noise, *, guidance: Guidance, settings):
            def velocity(latents: jax.Array, timestep: jax.Array) -> jax.Array:
                times = jnp.full(latents.shape[0], timestep, jnp.float32)
                return self.model.paint(params, latents, times, condition)

            return solve(
                guided(velocity, guidance),
                noise,
                steps=settings.steps,
                shift=settings.shift,
                solver=settings.solver,
            )

        return jit_stack(run, static_argnames=("guidance", "settings"))

    def __call__(
        self,
        params: Mapping,
        branches: Sequence[tuple[PromptBatch, Sources | None]],
        *,
        guidance: Guidance,
        canvas: Canvas,
        settings: SolverSettings,
        seed: int,
        numbers: jax.Array,
    ) -> jax.Array:
        """Draws B pictures.

        Args:
          params: the whole tree.
          branches: prompts and pictures of each of `guidance.branches`, B rows each.
          guidance: how the branches are weighed.
          canvas: sizes.
          settings: the solver.
          seed: all noise follows from it and from `numbers`.
          numbers: uint32[B], the pictures' numbers under this seed.

        Returns:
          uint8[B, H, W, 3].
        """
        width = self.model.width
        # One draw of query noise for each picture, shared by its branches.
        queries = draw_noise(seed, numbers, grid=canvas.grid, width=width)
        conditions = [
            self.condition(
                params,
                prompt,
                sources,
                queries,
                grid=canvas.grid,
                query_tokens=canvas.query_tokens,
            )
            for prompt, sources in branches
        ]
        stacked = jax.tree.map(lambda *parts: jnp.concatenate(parts), *conditions)
        ratio = self.model.config.dc_ae.ratio
        channels = self.model.config.dit.in_channels
        shape = (canvas.height // ratio, canvas.width // ratio, channels)
        key = stream_key(seed, Stream.SAMPLER)
        noise = per_sample(key, numbers, lambda k: jax.random.normal(k, shape, jnp.float32))
        latents = self._integrate(
            {"dit": params["dit"]}, stacked, noise, guidance=guidance, settings=settings
        )
        return self.decode({"dc_ae": params["dc_ae"]}, latents)
