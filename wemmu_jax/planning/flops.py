"""FLOPs that the model needs, by formula: products at two FLOPs a multiply-add, no padding, no recomputation.

Causal attention counts half; what is frozen counts forward alone, and backward towards its inputs where a gradient
passes through it. L prompt tokens, Q queries, S tokens of a source, T latent tokens.
"""

import dataclasses
from collections.abc import Mapping

from wemmu_jax.data.buckets import Bucket
from wemmu_jax.models.dc_ae.config import BlockKind, DCAEConfig
from wemmu_jax.models.qwen2_5_vl.config import TextConfig, VisionConfig
from wemmu_jax.models.sana.config import SanaConfig
from wemmu_jax.models.sana.modeling import TIME_CHANNELS
from wemmu_jax.models.wemmu.config import Connector, Pathway, VAEStream, WeMMUConfig


def vision_flops(config: VisionConfig, tokens: int) -> float:
    """The ViT's forward pass over a picture of `tokens` merged tokens."""
    merge, width = config.spatial_merge_size**2, config.hidden_size
    patches, full = tokens * merge, len(config.fullatt_block_indexes)
    layer = 4 * width**2 + 3 * width * config.intermediate_size
    window = min(config.slot_units * merge, patches)
    seen = full * patches + (config.depth - full) * window
    merger = (merge * width) ** 2 + merge * width * config.out_hidden_size
    products = patches * (config.depth * layer + config.patch_dim * width) + tokens * merger
    return 2.0 * products + 4.0 * patches * seen * width


def _layers(config: TextConfig) -> int:
    """Weights of the products of all decoder layers."""
    width, keys = config.hidden_size, config.num_key_value_heads * config.head_dim
    layer = 2 * width**2 + 2 * width * keys + 3 * width * config.intermediate_size
    return config.num_hidden_layers * layer


def _seen(config: TextConfig, pairs: float) -> float:
    """Scores and values of `pairs` of a token and one that it sees, in all layers."""
    return 4.0 * pairs * config.hidden_size * config.num_hidden_layers


def prefill_flops(config: TextConfig, tokens: int) -> tuple[float, float]:
    """The frozen LLM's forward pass over L tokens: products with weights, and causal attention."""
    return 2.0 * tokens * _layers(config), _seen(config, tokens**2 / 2)


def expert_flops(
    config: TextConfig, queries: int, context: int, vae_tokens: int = 0
) -> tuple[float, float]:
    """The expert's forward pass: products with weights, and attention, in which queries see all and VAE tokens of its
    own all but the queries."""
    pairs = queries * (context + vae_tokens + queries) + vae_tokens * (context + vae_tokens)
    return 2.0 * (queries + vae_tokens) * _layers(config), _seen(config, pairs)


def connector_flops(config: WeMMUConfig, tokens: int) -> float:
    """The VAE branch's forward pass over one source."""
    bridge, width, channels = config.bridge, config.vlm.text.hidden_size, config.dit.in_channels
    if bridge.connector is Connector.NONE:
        return 0.0
    depth = bridge.connector.depth
    products = channels * width + depth * 12 * width**2 + (width**2 if depth else 0)
    return 2.0 * tokens * products + 4.0 * depth * tokens**2 * width


def branch_flops(config: WeMMUConfig, tokens: int, *, learns: bool) -> float:
    """The VAE branch over one source, with the gradients that it needs: of its weights, and towards the inputs of all
    layers but the first, for latents have none."""
    forward = connector_flops(config, tokens)
    if not (learns and forward):
        return forward
    first = 2.0 * tokens * config.dit.in_channels * config.vlm.text.hidden_size
    return 3 * forward - first


def position_mlp_flops(config: WeMMUConfig, queries: int) -> float:
    """The Position MLP's forward pass."""
    width, hidden = config.vlm.text.hidden_size, config.bridge.position_mlp_hidden
    return 2.0 * queries * (2 * width * hidden + hidden * config.dit.caption_channels)


def dit_flops(config: SanaConfig, tokens: int, queries: int, *, draws: int = 1) -> float:
    """The DiT's forward pass over T latent tokens of each draw; all draws of a sample share its condition."""
    width, cross, ffn = config.width, config.cross_width, config.ffn_width
    head = config.attention_head_dim
    token = 4 * width**2 + 2 * width * head + 2 * width * cross + 3 * width * ffn + 9 * 2 * ffn
    layer = draws * tokens * (token + 2 * queries * cross) + queries * 2 * width * cross
    caption = queries * (config.caption_channels * width + width**2)
    ends = tokens * width * (config.in_channels + config.out_channels)
    time = TIME_CHANNELS * width + width**2 + 6 * width**2
    return 2.0 * (config.num_layers * layer + caption + draws * (ends + time))


