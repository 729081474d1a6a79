"""The composed model: three verbs, one direction.

    prompt, source pictures, VAE latents --read: frozen VLM--> keys and values of every layer
    noise key, grid --queries--> write: expert over those keys and values, then Position MLP --> condition
    latents, t, condition --paint: DiT--> velocity

The frozen VLM never sees a query, so `read` depends on nothing that is drawn, and sampling loops over `paint`
alone. B batch, L prompt tokens, n source pictures, S source tokens, Q query tokens, D width.
"""

import dataclasses
import functools
from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from wemmu_jax.models.dc_ae.modeling import DCAE
from wemmu_jax.models.qwen2_5_vl.images import PackedImages, pack_images
from wemmu_jax.models.qwen2_5_vl.prompt import query_position_ids
from wemmu_jax.models.qwen2_5_vl.text import DecoderStack, KeyValues, Pattern, TextModel
from wemmu_jax.models.qwen2_5_vl.vision import VisionTransformer
from wemmu_jax.models.sana.modeling import SanaTransformer
from wemmu_jax.models.wemmu.batch import PromptBatch, Sources
from wemmu_jax.models.wemmu.config import Connector, Pathway, VAEStream, WeMMUConfig
from wemmu_jax.models.wemmu.position_mlp import PositionMLP, pad_tokens
from wemmu_jax.models.wemmu.queries import Queries
from wemmu_jax.models.wemmu.vae_branch import VAEBranch, distillation_loss
from wemmu_jax.ops.programs import in_full

Params = Mapping[str, Mapping]


@flax.struct.dataclass
class Context:
    """What the frozen VLM leaves of a prompt.

    Attributes:
      key_values: keys and values of every layer, [layers, B, L, K, H] each.
      valid: bool[B, L].
      next_position: int32[B], where the queries' position ids start.
      vae_tokens: [B, n * S, D] with `vae_stream: expert`, else None.
      vae_positions: int32[3, B, n * S], their position ids, those of the ViT tokens; None with them.
      vae_valid: bool[B, n * S]; None with them.
      distillation: float32[B], the connector's cosine loss; None unless it is distilled.
      features: [B, n * S, D] of the ViT with `pathway: vit`, else None; then there are no keys and values.
    """

    key_values: KeyValues | None
    valid: jax.Array
    next_position: jax.Array
    vae_tokens: jax.Array | None = None
    vae_positions: jax.Array | None = None
    vae_valid: jax.Array | None = None
    distillation: jax.Array | None = None
    features: jax.Array | None = None


@flax.struct.dataclass
class Condition:
    """What Sana's caption projection reads: tokens [B, Q, caption width], valid bool[B, Q]."""

    tokens: jax.Array
    valid: jax.Array


