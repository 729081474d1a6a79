"""Qwen2.5-VL's pictures and vision transformer against transformers."""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
from PIL import Image
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel as Reference,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.vision_utils import (
    get_vision_attention_seqlens,
    get_vision_position_ids,
    get_vision_window_index,
)

from tests.parity.harness import (
    BLOCK,
    MODEL,
    Case,
    Sabotage,
    converted,
    randomise,
    relative_l2,
    to_torch,
)
from wemmu_jax.conversion.qwen2_5_vl import vision_table
from wemmu_jax.models.qwen2_5_vl import vision
from wemmu_jax.models.qwen2_5_vl.config import VisionConfig, qwen2_5_vl_3b
from wemmu_jax.models.qwen2_5_vl.images import (
    PackedImages,
    pack_images,
    patchify,
    resize_rgb,
    smart_size,
)

# Windows of 3 x 3 merged tokens.
TINY = VisionConfig(
    depth=4,
    hidden_size=64,
    intermediate_size=44,
    num_heads=2,
    in_channels=3,
    patch_size=4,
    temporal_patch_size=2,
    spatial_merge_size=2,
    window_size=24,
    fullatt_block_indexes=(1, 2),
    out_hidden_size=24,
)
# Windows divide these grids on both sides, on one or on none; the last has columns at which bfloat16 angles show.
TINY_GRIDS = ((3, 6), (7, 4), (2, 9), (5, 5), (2, 40))
REAL = dataclasses.replace(qwen2_5_vl_3b().vision, depth=3, fullatt_block_indexes=(1,))
SETUPS = {
    "": (TINY, TINY_GRIDS),
    ", real widths": (REAL, ((5, 7), (4, 10))),
}
SMALL = 3e-3  # activations at which eps = 1e-6 weighs about a tenth of the mean square


@dataclasses.dataclass(frozen=True)
class Fixture:
    """A random reference model, the same parameters as our tree, and a batch of pictures for both."""

    config: VisionConfig
    grids: tuple[tuple[int, int], ...]
    model: Reference
    params: dict
    patches: tuple[np.ndarray, ...]

    @property
    def packed(self) -> PackedImages:
        """The batch, with one slot and three tokens more than it needs."""
        return self.pack(self.patches, self.config)

    def pack(self, rows, config: VisionConfig) -> PackedImages:
        """Packs one array of patch rows a picture; `config` gives the windows."""
        exact = pack_images(rows, self.grids, config)
        slots, tokens = exact.segments.shape[1] + 1, exact.order.shape[1] + 3
        return pack_images(rows, self.grids, config, slots=slots, tokens=tokens)

    def unpack(self, hidden) -> np.ndarray:
        """[B, W, P, D] in slots -> [all patches, D] in the processor's order."""
        area = self.config.spatial_merge_size**2
        hidden = np.asarray(hidden).reshape(len(self.grids), -1, area, hidden.shape[-1])
        rows = [hidden[i, self.packed.order[i, : gh * gw]] for i, (gh, gw) in enumerate(self.grids)]
        return np.concatenate(rows).reshape(-1, hidden.shape[-1])

    def valid(self, tokens) -> np.ndarray:
        """[B, S, D] -> [all merged tokens, D]."""
        tokens = np.asarray(tokens)
        return np.concatenate([tokens[i, : gh * gw] for i, (gh, gw) in enumerate(self.grids)])

    @property
    def grid_thw(self) -> torch.Tensor:
        """The grids as the reference wants them: frames, rows and columns of patches."""
        merge = self.config.spatial_merge_size
        return torch.tensor([(1, gh * merge, gw * merge) for gh, gw in self.grids])

    def hidden(self, scale: float) -> list[np.ndarray]:
        """Random hidden states for a single layer, one array a picture."""
        rng = np.random.default_rng(5)
        shape = self.config.hidden_size
        rows = (rng.standard_normal((len(p), shape)) for p in self.patches)
        return [(scale * (r + 0.3)).astype(np.float32) for r in rows]


@functools.lru_cache(maxsize=1)  # one at a time: the real widths take a gigabyte
def fixture(setup: str) -> Fixture:
    config, grids = SETUPS[setup]
    reference_config = Qwen2_5_VLVisionConfig(**dataclasses.asdict(config))
    reference_config._attn_implementation = "sdpa"
    model = randomise(Reference(reference_config), seed=11)
    patches = tuple(
        patchify(picture(gh * config.unit, gw * config.unit, seed=i), config)
        for i, (gh, gw) in enumerate(grids)
    )
    params = converted(model, vision_table(config))
    return Fixture(config, grids, model, params, patches)


