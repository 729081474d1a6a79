"""`wemmu convert`: Hugging Face folders -> our checkpoint."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run` reads."""
    parser.add_argument(
        "--vlm", required=True, metavar="DIR|ID", help="folder or hub id of a Qwen2.5-VL"
    )
    parser.add_argument(
        "--sana",
        required=True,
        metavar="DIR|ID",
        help="folder or hub id of a Sana in diffusers' layout, with its DC-AE in vae/",
    )
    parser.add_argument(
        "--bridge",
        metavar="FILE",
        help="bridge.safetensors of `wemmu export`: the whole model again",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="a new folder; it appears whole or not at all"
    )


def run(args: argparse.Namespace) -> None:
    """Converts, and says what was done."""
    from wemmu_jax.conversion.convert import convert

    report = convert(args.vlm, args.sana, args.out, args.bridge)
    print(
        f"{args.out}: {report.tensors} tensors, {report.bytes / 1e9:.3f} GB, {report.seconds:.1f} s"
    )
    if report.ignored:
        print(f"not needed: {', '.join(report.ignored)}")
