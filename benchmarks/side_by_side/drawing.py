"""Rows of pictures, from tokens to pixels."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.side_by_side.inputs import prompt, source
from benchmarks.side_by_side.pair import Pair, on_device
from benchmarks.side_by_side.parts import RUNGS, on_torch
from benchmarks.side_by_side.reference import PARTS, Modules
from benchmarks.side_by_side.timing import Row, Side
from wemmu_jax.diffusion.guidance import Branch, Guidance, edit_guidance, request_guidance
from wemmu_jax.inference.sampling import Canvas, Sampler, SolverSettings
from wemmu_jax.models.wemmu.batch import Sources
from wemmu_jax.models.wemmu.queries import draw_noise
from wemmu_jax.planning import flops
from wemmu_jax.rng import Stream, per_sample, stream_key

BLANK_TEXT, SHORT_TEXT = 24, 32  # tokens of the empty and of the reconstruction prompt
SEED = 3


def text_to_image(pair: Pair) -> Row:
    """Words to pixels."""
    return _drawing(pair, request_guidance(4.0))


def edit(pair: Pair) -> Row:
    """Words and a picture to pixels."""
    return _drawing(pair, edit_guidance(image=2.0, edit=3.0), sources=True)


def _drawing(pair: Pair, guidance: Guidance, *, sources: bool = False) -> Row:
    sizes, config = pair.sizes, pair.config
    rows, grid, ratio = sizes.pictures, sizes.grid, config.dc_ae.ratio
    text = {
        Branch.NOTHING: BLANK_TEXT,
        Branch.SOURCE: SHORT_TEXT,
        Branch.REQUEST: sizes.text_tokens,
    }
    prompts = {
        branch: prompt(
            sizes,
            rows=rows,
            text=min(text[branch], sizes.text_tokens),
            sources=int(sources and branch is not Branch.NOTHING),
            seed=i,
        )
        for i, branch in enumerate(guidance.branches)
    }
    given = source(sizes, rows) if sources else None
    names = [name for name in PARTS if sources or name not in ("vision", "vae_linear")]
    params, sampler = on_device(pair.params(*names)), Sampler(pair.model)
    numbers = jnp.arange(rows, dtype=jnp.uint32)
    # Texts are padded as `WeMMU` pads them, so that few programs are compiled.
    padding = {branch: sizes.text_tokens - min(text[branch], sizes.text_tokens) for branch in text}
    own = {branch: on_device(p.ours(p.length + padding[branch])) for branch, p in prompts.items()}
    images = on_device(given.packed) if sources else None
    pixels = jnp.asarray(given.pixels) if sources else None

    def ours():
        latents = (sampler.encode(params, pixels),) if sources else ()
        branches = []
        for branch, p in prompts.items():
            has = sources and branch is not Branch.NOTHING
            branches.append((own[branch], Sources(images, p.place, latents) if has else None))
        return sampler(
            params,
            branches,
            guidance=guidance,
            canvas=Canvas(sizes.side, sizes.side, grid, grid[0] * grid[1]),
            settings=SolverSettings(steps=sizes.solver_steps),
            seed=SEED,
            numbers=numbers,
        )

    queries = on_torch(pair, draw_noise(SEED, numbers, grid=grid, width=pair.model.width))
    shown = sources and dataclasses.replace(given, patches=on_torch(pair, given.patches))
    shape = (sizes.side // ratio, sizes.side // ratio, config.dit.in_channels)
    key = stream_key(SEED, Stream.SAMPLER)
    noise = per_sample(key, numbers, lambda k: jax.random.normal(k, shape, jnp.float32))
    noise = torch.from_numpy(np.array(noise)).permute(0, 3, 1, 2).contiguous().to(sizes.device)
    weights = [weight for _, weight in guidance.weights]

    @torch.no_grad()
    def theirs(modules: Modules):
        latents = modules.to_latents(given.pixels) if sources else None
        conditions = []
        for branch, p in prompts.items():
            seen = shown if sources and branch is not Branch.NOTHING else None
            cache = modules.read(p, seen, latents)
            conditions.append(modules.write(p, cache, queries))
        drawn = modules.solve(torch.cat(conditions), noise, weights, sizes.solver_steps)
        return modules.to_pixels(drawn)

    made = {rung: Modules.of(pair, rung, sources=sources) for rung in RUNGS}
    return Row(
        ours=Side(ours),
        theirs={rung: Side(functools.partial(theirs, made[rung])) for rung in RUNGS},
        compared=lambda ours, theirs: [(ours, theirs)],
        # Pixels are whole numbers; guidance amplifies what rounding does to a velocity.
        tolerance=5e-4 if sizes.dtype == "float32" else 0.2,
        flops=rows * _drawing_flops(pair, [p.length for p in prompts.values()], sources),
        pictures=rows,
    )


def _drawing_flops(pair: Pair, lengths: list[int], sources: bool) -> float:
    sizes, config = pair.sizes, pair.config
    tokens, side = sizes.grid[0] * sizes.grid[1], sizes.side // config.dc_ae.ratio
    text = config.vlm.text
    total = flops.decode_flops(config.dc_ae, sizes.side, sizes.side)
    total += sizes.solver_steps * len(lengths) * flops.dit_flops(config.dit, side**2, tokens)
    for length in lengths:
        total += sum(flops.prefill_flops(text, length))
        total += sum(flops.expert_flops(text, tokens, length))
        total += flops.position_mlp_flops(config, tokens)
    if sources:
        total += (len(lengths) - 1) * flops.vision_flops(config.vlm.vision, tokens)
        read = [side * config.dc_ae.ratio for side in sizes.grid]
        total += flops.encode_flops(config.dc_ae, *read)
    return total
