"""The full-size model on this machine: one 512 x 512 picture from text with guidance, random bfloat16 weights.

    python -m benchmarks.full_size
    python -m benchmarks.full_size --layers 4     # every stack cut to its first 4 layers

Prints seconds and peak memory after each part. Peak memory is the process's own, Python and XLA included.
"""

import argparse
import dataclasses
import resource
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from wemmu_jax.conversion.memory import flatten, nest
from wemmu_jax.diffusion.guidance import request_guidance
from wemmu_jax.inference.sampling import Canvas, Sampler, SolverSettings
from wemmu_jax.models.wemmu.batch import PromptBatch
from wemmu_jax.models.wemmu.config import BridgeConfig, WeMMUConfig
from wemmu_jax.models.wemmu.modeling import WeMMUModel
from wemmu_jax.models.wemmu.published import published_wemmu

SIDE = 512
QUERY_TOKENS = 384
TEXT_LENGTH = 128
GIB = 2**30
# Of 64 random bits, that is of 4 bfloat16 or 2 float32 values: what stays random, and the exponent of 1/64.
SIGN_AND_FRACTION = {4: np.uint64(0x807F807F807F807F), 2: np.uint64(0x807FFFFF807FFFFF)}
EXPONENT = {4: np.uint64(0x3C803C803C803C80), 2: np.uint64(0x3C8000003C800000)}


def peak_gib() -> float:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def cut(config: WeMMUConfig, layers: int) -> WeMMUConfig:
    """The same model with at most `layers` layers in the ViT, the LLM, the expert and the DiT."""
    vlm, dit = config.vlm, config.dit
    text, vision = vlm.text, vlm.vision
    text = dataclasses.replace(text, num_hidden_layers=min(layers, text.num_hidden_layers))
    full = tuple(i for i in vision.fullatt_block_indexes if i < layers)
    depth = min(layers, vision.depth)
    vision = dataclasses.replace(vision, depth=depth, fullatt_block_indexes=full)
    return dataclasses.replace(
        config,
        vlm=dataclasses.replace(vlm, text=text, vision=vision),
        dit=dataclasses.replace(dit, num_layers=min(layers, dit.num_layers)),
    )


def draw_leaf(path: str, shape: tuple[int, ...], rng: np.random.Generator, dtype) -> jax.Array:
    """Values of random sign between 1/64 and 1/32, which is how large initialised weights are; norms' scales are 1.

    Straight from random bits: billions of normal variates would take longer than all the rest.
    """
    if path.endswith("/scale"):
        return jnp.ones(shape, dtype)
    count, each = int(np.prod(shape)), 8 // np.dtype(dtype).itemsize
    bits = rng.integers(0, 2**64, -(-count // each), dtype=np.uint64)
    kept, fixed = SIGN_AND_FRACTION[each], EXPONENT[each]
    np.bitwise_and(bits, kept, out=bits)
    np.bitwise_or(bits, fixed, out=bits)
    # Blocked, or the bits of several leaves would wait in memory for their copy.
    return jax.block_until_ready(jnp.asarray(bits.view(dtype)[:count].reshape(shape)))


def draw_weights(model: WeMMUModel, dtype) -> dict:
    """All parts of the model, the largest leaf first, so that copies of it find the memory still free."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(model.init_backbones, key)
    shapes |= jax.eval_shape(model.init_bridge, key, shapes["vlm"]["text"])
    flat = sorted(flatten(shapes).items(), key=lambda item: -item[1].size)
    rng = np.random.Generator(np.random.SFC64(0))
    return nest({path: draw_leaf(path, leaf.shape, rng, dtype) for path, leaf in flat})


def prompt(words: int, vocabulary: int) -> PromptBatch:
    """One row of `words` tokens, padded."""
    place = np.arange(TEXT_LENGTH, dtype=np.int32)
    valid = place < words
    tokens = np.random.default_rng(words).integers(0, vocabulary, TEXT_LENGTH, dtype=np.int32)
    return PromptBatch(
        tokens=np.where(valid, tokens, 0)[None],
        feature_index=np.full((1, TEXT_LENGTH), -1, np.int32),
        position_ids=np.broadcast_to(np.where(valid, place, 0), (3, 1, TEXT_LENGTH)),
        valid=valid[None],
        next_position=np.array([words], np.int32),
    )


class Report:
    """Prints a line for each part: its seconds, and the peak until then."""

    def __init__(self):
        print(f"{'part':<28}{'seconds':>9}{'peak GiB':>10}", flush=True)

    def line(self, part: str, start: float) -> None:
        print(f"{part:<28}{time.perf_counter() - start:>9.1f}{peak_gib():>10.2f}", flush=True)

    def timed(self, part: str, function: Callable) -> Callable:
        """`function`, each call of it a line, compilation included."""

        def call(*args, **kwargs):
            start = time.perf_counter()
            result = jax.block_until_ready(function(*args, **kwargs))
            self.line(part, start)
            return result

        return call


def reported(sampler: Sampler, report: Report) -> Sampler:
    """The same sampler, its programs timed: they are cached properties, which live in its `__dict__`."""
    parts = {"condition": "read and write", "_integrate": "paint", "decode": "decode"}
    for name, part in parts.items():
        sampler.__dict__[name] = report.timed(part, getattr(sampler, name))
    return sampler


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=36, help="layers of each stack at most")
    parser.add_argument("--steps", type=int, default=2, help="of the solver")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Draws weights, then a picture."""
    args = arguments(argv)
    began = time.perf_counter()
    report = Report()
    dtype = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}[args.dtype]
    config = cut(published_wemmu(BridgeConfig()), args.layers)
    model = WeMMUModel(config, dtype=jnp.dtype(dtype))
    report.line("start", began)
    start = time.perf_counter()
    params = draw_weights(model, dtype)
    leaves = jax.tree.leaves(params)
    report.line("random weights", start)
    print(
        f"  {sum(leaf.size for leaf in leaves) / 1e9:.3f} B parameters, "
        f"{sum(leaf.nbytes for leaf in leaves) / GIB:.2f} GiB"
    )
    guidance = request_guidance(4.0)
    vocabulary = config.vlm.text.vocab_size
    pixels = reported(Sampler(model), report)(
        params,
        [(prompt(words, vocabulary), None) for words in (20, 60)],
        guidance=guidance,
        canvas=Canvas(SIDE, SIDE, config.query_grid(SIDE, SIDE), QUERY_TOKENS),
        settings=SolverSettings(steps=args.steps),
        seed=0,
        numbers=jnp.zeros(1, jnp.uint32),
    )
    picture = np.asarray(pixels)[0]
    report.line("all", began)
    print(f"  picture {picture.shape}, mean {picture.mean():.1f}, deviation {picture.std():.1f}")


if __name__ == "__main__":
    main()
