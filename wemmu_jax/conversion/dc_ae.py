"""The conversion table of DC-AE: diffusers `AutoencoderDC` <-> `wemmu_jax.models.dc_ae`."""

from wemmu_jax.conversion.table import Entry, Layout, dense
from wemmu_jax.models.dc_ae.config import BlockKind, DCAEConfig, Stage


def table(config: DCAEConfig) -> list[Entry]:
    """One row for each tensor of the model, or for the stack of a stage's layers; all of them are covered."""
    return [*_encoder(config), *_decoder(config)]


def _encoder(config: DCAEConfig) -> list[Entry]:
    stages, last = config.encoder, config.encoder[-1].width
    rows = _conv("encoder.conv_in", "encoder/conv_in", inputs=3, outputs=stages[0].width)
    for i, stage in enumerate(stages):
        blocks = f"encoder.down_blocks.{i}"
        rows += _stage(blocks, f"encoder/stage_{i}", stage, config.head_dim, first=0)
        if i + 1 < len(stages):  # the step down stands behind its finer stage's blocks
            rows += _conv(
                f"{blocks}.{stage.layers}.conv",
                f"encoder/down_{i + 1}/conv",
                inputs=stage.width,
                outputs=stages[i + 1].width,
            )
    latents = config.latent_channels
    return rows + _conv("encoder.conv_out", "encoder/conv_out", inputs=last, outputs=latents)


def _decoder(config: DCAEConfig) -> list[Entry]:
    stages, last = config.decoder, config.decoder[-1].width
    latents = config.latent_channels
    rows = _conv("decoder.conv_in", "decoder/conv_in", inputs=latents, outputs=last)
    for i, stage in enumerate(stages):
        blocks, steps_up = f"decoder.up_blocks.{i}", i + 1 < len(stages)
        if steps_up:  # the step up stands before its finer stage's blocks
            rows += _conv(
                f"{blocks}.0.conv",
                f"decoder/up_{i}/conv",
                inputs=stages[i + 1].width,
                outputs=stage.width,
            )
        rows += _stage(
            blocks, f"decoder/stage_{i}", stage, config.head_dim, first=1 if steps_up else 0
        )
    finest = stages[0].width
    rows += _norm("decoder.norm_out", "decoder/norm_out", finest)
    return rows + _conv("decoder.conv_out", "decoder/conv_out", inputs=finest, outputs=3)


def _stage(source: str, target: str, stage: Stage, head_dim: int, *, first: int) -> list[Entry]:
    """Rows of the equal blocks `source.{first}`, `source.{first + 1}`, ..."""
    stack = tuple(range(first, first + stage.layers))
    source = source + ".{i}"
    if stage.kind is BlockKind.RES:
        return _res_block(source, target, stage.width, stack)
    return [
        *_attention(f"{source}.attn", f"{target}/attention", stage, head_dim, stack),
        *_gated_conv(f"{source}.conv_out", f"{target}/feed_forward", stage.width, stack),
    ]


def _res_block(source: str, target: str, width: int, stack: tuple[int, ...]) -> list[Entry]:
    sizes = {"inputs": width, "outputs": width, "stack": stack}
    return [
        *_conv(f"{source}.conv1", f"{target}/conv1", **sizes),
        *_conv(f"{source}.conv2", f"{target}/conv2", bias=False, **sizes),
        *_norm(f"{source}.norm", f"{target}/norm", width, stack),
    ]


def _attention(
    source: str, target: str, stage: Stage, head_dim: int, stack: tuple[int, ...]
) -> list[Entry]:
    inner = stage.width // head_dim * head_dim
    rows: list[Entry] = []
    for theirs, ours in (("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
        rows += dense(
            f"{source}.{theirs}",
            f"{target}/{ours}",
            inputs=stage.width,
            outputs=inner,
            bias=False,
            stack=stack,
        )
    for i, size in enumerate(stage.kernel_sizes):
        scale = f"{source}.to_qkv_multiscale.{i}"
        rows += _conv(
            f"{scale}.proj_in",
            f"{target}/scale_{i}_depthwise",
            inputs=1,
            outputs=3 * inner,
            size=size,
            bias=False,
            stack=stack,
        )
        rows += dense(
            f"{scale}.proj_out",
            f"{target}/scale_{i}_mix",
            inputs=head_dim,
            outputs=3 * inner,
            bias=False,
            layout=Layout.POINTWISE,
            stack=stack,
        )
    rows += dense(
        f"{source}.to_out",
        f"{target}/out",
        inputs=inner * (1 + len(stage.kernel_sizes)),
        outputs=stage.width,
        bias=False,
        stack=stack,
    )
    return rows + _norm(f"{source}.norm_out", f"{target}/norm", stage.width, stack)


def _gated_conv(source: str, target: str, width: int, stack: tuple[int, ...]) -> list[Entry]:
    hidden = 4 * width
    pointwise = {"layout": Layout.POINTWISE, "stack": stack}
    return [
        *dense(
            f"{source}.conv_inverted",
            f"{target}/expand",
            inputs=width,
            outputs=2 * hidden,
            **pointwise,
        ),
        *_conv(
            f"{source}.conv_depth",
            f"{target}/depthwise",
            inputs=1,
            outputs=2 * hidden,
            stack=stack,
        ),
        *dense(
            f"{source}.conv_point",
            f"{target}/project",
            inputs=hidden,
            outputs=width,
            bias=False,
            **pointwise,
        ),
        *_norm(f"{source}.norm", f"{target}/norm", width, stack),
    ]


def _conv(
    source: str,
    target: str,
    *,
    inputs: int,
    outputs: int,
    size: int = 3,
    bias: bool = True,
    stack: tuple[int, ...] | None = None,
) -> list[Entry]:
    """Rows of a convolution; `inputs` is 1 for a depthwise one."""
    shape = (outputs, inputs, size, size)
    rows = [Entry(f"{source}.weight", f"{target}/kernel", Layout.CONV, shape, stack)]
    if bias:
        rows.append(Entry(f"{source}.bias", f"{target}/bias", Layout.COPY, (outputs,), stack))
    return rows


def _norm(
    source: str, target: str, width: int, stack: tuple[int, ...] | None = None
) -> list[Entry]:
    return [
        Entry(f"{source}.weight", f"{target}/scale", Layout.COPY, (width,), stack),
        Entry(f"{source}.bias", f"{target}/bias", Layout.COPY, (width,), stack),
    ]
