"""Conversion table of Qwen2.5-VL: vision transformer to `vision/...`, language model to `text/...`."""

import enum
from collections.abc import Iterable

from wemmu_jax.conversion.table import Entry, Layout, dense
from wemmu_jax.models.qwen2_5_vl.config import Qwen25VLConfig, TextConfig, VisionConfig


class Naming(enum.Enum):
    """How the reference names its tensors; the values are the prefixes (vision, language model)."""

    # The published files, and what `save_pretrained` of transformers 5 writes.
    FILES = ("visual.", "model.")
    # `state_dict()` of a model in memory, and files written from it without `save_pretrained`.
    MODULES = ("model.visual.", "model.language_model.")


# Tensors that may be there without a row of their own, and why that is right.
IGNORED = {"lm_head.weight": "the same tensor as the embedding when tie_word_embeddings is true"}


def naming(names: Iterable[str]) -> Naming:
    """Which naming `names` follow.

    Raises:
      ValueError: neither, or both.
    """
    names = set(names)
    telling = {kind: f"{kind.value[1]}embed_tokens.weight" for kind in Naming}
    found = [kind for kind, name in telling.items() if name in names]
    if len(found) != 1:
        expected = " or ".join(telling.values())
        raise ValueError(
            f"tensor names of a Qwen2.5-VL: expected either {expected}, "
            f"found {'both' if found else 'neither'} among {len(names)} names"
        )
    return found[0]


def table(config: Qwen25VLConfig, names: Naming = Naming.FILES) -> list[Entry]:
    """Rows of the whole model, under `vision/` and `text/`."""
    vision, text = names.value
    rows = vision_table(config.vision, source=vision, target="vision/")
    rows += text_table(config.text, source=text, target="text/")
    if not config.text.tie_word_embeddings:
        rows += dense(
            "lm_head",
            "text/lm_head",
            inputs=config.text.hidden_size,
            outputs=config.text.vocab_size,
            bias=False,
        )
    return rows


def vision_table(config: VisionConfig, *, source: str = "", target: str = "") -> list[Entry]:
    """Rows of the vision transformer; `source` and `target` are prefixes of the names on the two sides."""
    width, hidden = config.hidden_size, config.intermediate_size
    patch = (config.temporal_patch_size, config.patch_size, config.patch_size)
    merged = config.spatial_merge_size**2 * width
    stack = tuple(range(config.depth))
    block, layers = f"{source}blocks.{{i}}", f"{target}layers"
    linears = (
        ("attn.qkv", "attention/qkv", width, 3 * width),
        ("attn.proj", "attention/proj", width, width),
        ("mlp.gate_proj", "mlp/gate_proj", width, hidden),
        ("mlp.up_proj", "mlp/up_proj", width, hidden),
        ("mlp.down_proj", "mlp/down_proj", hidden, width),
    )
    rows = [
        Entry(
            f"{source}patch_embed.proj.weight",
            f"{target}patch_embed/kernel",
            Layout.PATCH,
            (width, config.in_channels, *patch),
        )
    ]
    for norm in ("norm1", "norm2"):
        rows.append(_norm(f"{block}.{norm}", f"{layers}/{norm}", width, stack))
    for theirs, ours, inputs, outputs in linears:
        rows += dense(
            f"{block}.{theirs}", f"{layers}/{ours}", inputs=inputs, outputs=outputs, stack=stack
        )
    merger, our_merger = f"{source}merger", f"{target}merger"
    rows.append(_norm(f"{merger}.ln_q", f"{our_merger}/norm", width))
    rows += dense(f"{merger}.mlp.0", f"{our_merger}/hidden", inputs=merged, outputs=merged)
    rows += dense(
        f"{merger}.mlp.2", f"{our_merger}/out", inputs=merged, outputs=config.out_hidden_size
    )
    return rows


def text_table(config: TextConfig, *, source: str = "", target: str = "") -> list[Entry]:
    """Rows of the language model without its output layer; prefixes as in `vision_table`."""
    width, hidden = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    stack = tuple(range(config.num_hidden_layers))
    layer, layers = f"{source}layers.{{i}}", f"{target}layers"
    linears = (
        ("self_attn.q_proj", "attention/q_proj", width, queries, True),
        ("self_attn.k_proj", "attention/k_proj", width, keys, True),
        ("self_attn.v_proj", "attention/v_proj", width, keys, True),
        ("self_attn.o_proj", "attention/o_proj", queries, width, False),
        ("mlp.gate_proj", "mlp/gate_proj", width, hidden, False),
        ("mlp.up_proj", "mlp/up_proj", width, hidden, False),
        ("mlp.down_proj", "mlp/down_proj", hidden, width, False),
    )
    rows = [
        Entry(
            f"{source}embed_tokens.weight",
            f"{target}embed_tokens/embedding",
            Layout.COPY,
            (config.vocab_size, width),
        )
    ]
    for norm in ("input_layernorm", "post_attention_layernorm"):
        rows.append(_norm(f"{layer}.{norm}", f"{layers}/{norm}", width, stack))
    for theirs, ours, inputs, outputs, bias in linears:
        rows += dense(
            f"{layer}.{theirs}",
            f"{layers}/{ours}",
            inputs=inputs,
            outputs=outputs,
            bias=bias,
            stack=stack,
        )
    return [*rows, _norm(f"{source}norm", f"{target}norm", width)]


def _norm(source: str, target: str, width: int, stack: tuple[int, ...] | None = None) -> Entry:
    return Entry(f"{source}.weight", f"{target}/scale", Layout.COPY, (width,), stack)