@dataclasses.dataclass(frozen=True)
class WeMMUModel:
    """The parts, and how they are joined. Holds no weights: every method takes the parameter tree.

    Attributes:
      config: sizes and switches.
      dtype: compute type of the large products; float32 is multiplied in full on any platform.
      remat: name of the rematerialisation policy of the layer stacks, see `ops.remat`.
    """

    config: WeMMUConfig
    dtype: jnp.dtype = jnp.bfloat16
    remat: str = "none"

    @functools.cached_property
    def vision(self) -> VisionTransformer:
        """The frozen ViT."""
        return VisionTransformer(self.config.vlm.vision, dtype=self.dtype, remat=self.remat)

    @functools.cached_property
    def text(self) -> TextModel:
        """The frozen LLM."""
        return TextModel(self.config.vlm.text, dtype=self.dtype, remat=self.remat)

    @functools.cached_property
    def expert(self) -> DecoderStack:
        """The generation expert: the LLM's layers with weights of its own."""
        return DecoderStack(self.config.vlm.text, dtype=self.dtype, remat=self.remat)

    @functools.cached_property
    def vae_branch(self) -> VAEBranch:
        """The connector of VAE features."""
        bridge = self.config.bridge
        return VAEBranch(
            bridge.connector,
            self.width,
            bridge.connector_heads,
            bridge.max_grid,
            dtype=self.dtype,
        )

    @functools.cached_property
    def queries(self) -> Queries:
        """The expert's input."""
        bridge = self.config.bridge
        return Queries(
            bridge.queries, self.width, bridge.fixed_grid, bridge.max_grid, bridge.noise_scale
        )

    @functools.cached_property
    def position_mlp(self) -> PositionMLP:
        """From the expert's width to Sana's caption width."""
        bridge = self.config.bridge
        caption = self.config.dit.caption_channels
        return PositionMLP(bridge.max_grid, bridge.position_mlp_hidden, caption, dtype=self.dtype)

    @functools.cached_property
    def dit(self) -> SanaTransformer:
        """The diffusion transformer."""
        return SanaTransformer(self.config.dit, dtype=self.dtype, remat=self.remat)

    @functools.cached_property
    def dc_ae(self) -> DCAE:
        """The autoencoder."""
        return DCAE(self.config.dc_ae, dtype=self.dtype)

    @property
    def width(self) -> int:
        """D, the LLM's width."""
        return self.config.vlm.text.hidden_size

    # -- the three verbs

    @in_full
    def read(
        self,
        params: Params,
        prompt: PromptBatch,
        sources: Sources | None = None,
        *,
        frozen_vlm: bool = False,
    ) -> Context:
        """One pass of the frozen VLM over prompts and source pictures.

        Args:
          params: the whole tree, or what of it is needed: `vlm`, and with sources `vae_branch`.
          prompt: B rows.
          sources: n pictures a row, or None where rows have no pictures.
          frozen_vlm: gradients will be asked for, none of them the VLM's: they stop at the first VAE token.

        Returns:
          Keys and values of every layer; with `vae_stream: expert` the VAE tokens beside them.
        """
        text = {"params": params["vlm"]["text"]}
        x = self.text.apply(text, prompt.tokens, method="embed")
        vae, extra, settled = None, {}, 0
        if sources is not None:
            rows = x.shape[0]
            seen = self.vision.apply({"params": params["vlm"]["vision"]}, sources.images)
            seen = seen.reshape(rows, -1, self.width)
            if self.config.bridge.pathway is Pathway.VIT:
                return Context(None, prompt.valid, prompt.next_position, features=seen)
            features = [seen]
            if self.config.bridge.connector is not Connector.NONE:
                vae = self._vae_tokens(params, sources)
                if self.config.bridge.vae_stream is VAEStream.FROZEN:
                    features.append(vae)
                    settled = _settled(sources) if frozen_vlm else 0
                else:
                    extra = _beside_the_queries(vae, prompt, sources)
                if self.config.bridge.connector is Connector.VIT_6_DISTILLED:
                    extra["distillation"] = distillation_loss(vae, seen, sources.place >= 0)
            x = _place_features(x, jnp.concatenate(features, axis=1), prompt.feature_index)
        _, key_values = self.text.apply(
            text,
            x,
            prompt.position_ids,
            valid=prompt.valid,
            pattern=Pattern.CAUSAL,
            settled=settled,
            return_key_values=True,
        )
        return Context(key_values, prompt.valid, prompt.next_position, **extra)

    @in_full
    def write(
        self,
        params: Params,
        context: Context,
        noise: jax.Array,
        *,
        grid: tuple[int, int],
        query_tokens: int,
    ) -> Condition:
        """The generation expert over the VLM's keys and values, then the Position MLP.

        Args:
          params: needs `expert`, `position_mlp`, and `queries` where they are learned.
          context: of `read`.
          noise: float32[B, rows * columns, D], of `draw_noise`.
          grid: rows and columns of the queries.
          query_tokens: Q, to which the queries are padded.
        """
        count = grid[0] * grid[1]
        valid = jnp.broadcast_to(jnp.arange(query_tokens) < count, (len(noise), query_tokens))
        if self.config.bridge.pathway is Pathway.VIT:
            hidden = self._straight(context, query_tokens)
        else:
            x, inputs = self.expert_inputs(
                params, context, noise, grid=grid, query_tokens=query_tokens
            )
            hidden, _ = self.expert.apply({"params": params["expert"]}, x, **inputs)
        tokens = self.position_mlp.apply(
            {"params": params["position_mlp"]}, hidden[:, -query_tokens:], grid=grid
        )
        return Condition(tokens, valid)

    def expert_inputs(
        self,
        params: Params,
        context: Context,
        noise: jax.Array,
        *,
        grid: tuple[int, int],
        query_tokens: int,
    ) -> tuple[jax.Array, dict]:
        """What `write` calls the expert with: [B, own tokens, D], the last Q of them queries, and keywords."""
        learned = {"params": params.get("queries", {})}
        queries = self.queries.apply(learned, noise, grid=grid).astype(self.dtype)
        count = queries.shape[1]
        x = pad_tokens(queries, query_tokens)
        valid = jnp.broadcast_to(jnp.arange(query_tokens) < count, x.shape[:2])
        positions = query_position_ids(context.next_position, grid)
        positions = jnp.pad(positions, [(0, 0), (0, 0), (0, query_tokens - count)])
        if context.vae_tokens is not None:
            x = jnp.concatenate([context.vae_tokens.astype(x.dtype), x], axis=1)
            positions = jnp.concatenate([context.vae_positions, positions], axis=2)
            valid = jnp.concatenate([context.vae_valid, valid], axis=1)
        return x, {
            "position_ids": positions,
            "valid": valid,
            "context": context.key_values,
            "context_valid": context.valid,
            "pattern": Pattern.FULL,
            "hidden_tail": query_tokens if context.vae_tokens is not None else 0,
            "return_key_values": False,
        }

    def _straight(self, context: Context, query_tokens: int) -> jax.Array:
        """[B, Q, D]: the features of the one source as if they were queries; zeros where there is none."""
        if context.features is None:
            return jnp.zeros((len(context.valid), query_tokens, self.width), self.dtype)
        if context.features.shape[1] != query_tokens:
            raise ValueError(
                f"pathway=vit draws one source on the grid of the output: {query_tokens} tokens; found "
                f"{context.features.shape[1]}"
            )
        return context.features

    @in_full
    def paint(
        self, params: Params, latents: jax.Array, timestep: jax.Array, condition: Condition
    ) -> jax.Array:
        """Sana's velocity: latents float32[B, h, w, C], timestep float32[B] in 0..1000 -> [B, h, w, C]. A condition of
        fewer rows is of several latents side by side."""
        return self.dit.apply(
            {"params": params["dit"]}, latents, timestep, condition.tokens, condition.valid
        )

    # -- the autoencoder

    @in_full
    def encode(self, params: Params, pixels: jax.Array) -> jax.Array:
        """uint8[B, H, W, 3] -> scaled latents float32[B, h, w, C]."""
        scaled = pixels.astype(jnp.float32) / 127.5 - 1
        return self.dc_ae.apply({"params": params["dc_ae"]}, scaled, method="encode")

    @in_full
    def decode(self, params: Params, latents: jax.Array) -> jax.Array:
        """Scaled latents float32[B, h, w, C] -> uint8[B, H, W, 3]."""
        pixels = self.dc_ae.apply({"params": params["dc_ae"]}, latents, method="decode")
        return jnp.round(jnp.clip((pixels + 1) * 127.5, 0, 255)).astype(jnp.uint8)

    @in_full
    def embed_prompt(
        self,
        vlm: Mapping,
        tokens: jax.Array,
        feature_index: jax.Array,
        images: PackedImages | None,
    ) -> jax.Array:
        """Understanding: embedded prompts [B, L, D] with ViT features in place, for decoding an answer.

        Args:
          vlm: the VLM's tree.
          tokens, feature_index: as in `PromptBatch`.
          images: [B * n, ...], or None.
        """
        x = self.text.apply({"params": vlm["text"]}, tokens, method="embed")
        if images is None:
            return x
        seen = self.vision.apply({"params": vlm["vision"]}, images)
        return _place_features(x, seen.reshape(x.shape[0], -1, self.width), feature_index)

    # -- parameters

    def init_bridge(self, key: jax.Array, text_params: Mapping) -> dict:
        """Fresh bridge weights in float32: the expert is a copy of the LLM, the rest is drawn from `key`.

        Args:
          key: typed PRNG key.
          text_params: the LLM's tree (`vlm/text`).
        """
        branch_key, query_key, mlp_key = jax.random.split(key, 3)
        dit, grid = self.config.dit, (1, 1)
        if self.config.bridge.queries.value == "learnable_fixed":
            grid = (self.config.bridge.fixed_grid,) * 2
        noise = jnp.zeros((1, grid[0] * grid[1], self.width))
        copied = {}
        if self.config.bridge.pathway is Pathway.EXPERT:
            copied = {name: text_params[name] for name in ("layers", "norm")}
        bridge = {
            "expert": jax.tree.map(lambda leaf: leaf.astype(jnp.float32), copied),
            "queries": self.queries.init(query_key, noise, grid=grid).get("params", {}),
            "position_mlp": self.position_mlp.init(mlp_key, noise, grid=grid)["params"],
        }
        if self.config.bridge.connector is not Connector.NONE:
            latents = jnp.zeros((1, 1, 1, dit.in_channels))
            bridge["vae_branch"] = self.vae_branch.init(branch_key, latents)["params"]
        return {name: tree for name, tree in bridge.items() if tree}

    def init_backbones(self, key: jax.Array) -> dict:
        """Random backbones in float32, for tests, shapes and the tiny preset: `vlm`, `dit`, `dc_ae`."""
        keys = jax.random.split(key, 4)
        config, side = self.config, self.config.dc_ae.ratio
        patches = np.zeros((config.vlm.vision.spatial_merge_size**2, config.vlm.vision.patch_dim))
        image = pack_images([patches], [(1, 1)], config.vlm.vision, slots=None, tokens=None)
        one, true = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
        position, latents = (
            jnp.zeros((3, 1, 1), jnp.int32),
            jnp.zeros((1, 1, 1, config.dit.in_channels)),
        )
        condition = jnp.zeros((1, 1, config.dit.caption_channels))
        trees = {
            "vision": self.vision.init(keys[0], image),
            "text": self.text.init(keys[1], one, position, valid=true, method="score"),
            "dit": self.dit.init(keys[2], latents, jnp.zeros(1), condition, true),
            "dc_ae": self.dc_ae.init(keys[3], jnp.zeros((1, side, side, 3))),
        }
        params = {name: tree["params"] for name, tree in trees.items()}
        vlm = {"vision": params.pop("vision"), "text": params.pop("text")}
        return {"vlm": vlm, **params}

    # -- details of `read`

    def _vae_tokens(self, params: Params, sources: Sources) -> jax.Array:
        """[B, n * S, D]: each picture's tokens in raster order, padded to S."""
        length = sources.place.shape[1] // len(sources.latents)
        branch = {"params": params["vae_branch"]}
        tokens = [
            pad_tokens(self.vae_branch.apply(branch, latents), length)
            for latents in sources.latents
        ]
        return jnp.concatenate(tokens, axis=1)


def _settled(sources: Sources) -> int:
    """Tokens that surely stand before the first VAE token: the ViT's of the first picture, in whole tiles of bfloat16
    on a TPU."""
    rows, columns = sources.latents[0].shape[1:3]
    return rows * columns // 16 * 16


def _place_features(x: jax.Array, features: jax.Array, index: jax.Array) -> jax.Array:
    """x [B, L, D] with features [B, F, D] where index int32[B, L] is not -1."""
    here = jnp.take_along_axis(features, jnp.maximum(index, 0)[..., None], axis=1)
    return jnp.where((index >= 0)[..., None], here.astype(x.dtype), x)


def _beside_the_queries(tokens: jax.Array, prompt: PromptBatch, sources: Sources) -> dict:
    """VAE tokens for the expert, with the position ids of the ViT tokens that they belong to."""
    place = jnp.maximum(sources.place, 0)
    positions = jnp.take_along_axis(prompt.position_ids, place[None], axis=2)
    return {"vae_tokens": tokens, "vae_positions": positions, "vae_valid": sources.place >= 0}
