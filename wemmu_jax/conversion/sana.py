"""The tensors of diffusers' `SanaTransformer2DModel` and where they lie in our tree. D model width."""

from wemmu_jax.conversion.table import Entry, Layout, dense
from wemmu_jax.models.sana.config import SanaConfig
from wemmu_jax.models.sana.modeling import TIME_CHANNELS


def table(config: SanaConfig) -> list[Entry]:
    """One row for each tensor of the reference; rows of the blocks are stacked along the layers."""
    width = config.width
    return [
        *dense(
            "patch_embed.proj",
            "patch_embed",
            inputs=config.in_channels,
            outputs=width,
            layout=Layout.POINTWISE,
        ),
        *_time_embed(width),
        *dense(
            "caption_projection.linear_1",
            "caption_projection/linear_1",
            inputs=config.caption_channels,
            outputs=width,
        ),
        *dense(
            "caption_projection.linear_2",
            "caption_projection/linear_2",
            inputs=width,
            outputs=width,
        ),
        Entry("caption_norm.weight", "caption_norm/scale", Layout.COPY, (width,)),
        *_attention(config, "attn1", "self_attention", inner=width, qkv_bias=False),
        *_attention(config, "attn2", "cross_attention", inner=config.cross_width, qkv_bias=True),
        *_ffn(config),
        Entry(
            "transformer_blocks.{i}.scale_shift_table",
            "blocks/modulation_table",
            Layout.COPY,
            (6, width),
            _layers(config),
        ),
        Entry("scale_shift_table", "output/modulation_table", Layout.COPY, (2, width)),
        *dense("proj_out", "output/projection", inputs=width, outputs=config.out_channels),
    ]


def _layers(config: SanaConfig) -> tuple[int, ...]:
    return tuple(range(config.num_layers))


def _time_embed(width: int) -> list[Entry]:
    embedder = "time_embed.emb.timestep_embedder"
    return [
        *dense(f"{embedder}.linear_1", "time_embed/linear_1", inputs=TIME_CHANNELS, outputs=width),
        *dense(f"{embedder}.linear_2", "time_embed/linear_2", inputs=width, outputs=width),
        *dense("time_embed.linear", "time_embed/modulation", inputs=width, outputs=6 * width),
    ]


def _attention(
    config: SanaConfig, source: str, target: str, *, inner: int, qkv_bias: bool
) -> list[Entry]:
    """One of the two attentions of all blocks; `inner` is the width of all its heads together."""
    stack = _layers(config)
    source, target = f"transformer_blocks.{{i}}.{source}", f"blocks/{target}"
    rows = [
        row
        for name in "qkv"
        for row in dense(
            f"{source}.to_{name}",
            f"{target}/{name}_proj",
            inputs=config.width,
            outputs=inner,
            bias=qkv_bias,
            stack=stack,
        )
    ]
    rows += dense(
        f"{source}.to_out.0", f"{target}/o_proj", inputs=inner, outputs=config.width, stack=stack
    )
    if config.qk_norm:
        rows += [
            Entry(
                f"{source}.norm_{n}.weight",
                f"{target}/{n}_norm/scale",
                Layout.COPY,
                (inner,),
                stack,
            )
            for n in "qk"
        ]
    return rows


def _ffn(config: SanaConfig) -> list[Entry]:
    stack = _layers(config)
    width, hidden = config.width, config.ffn_width
    source, target = "transformer_blocks.{i}.ff", "blocks/ffn"
    depthwise = f"{source}.conv_depth"
    return [
        *dense(
            f"{source}.conv_inverted",
            f"{target}/expand",
            inputs=width,
            outputs=2 * hidden,
            layout=Layout.POINTWISE,
            stack=stack,
        ),
        Entry(
            f"{depthwise}.weight",
            f"{target}/depthwise/kernel",
            Layout.CONV,
            (2 * hidden, 1, 3, 3),
            stack,
        ),
        Entry(f"{depthwise}.bias", f"{target}/depthwise/bias", Layout.COPY, (2 * hidden,), stack),
        *dense(
            f"{source}.conv_point",
            f"{target}/contract",
            inputs=hidden,
            outputs=width,
            bias=False,
            layout=Layout.POINTWISE,
            stack=stack,
        ),
    ]