def picture(height: int, width: int, *, seed: int) -> np.ndarray:
    """uint8[height, width, 3] with structure at several scales."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 4, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int32)
    noise = rng.integers(-40, 41, (height, width, 3))
    return np.clip(smooth + noise, 0, 255).astype(np.uint8)


# What the port computes -------------------------------------------------------------------------------


def ours_model(f: Fixture, *, config=None, params=None, images=None) -> np.ndarray:
    """Merged tokens of the batch. A new lambda each time: a sabotaged constant must be traced anew."""
    model = vision.VisionTransformer(config or f.config)
    apply = jax.jit(lambda params, images: model.apply({"params": params}, images))
    return f.valid(apply(params or f.params, images or f.packed))


def ours_layer(f: Fixture, *, full: bool, scale: float) -> np.ndarray:
    """Layer 0 of the stack, told to attend in windows or fully."""
    images = f.pack(f.hidden(scale), f.config)
    rotation = vision.vision_rotation(images.positions, f.config)
    params = jax.tree.map(lambda leaf: leaf[0], f.params["layers"])
    layer = vision.VisionLayer(f.config, jnp.float32)
    out, _ = layer.apply({"params": params}, images.patches, full, rotation, images.segments)
    return f.unpack(out)


def ours_merger(f: Fixture, *, scale: float) -> np.ndarray:
    """The merger on its own; it reads places in order, so one slot row a picture does."""
    rows = np.concatenate(f.hidden(scale))[None, None]
    return vision.PatchMerger(f.config, jnp.float32).apply({"params": f.params["merger"]}, rows)[0]


# What the reference computes --------------------------------------------------------------------------


@functools.cache
@torch.no_grad()
def reference_model(setup: str) -> np.ndarray:
    f = fixture(setup)
    return f.model(to_torch(np.concatenate(f.patches)), f.grid_thw).pooler_output.numpy()


@torch.no_grad()
def reference_layer(f: Fixture, *, full: bool, scale: float) -> np.ndarray:
    sizes = {
        name: getattr(f.config, name)
        for name in ("spatial_merge_size", "window_size", "patch_size")
    }
    hidden = to_torch(np.concatenate(f.hidden(scale)))
    index, window_lengths = get_vision_window_index(f.grid_thw, **sizes)
    full_lengths, _ = get_vision_attention_seqlens(f.grid_thw, f.model.config)
    area = f.config.spatial_merge_size**2
    order = (index[:, None] * area + torch.arange(area)).flatten()
    position_ids = get_vision_position_ids(f.grid_thw, f.config.spatial_merge_size)
    turns = tuple(t[order] for t in f.model.rotary_pos_emb(hidden, position_ids))
    out = f.model.blocks[0](
        hidden[order],
        cu_seqlens=full_lengths if full else window_lengths,
        position_embeddings=turns,
    )
    return out[torch.argsort(order)].numpy()


@torch.no_grad()
def reference_merger(f: Fixture, *, scale: float) -> np.ndarray:
    return f.model.merger(to_torch(np.concatenate(f.hidden(scale)))).numpy()


# Rows -------------------------------------------------------------------------------------------------


def model_error(setup: str, **ours) -> float:
    return relative_l2(ours_model(fixture(setup), **ours), reference_model(setup))


def layer_error(setup: str, **kind) -> float:
    f = fixture(setup)
    return relative_l2(ours_layer(f, **kind), reference_layer(f, **kind))


def merger_error(setup: str, *, scale: float) -> float:
    f = fixture(setup)
    return relative_l2(ours_merger(f, scale=scale), reference_merger(f, scale=scale))


@torch.no_grad()
def patch_embedding_error(setup: str) -> float:
    f = fixture(setup)
    model = vision.VisionTransformer(f.config)
    capture = partial(model.apply, capture_intermediates=lambda m, _: m.name == "patch_embed")
    _, state = jax.jit(capture)({"params": f.params}, f.packed)
    (ours,) = state["intermediates"]["patch_embed"]["__call__"]
    reference = f.model.patch_embed(to_torch(np.concatenate(f.patches)))
    return relative_l2(f.unpack(ours), reference)


def rotary_error(setup: str) -> float:
    f = fixture(setup)
    angles = f.unpack(vision.vision_angles(f.packed.positions, head_width=f.config.head_dim))
    position_ids = get_vision_position_ids(f.grid_thw, f.config.spatial_merge_size)
    cos, sin = f.model.rotary_pos_emb(torch.zeros(1), position_ids)
    ours = np.concatenate([np.cos(angles)] * 2 + [np.sin(angles)] * 2, axis=-1)
    return relative_l2(ours, torch.cat([cos, sin], dim=-1))


def pixels_error(height: int, width: int, *, resize: bool) -> float:
    config = qwen2_5_vl_3b().vision
    array = picture(height, width, seed=3)
    processor = Qwen2VLImageProcessorPil(do_resize=resize)
    reference = processor([array], return_tensors="np")
    if resize:
        size = processor.size
        target = smart_size(
            height,
            width,
            unit=config.unit,
            min_pixels=size["shortest_edge"],
            max_pixels=size["longest_edge"],
        )
        array = resize_rgb(Image.fromarray(array), *target)
    ours = patchify(array, config, processor.image_mean, processor.image_std)
    return relative_l2(ours, reference["pixel_values"])


def cases() -> list[Case]:
    exact = 1e-6
    rows = [
        Case("pixels to patches", exact, lambda: pixels_error(112, 196, resize=False)),
        Case("pixels to patches, shrunk", exact, lambda: pixels_error(1100, 1600, resize=True)),
        Case("pixels to patches, enlarged", exact, lambda: pixels_error(40, 31, resize=True)),
    ]
    for setup in SETUPS:
        rows += [
            Case(f"patch embedding{setup}", BLOCK, partial(patch_embedding_error, setup)),
            Case(f"vision rotary{setup}", BLOCK, partial(rotary_error, setup)),
            Case(f"merger{setup}", BLOCK, partial(merger_error, setup, scale=1.0)),
            Case(
                f"merger, small activations{setup}",
                BLOCK,
                partial(merger_error, setup, scale=SMALL),
            ),
            Case(f"whole ViT{setup}", MODEL, partial(model_error, setup)),
        ]
        for full, kind in ((False, "window"), (True, "full")):
            for scale, note in ((1.0, ""), (SMALL, ", small activations")):
                measure = partial(layer_error, setup, full=full, scale=scale)
                rows.append(Case(f"vision block, {kind}{note}{setup}", BLOCK, measure))
    return [dataclasses.replace(row, name=f"qwen2.5-vl / {row.name}") for row in rows]


def without(params: dict, path: str) -> dict:
    """`params` with the leaf at `path` set to zero."""
    head, _, rest = path.partition("/")
    return {
        **params,
        head: without(params[head], rest) if rest else jnp.zeros_like(params[head]),
    }


def wrong_windows() -> float:
    f = fixture("")
    config = dataclasses.replace(f.config, window_size=9 * f.config.unit)
    return model_error("", config=config, images=f.pack(f.patches, config))


def wrong_full_layers() -> float:
    config = dataclasses.replace(TINY, fullatt_block_indexes=(1, 3))
    return model_error("", config=config)


def swapped_positions() -> float:
    images = fixture("").packed
    return model_error("", images=images.replace(positions=images.positions[..., ::-1]))


def order_not_undone() -> float:
    images = fixture("").packed
    places = np.broadcast_to(np.arange(images.order.shape[1], dtype=np.int32), images.order.shape)
    return model_error("", images=images.replace(order=places))


def bfloat16_angles() -> float:
    exact = vision.vision_angles

    def rounded(positions, *, head_width):
        return exact(positions, head_width=head_width).astype(jnp.bfloat16).astype(jnp.float32)

    with mock.patch.object(vision, "vision_angles", rounded):
        return model_error("")


def tanh_gelu() -> float:
    tanh = partial(jax.nn.gelu, approximate=True)
    with mock.patch.object(vision.nn, "gelu", lambda x, approximate: tanh(x)):
        return merger_error("", scale=1.0)


def wrong_eps(error: Callable[[], float]) -> float:
    with mock.patch.object(vision, "VISION_RMS_NORM_EPS", 1e-5):
        return error()


def dropped(bias: str) -> float:
    return model_error("", params=without(fixture("").params, f"{bias}/bias"))


BIASES = (
    "layers/attention/qkv",
    "layers/attention/proj",
    "layers/mlp/gate_proj",
    "layers/mlp/up_proj",
    "layers/mlp/down_proj",
    "merger/hidden",
    "merger/out",
)


def sabotage() -> list[Sabotage]:
    small_layer = partial(layer_error, "", full=False, scale=SMALL)
    small_merger = partial(merger_error, "", scale=SMALL)
    rows = [
        Sabotage("wrong full layers", MODEL, wrong_full_layers),
        Sabotage("windows over the whole picture", MODEL, wrong_windows),
        Sabotage("rows and columns swapped", MODEL, swapped_positions),
        Sabotage("bfloat16 angles", MODEL, bfloat16_angles),
        Sabotage("window order not undone", MODEL, order_not_undone),
        Sabotage("tanh GELU in the merger", BLOCK, tanh_gelu),
        Sabotage("eps 1e-5 in a block", BLOCK, partial(wrong_eps, small_layer)),
        Sabotage("eps 1e-5 in the merger", BLOCK, partial(wrong_eps, small_merger)),
    ]
    rows += [Sabotage(f"without bias {bias}", MODEL, partial(dropped, bias)) for bias in BIASES]
    return [dataclasses.replace(row, name=f"qwen2.5-vl ViT / {row.name}") for row in rows]
