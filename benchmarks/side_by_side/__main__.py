"""The same weights and inputs through this project and through transformers + diffusers on torch, in turns.

    python -m benchmarks.side_by_side --sizes cpu --write docs/performance.md
    python -m benchmarks.side_by_side --sizes gpu-512 --write docs/performance.md     # an H100 of 78 GiB
    python -m benchmarks.side_by_side --sizes gpu-1024 --write docs/performance.md    # an H200 of 139 GiB
    python -m benchmarks.side_by_side --small

Parity is asserted before time is taken; where a comparison runs in bfloat16, in float32 on few layers as well. Each row
is a process of its own, so that none finds the memory of another. The first, "peak", measures what the device can do;
MFU is the share of that. What misses its bound, its MFU or its pictures a second (`table.py`) is marked; then, and
after a row that failed, the exit code is 1. Needs requirements-dev.txt.
"""

import argparse
import functools
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable

ROWS = (
    "peak",
    "ViT",
    "prefill",
    "decoding",
    "expert forward",
    "expert forward and backward",
    "DiT forward",
    "DiT training step",
    "DC-AE encode",
    "DC-AE decode",
    "T2I",
    "edit",
    "stage 1 step",
    "stage 2 step",
)


def row_of(name: str) -> Callable:
    """Pair -> Row."""
    from benchmarks.side_by_side import drawing, parts, peak, steps

    rows = {
        "peak": peak.peak,
        "ViT": parts.vision,
        "prefill": parts.prefill,
        "decoding": parts.decoding,
        "expert forward": functools.partial(parts.expert, backward=False),
        "expert forward and backward": functools.partial(parts.expert, backward=True),
        "DiT forward": parts.dit_forward,
        "DiT training step": steps.dit_training,
        "DC-AE encode": parts.encode,
        "DC-AE decode": parts.decode,
        "T2I": drawing.text_to_image,
        "edit": drawing.edit,
        "stage 1 step": functools.partial(steps.stage_step, stage=1),
        "stage 2 step": functools.partial(steps.stage_step, stage=2),
    }
    return rows[name]


def run_row(name: str, sizes, *, rounds: int, rungs: tuple[str, ...] = ("eager", "compiled")):
    """The `Result` of a row in this process.

    Raises:
      AssertionError: the libraries do not agree.
      RuntimeError: the device is not there.
    """
    import jax
    import torch

    from benchmarks.side_by_side.pair import Pair, free
    from benchmarks.side_by_side.timing import measure

    check_device(sizes.device, jax.default_backend(), torch.cuda.is_available())
    if sizes.exact != sizes:
        # Torch's convolutions would run in TF32, its products do not.
        full = torch.backends.cudnn.flags(allow_tf32=False)
        with jax.default_matmul_precision("highest"), full:
            measure(row_of(name)(Pair(sizes.exact)), rounds=0, rungs=rungs[:1])
        free()
    row = row_of(name)(Pair(sizes))
    return measure(row, rounds=rounds, rungs=[rung for rung in rungs if rung in row.theirs])


def check_device(wanted: str, backend: str, cuda: bool) -> None:
    """Raises RuntimeError if one of the libraries does not have the device."""
    if wanted == "cuda" and not (backend == "gpu" and cuda):
        raise RuntimeError(
            f"these sizes need a GPU in both libraries; jax runs on {backend}, and torch "
            f"{'sees' if cuda else 'sees no'} GPU. Install jax[cuda13] and torch for CUDA, or take --sizes cpu"
        )
    if wanted == "cpu" and backend != "cpu":
        raise RuntimeError(
            f"these sizes are for a CPU, and jax runs on {backend}: set JAX_PLATFORMS=cpu"
        )


def main(argv: list[str] | None = None) -> int:
    """Measures; returns how many rows missed their bound or failed."""
    args = _arguments(argv)
    if args.row:
        return _child(args)
    from benchmarks.side_by_side.sizes import PRESETS
    from benchmarks.side_by_side.table import PEAK, Table, write_section
    from benchmarks.side_by_side.timing import Result

    sizes = PRESETS[args.sizes]
    names = [name for name in ROWS if name == PEAK or any(text in name for text in args.only)]
    names = [n for n in names if "stage" not in n or int(n.split()[1]) in sizes.stages]
    if names == [PEAK] and not any(text in PEAK for text in args.only):
        raise SystemExit(
            f"--only {' '.join(args.only)}: no row of --sizes {args.sizes} has such a name"
        )
    shown, about = Table(sizes), {}
    print(shown.head, flush=True)
    for name in names:
        found = _spawn(args, name, apart=sizes.apart and "step" in name)
        about = found.pop("about", about)
        shown.results[name] = found["failed"] if "failed" in found else Result(**found)
        print(shown.line(name), flush=True)
    device, versions = about.get("device", "?"), about.get("versions", "?")
    heading = f"{device}; {versions}; {sizes.dtype}, {args.rounds} rounds. {shown.said_of_peak}"
    print(heading)
    if args.write:
        write_section(args.write, sizes.name, shown.text(heading))
    return sum(1 for name in names if shown.missed(name))


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    from benchmarks.side_by_side.sizes import PRESETS

    parser = argparse.ArgumentParser(prog="benchmarks.side_by_side")
    parser.add_argument("--sizes", choices=sorted(PRESETS), default="cpu")
    parser.add_argument("--small", dest="sizes", action="store_const", const="small")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="rows whose name has one of them"
    )
    parser.add_argument("--eager", action="store_true", help="no torch.compile")
    parser.add_argument("--write", type=pathlib.Path, metavar="PAGE.md")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=pathlib.Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _spawn(args: argparse.Namespace, name: str, *, apart: bool) -> dict:
    """The row's result, from a process of its own."""
    # Torch needs what jax does not use; in turns it needs all of it, so jax gives memory back at once.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if apart:
        environment["XLA_PYTHON_CLIENT_ALLOCATOR"] = "platform"
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "row.json"
        words = ["--sizes", args.sizes, "--rounds", str(args.rounds), "--row", name]
        words += ["--out", str(out), *(["--eager"] if args.eager else [])]
        command = [sys.executable, "-m", "benchmarks.side_by_side", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip() or "no word").splitlines()[-1]
            return {"failed": f"failed, code {done.returncode}: {last}"}
        return json.loads(out.read_text())


def _child(args: argparse.Namespace) -> int:
    import dataclasses

    import jax
    import torch

    from benchmarks.side_by_side.sizes import PRESETS

    rungs = ("eager",) if args.eager else ("eager", "compiled")
    result = run_row(args.row, PRESETS[args.sizes], rounds=args.rounds, rungs=rungs)
    device = jax.devices()[0].device_kind
    if device == "cpu":
        device = f"{torch.get_num_threads()} cores of {_processor()}"
    versions = f"jax {jax.__version__}, torch {torch.__version__}"
    about = {"about": {"device": device, "versions": versions}}
    args.out.write_text(json.dumps(dataclasses.asdict(result) | about))
    return 0


def _processor() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for found in cpuinfo.read_text().splitlines():
            if found.startswith("model name"):
                return found.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(min(main(), 1))
