"""WeMMU out of modules of transformers and diffusers. B rows, Q queries, S tokens of a source, T latent tokens.

`Qwen2_5_VLTextModel` with other weights over the cache of the first one is the expert.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler

from benchmarks.side_by_side.inputs import Prompt, Source
from benchmarks.side_by_side.pair import Pair, compiled, recomputed
from wemmu_jax.models.qwen2_5_vl.prompt import query_position_ids

# No mask, so that the fastest kernel can run: the modules know whether they are causal.
NO_MASK = {"full_attention": None}
PARTS = ("vision", "text", "expert", "vae_linear", "position_mlp", "dit", "dc_ae")


class Cache:
    """Keys and values [B, K, S, H] of every layer. transformers' own grows once more where a layer is recomputed."""

    def __init__(self, before: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()):
        """`before`: of an earlier pass, which all tokens see."""
        self._before, self._own = before, {}

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *_, **__):
        """What a layer attends to; called by transformers."""
        self._own[layer] = key, value
        if not self._before:
            return key, value
        earlier_key, earlier_value = self._before[layer]
        return torch.cat([earlier_key, key], dim=2), torch.cat([earlier_value, value], dim=2)

    def get_seq_length(self, *_) -> int:
        """Tokens before this pass; called by transformers."""
        return self._before[0][0].shape[2] if self._before else 0

    @property
    def layers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What this pass left."""
        return [self._own[layer] for layer in sorted(self._own)]


@dataclasses.dataclass(frozen=True)
class Modules:
    """The parts as one calls them, and the sizes they are used at.

    Attributes:
      encode, decode: of the autoencoder.
      grid: of queries and sources.
      scale: of latents.
    """

    vision: torch.nn.Module | None
    text: torch.nn.Module
    expert: torch.nn.Module
    vae_linear: torch.nn.Module | None
    position_mlp: torch.nn.Module
    dit: torch.nn.Module
    encode: torch.nn.Module
    decode: torch.nn.Module
    embed: torch.nn.Module
    device: str
    dtype: torch.dtype
    grid: tuple[int, int]
    scale: float

    @classmethod
    def of(cls, pair: Pair, rung: str, *, sources: bool = True) -> "Modules":
        """The parts of a pair; `rung` is "eager" or "compiled"."""

        def made(module: torch.nn.Module) -> torch.nn.Module:
            module = module if rung == "eager" else compiled(module, pair.sizes)
            return recomputed(module) if pair.sizes.remat and pair.learns else module

        names = ("text", "expert", "position_mlp", "dit")
        names += ("vision", "vae_linear") if sources else ()
        parts = {"vision": None, "vae_linear": None}
        return cls(
            **parts | {name: made(getattr(pair, name)) for name in names},
            encode=made(pair.dc_ae.encoder),
            decode=made(pair.dc_ae.decoder),
            embed=pair.text.embed_tokens,
            device=pair.sizes.device,
            dtype=pair.dtype,
            grid=pair.sizes.grid,
            scale=pair.config.dc_ae.scaling_factor,
        )

    def tensor(self, array: np.ndarray | torch.Tensor) -> torch.Tensor:
        """On the device, floating numbers in the compute type: a copy, or what is there already. Large arrays are,
        before time is taken, as they are for the other side."""
        if not isinstance(array, torch.Tensor):
            array = torch.from_numpy(np.array(array))
        tensor = array.to(self.device)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def read(self, prompt: Prompt, source: Source | None, latents: torch.Tensor | None) -> Cache:
        """The VLM's keys and values; `latents` [B, C, gh, gw] of the source."""
        x = self.embed(self.tensor(prompt.tokens).long())
        if source is not None:
            patches, grid = self.tensor(source.patches), source.grid_thw.to(self.device)
            seen = self.vision(patches, grid_thw=grid).pooler_output
            seen = seen.view(len(x), -1, x.shape[-1])
            vae = self.vae_linear(latents.flatten(2).transpose(1, 2).to(self.dtype))
            start = int(np.argmax(prompt.feature >= 0))
            end = start + 2 * seen.shape[1]
            x = torch.cat([x[:, :start], seen, vae.to(x.dtype), x[:, end:]], dim=1)
        ids, cache = self.tensor(prompt.position_ids).long(), Cache()
        self.text(inputs_embeds=x, attention_mask=NO_MASK, position_ids=ids, past_key_values=cache)
        return cache

    def write(self, prompt: Prompt, cache: Cache, noise: torch.Tensor) -> torch.Tensor:
        """noise [B, Q, D] -> [B, Q, caption width]."""
        start = np.full(len(prompt.tokens), prompt.next_position)
        ids = self.tensor(query_position_ids(start, self.grid)).long()
        hidden = self.expert(
            inputs_embeds=noise.to(self.dtype),
            attention_mask=NO_MASK,
            position_ids=ids,
            past_key_values=Cache(cache.layers),
        ).last_hidden_state
        return self.position_mlp(hidden, self.grid)

    def paint(
        self, latents: torch.Tensor, timestep: torch.Tensor, condition: torch.Tensor
    ) -> torch.Tensor:
        """[B, C, h, w] -> velocity float32[B, C, h, w]."""
        velocity = self.dit(
            latents.to(self.dtype), encoder_hidden_states=condition, timestep=timestep
        )
        return velocity.sample.float()

    def solve(
        self,
        condition: torch.Tensor,
        noise: torch.Tensor,
        weights: Sequence[float],
        steps: int,
    ) -> torch.Tensor:
        """diffusers' loop with Sana's scheduler; `condition` of all branches, branch by branch."""
        scheduler = DPMSolverMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
        )
        scheduler.set_timesteps(steps, device=self.device)
        weights = torch.tensor(weights, device=self.device).view(-1, 1, 1, 1, 1)
        x = noise
        for timestep in scheduler.timesteps:
            stacked = torch.cat([x] * len(weights))
            velocity = self.paint(stacked, timestep.expand(len(stacked)), condition)
            velocity = (weights * velocity.view(len(weights), *x.shape)).sum(0)
            x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
        return x

    def to_latents(self, pixels: np.ndarray) -> torch.Tensor:
        """uint8[B, H, W, 3] -> scaled latents float32[B, C, h, w]."""
        x = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        return self.encode(x.to(self.dtype)).float() * self.scale

    def to_pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents -> uint8[B, H, W, 3]."""
        x = self.decode((latents / self.scale).to(self.dtype)).float()
        return ((x + 1) * 127.5).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)
