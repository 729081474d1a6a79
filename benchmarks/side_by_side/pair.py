"""The same random weights twice: modules of transformers, diffusers and torch, and our parameters made of them."""

import copy
import dataclasses
import functools
import gc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2_5_VLTextModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)

from benchmarks.side_by_side.sizes import Sizes
from wemmu_jax.conversion import dc_ae, sana
from wemmu_jax.conversion.memory import params_from_tensors
from wemmu_jax.conversion.qwen2_5_vl import text_table, vision_table
from wemmu_jax.conversion.table import Entry, Layout, dense
from wemmu_jax.models.wemmu.config import WeMMUConfig
from wemmu_jax.models.wemmu.modeling import WeMMUModel

# Modules whose layers repeat -> the name of the list of them.
_REPEATED = {
    Qwen2_5_VisionTransformerPretrainedModel: "blocks",
    Qwen2_5_VLTextModel: "layers",
    SanaTransformer2DModel: "transformer_blocks",
}


# A layer knows its number, for the cache: without these torch would compile a program for each of 36 layers and, past
# the eighth, quietly run the rest eagerly.
torch._dynamo.config.allow_unspec_int_on_nn_module = True
torch._dynamo.config.recompile_limit = 256
torch._dynamo.config.accumulated_recompile_limit = 1024