def encode_flops(config: DCAEConfig, height: int, width: int) -> float:
    """The DC-AE's encoder over a picture of height x width pixels."""
    places, before, total = float(height * width), None, 0.0
    for stage in config.encoder:
        if before is None:
            total += places * 9 * 3 * stage.width
        else:
            places /= 4
            total += places * 9 * before * stage.width
        total += stage.layers * places * _dc_ae_block(config, stage, places)
        before = stage.width
    return 2.0 * (total + places * 9 * before * config.latent_channels)


def decode_flops(config: DCAEConfig, height: int, width: int) -> float:
    """The DC-AE's decoder, to a picture of height x width pixels, with 4 products for the 9 over a doubled one, as in
    `doubled_conv`."""
    places, finer = float(height * width), None
    total = places * 9 * 3 * config.decoder[0].width
    for stage in config.decoder:
        if finer is not None:
            total += places * 4 * stage.width * finer
            places /= 4
        total += stage.layers * places * _dc_ae_block(config, stage, places)
        finer = stage.width
    return 2.0 * (total + places * 9 * config.latent_channels * finer)


def _dc_ae_block(config: DCAEConfig, stage, places: float) -> float:
    """Multiply-adds a place."""
    if stage.kind is BlockKind.RES:
        return 18 * stage.width**2
    width, head = stage.width, config.head_dim
    inner = width // head * head
    scales = len(stage.kernel_sizes)
    blurred = sum(size**2 for size in stage.kernel_sizes) * 3 * inner + scales * 3 * inner * head
    attention = (1 + scales) * inner * 2 * min(head, places)
    return (
        3 * width * inner
        + blurred
        + attention
        + (1 + scales) * inner * width
        + (8 + 4) * width**2
        + 9 * 8 * width
    )


@dataclasses.dataclass(frozen=True)
class Learns:
    """Which parts have gradients for weights of their own, and how many noises a sample is learned with. Gradients go
    through expert, Position MLP and DiT in any case."""

    dit: bool
    branch: bool
    expert: bool = True
    position_mlp: bool = True
    vision: bool = False
    draws: int = 1


def sample_flops(
    config: WeMMUConfig,
    bucket: Bucket,
    *,
    arity: int,
    text: int,
    learns: Learns,
    cached: bool = False,
) -> Mapping[str, float]:
    """One training sample, part by part.

    Args:
      config: of the model.
      bucket: of the target; sources are taken to have its aspect.
      arity: sources.
      text: tokens of the prompt beside pictures.
      learns: what has gradients.
      cached: latents come from a cache, and the DC-AE does nothing.

    Returns:
      Part -> FLOPs; they add up to the sample's.
    """
    bridge, ratio = config.bridge, config.dc_ae.ratio
    rows, columns = config.source_grid(bucket.height, bucket.width)
    source = rows * columns
    grid = config.query_grid(bucket.height, bucket.width)
    queries = grid[0] * grid[1]
    latents = bucket.height * bucket.width // ratio**2
    has_vae = bridge.connector is not Connector.NONE
    in_prompt = arity * source * bridge.vae_in_prompt
    beside = arity * source * (has_vae and bridge.vae_stream is VAEStream.EXPERT)
    prompt = text + arity * source + in_prompt
    linear, attention = prefill_flops(config.vlm.text, prompt)
    encoded = encode_flops(config.dc_ae, bucket.height, bucket.width)
    encoded += arity * has_vae * encode_flops(config.dc_ae, rows * ratio, columns * ratio)
    flops = {
        "ViT": _passes(learns.vision, frozen=1) * arity * vision_flops(config.vlm.vision, source),
        "VAE branch": arity * branch_flops(config, source, learns=learns.branch),
        "Position MLP": _passes(learns.position_mlp) * position_mlp_flops(config, queries),
        "DiT": _passes(learns.dit) * dit_flops(config.dit, latents, queries, draws=learns.draws),
    }
    if not cached:
        flops["DC-AE encode"] = encoded
    if bridge.pathway is Pathway.VIT:
        return flops
    weights, seen = expert_flops(config.vlm.text, queries, prompt, beside)
    flops |= {
        "LLM prefill": linear + attention,
        "expert": _passes(learns.expert) * weights + 3 * seen,
    }
    # Gradients of activations of the tokens that something learns from: as many products as forward, in attention twice
    # as many. The tokens behind them have gradients too; as in the design's numbers, these are not counted.
    felt = in_prompt * learns.branch + arity * source * learns.vision
    flops["LLM prefill"] += felt / prompt * (linear + 2 * attention)
    return flops


def _passes(learns: bool, *, frozen: int = 2) -> int:
    """Products of a part in all passes, for one forward: towards its inputs, where gradients go through it, and of
    its weights if it learns."""
    return 3 if learns else frozen
