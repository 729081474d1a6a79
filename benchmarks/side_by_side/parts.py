"""Rows of single parts. B rows, L prompt tokens, Q queries, D width, C latent channels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers.cache_utils import DynamicCache, StaticCache

from benchmarks.side_by_side.control import Bare
from benchmarks.side_by_side.inputs import normal, pictures, prompt, source
from benchmarks.side_by_side.pair import Pair, compiled, on_device
from benchmarks.side_by_side.reference import NO_MASK, Cache
from benchmarks.side_by_side.timing import Row, Side
from wemmu_jax.models.qwen2_5_vl.decode import Sampling, generate
from wemmu_jax.models.qwen2_5_vl.prompt import query_position_ids
from wemmu_jax.models.qwen2_5_vl.text import KeyValues, Pattern
from wemmu_jax.ops.programs import jit, jit_stack
from wemmu_jax.planning import flops

EXACT, ROUNDED = 5e-5, 5e-2  # tolerance in float32 and in bfloat16
RUNGS = ("eager", "compiled")


def tolerance(pair: Pair) -> float:
    """Of the compute type."""
    return EXACT if pair.sizes.dtype == "float32" else ROUNDED


def rungs(pair: Pair, module: torch.nn.Module, run) -> dict[str, Side]:
    """`run(module)` without gradients, with the module as it is and compiled."""

    def call(module: torch.nn.Module):
        with torch.no_grad():
            return run(module)

    made = {"eager": module, "compiled": compiled(module, pair.sizes)}
    return {name: Side(functools.partial(call, made[name])) for name in RUNGS}


def on_torch(pair: Pair, array: np.ndarray) -> torch.Tensor:
    """A copy on torch's device; floating numbers in the compute type."""
    tensor = torch.from_numpy(np.array(array)).to(pair.sizes.device)
    return tensor.to(pair.dtype) if tensor.is_floating_point() else tensor


def vision(pair: Pair) -> Row:
    """The ViT over one picture."""
    given, config = source(pair.sizes, 1), pair.config.vlm.vision
    params, images = on_device((pair.params("vision")["vlm"]["vision"], given.packed))
    program = jit_stack(lambda p, images: pair.model.vision.apply({"params": p}, images))
    patches, grid = on_torch(pair, given.patches), given.grid_thw.to(pair.sizes.device)
    tokens = given.packed.order.shape[1]
    count = tokens * config.spatial_merge_size**2
    windows = count // (config.slot_units * config.spatial_merge_size**2)
    full = [layer in config.fullatt_block_indexes for layer in range(config.depth)]
    bare = Bare(
        width=config.hidden_size,
        inner=config.intermediate_size,
        heads=config.num_heads,
        key_heads=config.num_heads,
        head_width=config.head_dim,
        batches=tuple(1 if is_full or count % windows else windows for is_full in full),
        tokens=count,
    )
    return Row(
        ours=Side(lambda: program(params, images)),
        theirs=rungs(pair, pair.vision, lambda m: m(patches, grid_thw=grid).pooler_output),
        compared=lambda ours, theirs: [(ours[0], theirs)],
        tolerance=tolerance(pair),
        flops=flops.vision_flops(config, tokens),
        control=bare.sides(pair),
    )


def _bare_text(pair: Pair, tokens: int, **more) -> tuple[Side, Side]:
    config = pair.config.vlm.text
    bare = Bare(
        width=config.hidden_size,
        inner=config.intermediate_size,
        heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        head_width=config.head_dim,
        batches=(1,) * config.num_hidden_layers,
        tokens=tokens,
        **more,
    )
    return bare.sides(pair)


def prefill(pair: Pair) -> Row:
    """The LLM over a prompt with a picture: keys and values of every layer."""
    config = pair.config.vlm.text
    given = prompt(pair.sizes, rows=1, text=pair.sizes.text_tokens, sources=1)
    embeds = normal(1, given.length, config.hidden_size, seed=1)
    params = on_device(pair.params("text")["vlm"]["text"])
    x, own = jnp.asarray(embeds, pair.sizes.dtype), on_device(given.ours())

    def run(params, x, own):
        return pair.model.text.apply(
            {"params": params},
            x,
            own.position_ids,
            valid=own.valid,
            pattern=Pattern.CAUSAL,
            return_key_values=True,
        )

    def theirs(module):
        return module(inputs_embeds=inputs, position_ids=ids, use_cache=True)

    def compared(ours, theirs):
        layer = theirs.past_key_values.layers[-1]
        own = jax.tree.map(lambda leaf: leaf[-1].swapaxes(1, 2), ours[1])
        return [
            (ours[0], theirs.last_hidden_state),
            (own.key, layer.keys),
            (own.value, layer.values),
        ]

    program = jit_stack(run)
    inputs, ids = on_torch(pair, embeds), on_torch(pair, given.position_ids).long()
    return Row(
        ours=Side(lambda: program(params, x, own)),
        theirs=rungs(pair, pair.text, theirs),
        compared=compared,
        tolerance=tolerance(pair),
        flops=sum(flops.prefill_flops(config, given.length)),
        control=_bare_text(pair, given.length, causal=True),
    )