class PositionMLP(torch.nn.Module):
    """A.1 of the paper, equations 1 to 3."""

    def __init__(self, config: WeMMUConfig):
        super().__init__()
        width, bridge = config.vlm.text.hidden_size, config.bridge
        hidden, size = bridge.position_mlp_hidden, bridge.max_grid
        self.table = torch.nn.Parameter(torch.empty(size, size, width))
        self.up_proj = torch.nn.Linear(width, hidden, bias=False)
        self.gate_proj = torch.nn.Linear(width, hidden, bias=False)
        self.down_proj = torch.nn.Linear(hidden, config.dit.caption_channels, bias=False)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """[B, Q, D] on `grid` -> [B, Q, caption width]."""
        top, left = ((len(self.table) - side) // 2 for side in grid)
        x = x + self.table[top : top + grid[0], left : left + grid[1]].flatten(0, 1).to(x.dtype)
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def _position_mlp_table(config: WeMMUConfig) -> list[Entry]:
    width, bridge = config.vlm.text.hidden_size, config.bridge
    hidden, size = bridge.position_mlp_hidden, bridge.max_grid
    sides = {
        "up_proj": (width, hidden),
        "gate_proj": (width, hidden),
        "down_proj": (hidden, config.dit.caption_channels),
    }
    rows = [Entry("table", "table", Layout.COPY, (size, size, width))]
    for name, (inputs, outputs) in sides.items():
        rows += dense(name, name, inputs=inputs, outputs=outputs, bias=False)
    return rows


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Redraws every parameter so that none is constant: norms 1 + 0.2 N, biases and tables 0.2 N, embeddings 0.05 N,
    matrices N / sqrt(fan in); where the parameters are, so that billions of them are drawn on a GPU."""
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "embed_tokens" in name:
            parameter.normal_(0, 0.05, generator=generator)
        elif parameter.ndim >= 2 and "table" not in name:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        elif name.endswith("bias") or parameter.ndim >= 2:
            parameter.normal_(0, 0.2, generator=generator)
        else:
            parameter.normal_(1, 0.2, generator=generator)
    return module.eval().requires_grad_(False)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A copy on the host, bfloat16 too; what torch trains in place stays as it was here."""
    tensor = tensor.detach().cpu().clone()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def compiled(module: torch.nn.Module, sizes: Sizes) -> torch.nn.Module:
    """`module` through torch.compile, the parameters shared; layer by layer where `sizes.regional`."""
    if sizes.regional and type(module) in _REPEATED:
        return _over_layers(
            module, torch.compile
        )  # one program for all, equal but for their weights
    return torch.compile(module)


class _Recomputed(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return checkpoint(self.layer, *args, use_reentrant=False, **kwargs)


def recomputed(module: torch.nn.Module) -> torch.nn.Module:
    """`module` with its layers recomputed in the backward pass; transformers' own way refuses caches."""
    return _over_layers(module, _Recomputed) if type(module) in _REPEATED else module


def _over_layers(module: torch.nn.Module, wrap) -> torch.nn.Module:
    name, twin = _REPEATED[type(module)], copy.copy(module)
    layers = torch.nn.ModuleList([wrap(layer) for layer in getattr(module, name)])
    twin._modules = {**module._modules, name: layers}
    return twin


@dataclasses.dataclass
class Pair:
    """Parts of the model, each built when it is asked for.

    Attributes:
      sizes: of everything.
      learns: names of the parts that are trained, kept in float32.
    """

    sizes: Sizes
    learns: frozenset[str] = frozenset()

    @functools.cached_property
    def config(self) -> WeMMUConfig:
        """Ours."""
        return self.sizes.config

    @functools.cached_property
    def model(self) -> WeMMUModel:
        """Ours; weights are in `params`."""
        remat = "unrolled" if self.sizes.device == "cpu" else "none"
        if self.sizes.remat and self.learns:
            remat = "full"
        return WeMMUModel(self.config, dtype=jnp.dtype(self.sizes.dtype), remat=remat)

    @property
    def dtype(self) -> torch.dtype:
        """Of large products."""
        return getattr(torch, self.sizes.dtype)

    @functools.cached_property
    def vision(self) -> torch.nn.Module:
        """The ViT."""
        config = Qwen2_5_VLVisionConfig(**self.sizes.vision)
        return self._build("vision", lambda: Qwen2_5_VisionTransformerPretrainedModel(config), 1)

    @functools.cached_property
    def text(self) -> torch.nn.Module:
        """The LLM."""
        config = Qwen2_5_VLTextConfig(**self.sizes.text)
        return self._build("text", lambda: Qwen2_5_VLTextModel(config), 2)

    @functools.cached_property
    def expert(self) -> torch.nn.Module:
        """A second LLM, whose words are never read; its attention is told that it is not causal."""
        config = Qwen2_5_VLTextConfig(**{**self.sizes.text, "vocab_size": 8})
        module = self._build("expert", lambda: Qwen2_5_VLTextModel(config), 3)
        del module.embed_tokens
        for layer in module.layers:
            layer.self_attn.is_causal = False
        return module

    @functools.cached_property
    def vae_linear(self) -> torch.nn.Module:
        """The connector."""
        sides = self.config.dit.in_channels, self.config.vlm.text.hidden_size
        return self._build("vae_linear", lambda: torch.nn.Linear(*sides), 4)

    @functools.cached_property
    def position_mlp(self) -> torch.nn.Module:
        """From the expert to Sana."""
        return self._build("position_mlp", lambda: PositionMLP(self.config), 5)

    @functools.cached_property
    def dit(self) -> torch.nn.Module:
        """Sana."""
        return self._build("dit", lambda: SanaTransformer2DModel(**self.sizes.dit), 6)

    @functools.cached_property
    def dc_ae(self) -> torch.nn.Module:
        """The autoencoder."""
        return self._build("dc_ae", lambda: AutoencoderDC(**self.sizes.dc_ae), 7)

    def _build(self, name: str, make, seed: int) -> torch.nn.Module:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32 if name in self.learns else self.dtype)
        try:
            with torch.device(self.sizes.device):
                module = randomise(make(), seed)
        finally:
            torch.set_default_dtype(before)
        return module.requires_grad_(name in self.learns)

    def params(self, *names: str) -> dict:
        """Our tree of these parts, on the host."""
        tree = {}
        for name in names:
            module = getattr(self, name)
            tensors = {key: to_numpy(value) for key, value in module.state_dict().items()}
            tree[name] = params_from_tensors(tensors, self._table(name))
        vlm = {name: tree.pop(name) for name in ("vision", "text") if name in tree}
        if "vae_linear" in tree:
            tree["vae_branch"] = {"input_proj": tree.pop("vae_linear")["input_proj"]}
        return tree | ({"vlm": vlm} if vlm else {})

    def _table(self, name: str) -> list[Entry]:
        config = self.config
        if name == "expert":
            rows = text_table(config.vlm.text)
            return [row for row in rows if not row.source.startswith("embed_tokens")]
        if name == "vae_linear":
            sides = {
                "inputs": config.dit.in_channels,
                "outputs": config.vlm.text.hidden_size,
            }
            rows = dense("linear", "input_proj", **sides)
            return [dataclasses.replace(r, source=r.source.removeprefix("linear.")) for r in rows]
        tables = {
            "vision": lambda: vision_table(config.vlm.vision),
            "text": lambda: text_table(config.vlm.text),
            "position_mlp": lambda: _position_mlp_table(config),
            "dit": lambda: sana.table(config.dit),
            "dc_ae": lambda: dc_ae.table(config.dc_ae),
        }
        return tables[name]()


def on_device(tree):
    """A copy of host arrays on our device, owned by jax, so that a program may take it over."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


def free() -> None:
    """Lets both libraries give back what nobody holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
