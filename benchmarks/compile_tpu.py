"""Compiles the real programs of training for a TPU that is not there, and says what memory they need.

    pip install -r requirements-tpu.txt
    python -m benchmarks.compile_tpu v5p:2x2x2

Nothing runs, so nothing here is a measurement of speed. Memory is GiB a chip, as the compiler plans it: what comes
in, what goes out beyond the buffers that it takes over, temporaries, and the peak of all.
"""

import argparse
import collections
import dataclasses
import hashlib
import os
import re
import time
from collections.abc import Iterator
from typing import Any

os.environ["JAX_PLATFORMS"] = (
    "cpu"  # one process must not take a real TPU that it only compiles for
)

import jax

from configs.wemmu_3b import STAGES, get_config
from wemmu_jax.models.wemmu.config import VAEStream
from wemmu_jax.models.wemmu.published import published_wemmu
from wemmu_jax.sharding.mesh import make_mesh
from wemmu_jax.sharding.topology import topology_devices
from wemmu_jax.training.abstract import AbstractRun
from wemmu_jax.training.curriculum import Stage

GIB = 2**30
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
COLUMNS = (
    f"{'stage':<8}{'stream':<8}{'program':<13}{'arity':<7}{'bucket':<11}{'rows':<6}"
    f"{'lower s':>7}{'compile s':>11}{'in':>6}{'out':>6}{'temp':>6}{'peak':>7}  collectives in the text"
)


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of a stage, lowered."""

    stage: str
    stream: str
    name: str
    arity: int | None
    bucket: str
    rows: int
    lowered: jax.stages.Lowered
    seconds: float

    @property
    def fingerprint(self) -> str:
        """Equal for programs that are the same to the compiler."""
        return hashlib.sha256(self.lowered.as_text().encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program."""

    seconds: float
    memory: Any
    collectives: dict[str, int]
    optimised: str


def compiled(lowered: jax.stages.Lowered) -> Compiled:
    """Compiles for the devices that the arguments lie on."""
    start = time.perf_counter()
    result = lowered.compile()
    seconds = time.perf_counter() - start
    text = result.as_text()
    found = re.findall(rf"= .*? ({'|'.join(COLLECTIVES)})(?:-start)?\(", text)
    return Compiled(seconds, result.memory_analysis(), collections.Counter(found), text)


def programs(
    stage: str, stream: str, devices: list, *, rows: dict[int, int], fsdp: int, text_length: int
) -> Iterator[Program]:
    """Those that an optimizer step of a stage runs, at its square bucket."""
    config = get_config(stage)
    # A constant of the program; stages that differ in nothing else are compiled once.
    config.seed = 0
    config.model.bridge.vae_stream = stream
    config.batch.rows = rows[config.data.resolution]
    sizes = published_wemmu(Stage.from_config(config).bridge)
    run = AbstractRun.of(config, sizes, make_mesh(fsdp=fsdp, devices=devices))
    bucket = run.square
    place = f"{bucket.height}x{bucket.width}"

    def program(name: str, arity: int | None, lower) -> Program:
        start = time.perf_counter()
        lowered = lower()
        seconds = time.perf_counter() - start
        return Program(stage, stream, name, arity, place, config.batch.rows, lowered, seconds)

    pixels = run.pixels(bucket, arity=1)
    yield program("encode", None, lambda: run.encode(pixels.target))
    yield program("encode src", None, lambda: run.encode(pixels.sources[0]))
    for arity in arities(config.data.mixture):
        batch = run.batch(bucket, arity=arity, text_length=text_length)
        yield program("accumulate", arity, lambda batch=batch: run.accumulate(batch))
    yield program("update", None, run.update)


def arities(mixture) -> tuple[int, ...]:
    """Pictures a prompt of a stage's micro-batches; M-Edit counts as two."""
    one = mixture["Rec"] or mixture["S-Edit"]
    return (0, *((1,) if one else ()), *((2,) if mixture["M-Edit"] else ()))


def line(program: Program, result: Compiled, *, note: str) -> str:
    """One row of the table."""
    memory = result.memory
    out = memory.output_size_in_bytes - memory.alias_size_in_bytes
    numbers = (memory.argument_size_in_bytes, out, memory.temp_size_in_bytes)
    inputs, outputs, temporary = (number / GIB for number in numbers)
    peak = memory.peak_memory_in_bytes / GIB
    arity = "-" if program.arity is None else program.arity
    kinds = "  ".join(f"{count} {kind}" for kind, count in sorted(result.collectives.items()))
    return (
        f"{program.stage:<8}{program.stream:<8}{program.name:<13}{arity:<7}{program.bucket:<11}{program.rows:<6}"
        f"{program.seconds:>7.1f}{result.seconds:>11.1f}{inputs:>6.1f}{outputs:>6.1f}{temporary:>6.1f}{peak:>7.1f}"
        f"  {note or kinds}"
    )


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("topology", help="v5p:2x2x2, v6e:4x4, ...")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--streams", nargs="+", default=[stream.value for stream in VAEStream])
    parser.add_argument("--fsdp", type=int, default=8)
    parser.add_argument("--rows-512", type=int, default=32, help="rows of a micro-batch in stage 1")
    parser.add_argument("--rows-1024", type=int, default=16, help="rows in stages 2 to 4")
    parser.add_argument("--text-length", type=int, default=128)
    parser.add_argument("--only", help="compile only programs whose name starts so")
    parser.add_argument("--dump", help="folder for the optimised programs' text")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Prints the table, a line as soon as it is known."""
    args = arguments(argv)
    devices = topology_devices(args.topology)
    print(
        f"{args.topology}: {len(devices)} x {devices[0].device_kind}, fsdp {args.fsdp}\n{COLUMNS}"
    )
    done: dict[str, tuple[str, Compiled]] = {}
    rows = {512: args.rows_512, 1024: args.rows_1024}
    common = {"rows": rows, "fsdp": args.fsdp, "text_length": args.text_length}
    for stage in args.stages:
        for stream in args.streams:
            for program in programs(stage, stream, devices, **common):
                if args.only and not program.name.startswith(args.only):
                    continue
                note, key = "", program.fingerprint
                if key in done:
                    note = f"the same program as {done[key][0]}"
                else:
                    done[key] = (f"{stage} {stream}", compiled(program.lowered))
                    if args.dump:
                        _dump(args.dump, program, done[key][1])
                print(line(program, done[key][1], note=note), flush=True)


def _dump(folder: str, program: Program, result: Compiled) -> None:
    os.makedirs(folder, exist_ok=True)
    name = f"{program.stage}_{program.stream}_{program.name}_{program.arity}.txt".replace(" ", "_")
    with open(os.path.join(folder, name), "w") as file:
        file.write(result.optimised)


if __name__ == "__main__":
    main()