def decoding(pair: Pair) -> Row:
    """Greedy decoding after a prompt of text, its prefill included; the error is the share of other tokens."""
    sizes, config = pair.sizes, pair.config.vlm.text
    given, count = prompt(sizes, rows=1, text=sizes.text_tokens // 2), sizes.new_tokens
    params = on_device(pair.params("text")["vlm"]["text"])
    own = on_device(given.ours())
    program = jit_stack(
        generate, static_argnames=("model", "max_new_tokens", "eos_ids", "sampling")
    )

    @jit
    def embed(params, tokens):
        return pair.model.text.apply({"params": params}, tokens, method="embed")

    def ours():
        x = embed(params, own.tokens)
        decoded = program(
            pair.model.text,
            params,
            x,
            own.position_ids,
            own.valid,
            own.next_position,
            max_new_tokens=count,
            eos_ids=(),
            sampling=Sampling(),
            key=jax.random.key(0),
        )
        return decoded.tokens

    words = pair.text.embed_tokens.weight
    tokens, ids = on_torch(pair, given.tokens).long(), on_torch(pair, given.position_ids).long()

    @torch.no_grad()
    def theirs(module, make_cache):
        cache, given_tokens, at, out = make_cache(), tokens, ids, []
        for number in range(count):
            hidden = module(
                input_ids=given_tokens, position_ids=at, past_key_values=cache, use_cache=True
            ).last_hidden_state[:, -1:]
            given_tokens = (hidden @ words.T).argmax(-1)
            at = ids.new_full((3, 1, 1), given.next_position + number)
            out.append(given_tokens)
        return torch.cat(out, dim=1)

    growing = functools.partial(DynamicCache, config=pair.text.config)
    # A static cache keeps torch.compile from compiling for every length.
    fixed = functools.partial(
        StaticCache, config=pair.text.config, max_cache_len=given.length + count
    )
    layers = sum(flops.prefill_flops(config, given.length + count))
    logits = 2.0 * count * config.vocab_size * config.hidden_size
    return Row(
        ours=Side(ours),
        theirs={
            "eager": Side(functools.partial(theirs, pair.text, growing)),
            "compiled": Side(functools.partial(theirs, compiled(pair.text, sizes), fixed)),
        },
        compared=lambda ours, theirs: [(_other_tokens(ours, theirs), torch.ones(1))],
        # Random weights make close calls, on which bfloat16 errs; `Sizes.exact` has told that the rest is right.
        tolerance=0.0 if sizes.dtype == "float32" else 1.0,
        flops=layers + logits,
    )


def _other_tokens(ours, theirs) -> np.ndarray:
    """One more than the share of tokens that differ, so that its relative error to 1 is that share."""
    return 1 + np.mean(np.asarray(ours) != theirs.cpu().numpy(), keepdims=True)[0]


def expert(pair: Pair, *, backward: bool) -> Row:
    """The expert's layers over the keys and values of a prompt, or their weights' gradient."""
    sizes, config = pair.sizes, pair.config.vlm.text
    given = prompt(sizes, rows=1, text=sizes.text_tokens, sources=1)
    queries, context = sizes.grid[0] * sizes.grid[1], given.length
    shape = (config.num_hidden_layers, 1, context, config.num_key_value_heads, config.head_dim)
    cache, noise = normal(2, *shape, seed=2), normal(1, queries, config.hidden_size, seed=3)
    weights = normal(1, queries, config.hidden_size, seed=4)
    ids = query_position_ids(np.array([given.next_position], np.int32), sizes.grid)

    def forward(params, x, key_values):
        return pair.model.expert.apply(
            {"params": params},
            x,
            ids,
            valid=jnp.ones((1, queries), bool),
            context=key_values,
            context_valid=jnp.ones((1, context), bool),
            pattern=Pattern.FULL,
            return_key_values=False,
        )[0]

    def loss(params, x, key_values):
        return jnp.sum(forward(params, x, key_values).astype(jnp.float32) * weights)

    params = on_device(pair.params("expert")["expert"])
    x = jnp.asarray(noise, sizes.dtype)
    key_values = KeyValues(*jnp.asarray(cache, sizes.dtype))
    # Training is compiled by `jit`, sampling by `jit_stack`.
    program = jit(jax.grad(loss)) if backward else jit_stack(forward)

    inputs, at = on_torch(pair, noise), on_torch(pair, ids).long()
    keys, values = (on_torch(pair, part).transpose(2, 3) for part in cache)
    target = on_torch(pair, weights).float()
    parameters = list(pair.expert.parameters())

    def theirs(module):
        return module(
            inputs_embeds=inputs,
            attention_mask=NO_MASK,
            position_ids=at,
            past_key_values=Cache(list(zip(keys, values, strict=True))),
        ).last_hidden_state

    def gradient(module):
        with torch.enable_grad():
            return torch.autograd.grad((theirs(module).float() * target).sum(), parameters)

    def compared(ours, theirs):
        if not backward:
            return [(ours, theirs)]
        names = [name for name, _ in pair.expert.named_parameters()]
        found = dict(zip(names, theirs, strict=True))
        layers, first = ours["layers"], "layers.0."
        return [
            (
                layers["attention"]["q_proj"]["kernel"][0].T,
                found[first + "self_attn.q_proj.weight"],
            ),
            (layers["mlp"]["down_proj"]["kernel"][0].T, found[first + "mlp.down_proj.weight"]),
            (layers["input_layernorm"]["scale"][0], found[first + "input_layernorm.weight"]),
        ]

    if backward:
        pair.expert.requires_grad_(True)
    cost = sum(flops.expert_flops(config, queries, context))
    return Row(
        ours=Side(lambda: program(params, x, key_values)),
        theirs=rungs(pair, pair.expert, gradient if backward else theirs),
        compared=compared,
        tolerance=(2 if backward else 1) * tolerance(pair),
        flops=3 * cost if backward else cost,
        control=_bare_text(pair, queries, context=context, backward=backward),
    )


def dit_forward(pair: Pair) -> Row:
    """Sana's velocity for the two branches of a guided picture."""
    sizes, config = pair.sizes, pair.config.dit
    side, rows = sizes.side // pair.config.dc_ae.ratio, 2
    queries = sizes.grid[0] * sizes.grid[1]
    latents = normal(rows, side, side, config.in_channels, seed=1)
    condition = normal(rows, queries, config.caption_channels, seed=2)
    times = np.array([371.37, 912.781], np.float32)
    params = on_device(pair.params("dit")["dit"])
    valid = jnp.ones((rows, queries), bool)
    own = jnp.asarray(latents), jnp.asarray(times), jnp.asarray(condition, sizes.dtype)
    program = jit_stack(lambda p, *args: pair.model.dit.apply({"params": p}, *args))
    given = on_torch(pair, latents.transpose(0, 3, 1, 2)), on_torch(pair, condition)
    at = torch.from_numpy(times).to(sizes.device)

    def theirs(module):
        out = module(given[0], encoder_hidden_states=given[1], timestep=at)
        return out.sample.permute(0, 2, 3, 1).float()

    return Row(
        ours=Side(lambda: program(params, *own, valid)),
        theirs=rungs(pair, pair.dit, theirs),
        compared=lambda ours, theirs: [(ours, theirs)],
        tolerance=tolerance(pair),
        flops=rows * flops.dit_flops(config, side * side, queries),
    )


def encode(pair: Pair) -> Row:
    """The DC-AE's encoder over one picture."""
    sizes = pair.sizes
    pixels = pictures(1, sizes.side, sizes.side, seed=1)
    params, own = on_device((pair.params("dc_ae"), pixels))
    program = jit(pair.model.encode)
    given = on_torch(pair, pixels.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
    scale = pair.config.dc_ae.scaling_factor
    return Row(
        ours=Side(lambda: program(params, own)),
        theirs=rungs(pair, pair.dc_ae.encoder, lambda m: m(given).float() * scale),
        compared=lambda ours, theirs: [(ours.transpose(0, 3, 1, 2), theirs)],
        tolerance=tolerance(pair),
        flops=flops.encode_flops(pair.config.dc_ae, sizes.side, sizes.side),
    )


def decode(pair: Pair) -> Row:
    """The DC-AE's decoder, before pixels are rounded."""
    sizes, config = pair.sizes, pair.config.dc_ae
    side = sizes.side // config.ratio
    latents = normal(1, side, side, config.latent_channels, seed=1)
    params, own = on_device((pair.params("dc_ae")["dc_ae"], latents))
    program = jit(lambda p, z: pair.model.dc_ae.apply({"params": p}, z, method="decode"))
    given = on_torch(pair, latents.transpose(0, 3, 1, 2) / config.scaling_factor)
    return Row(
        ours=Side(lambda: program(params, own)),
        theirs=rungs(pair, pair.dc_ae.decoder, lambda m: m(given).float()),
        compared=lambda ours, theirs: [(ours.transpose(0, 3, 1, 2), theirs)],
        tolerance=tolerance(pair),
        flops=flops.decode_flops(config, sizes.side, sizes.side),
    )
