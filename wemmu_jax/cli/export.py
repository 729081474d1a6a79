"""`wemmu export`: our checkpoint -> Hugging Face folders, and one file of what WeMMU adds."""

import argparse
import dataclasses
import pathlib


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
      tensors: in the Hugging Face folders.
      bytes: their size.
      trained: leaves of the backbones that are trained ones.
      bridge: leaves in the bridge's file, 0 if there is none.
    """

    tensors: int
    bytes: int
    trained: int
    bridge: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run` reads."""
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a converted folder, or a workdir"
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="a new folder: vlm/ for transformers, sana/ for diffusers, bridge.safetensors",
    )


def run(args: argparse.Namespace) -> None:
    """Exports, and says what was written."""
    done = export_checkpoint(args.checkpoint, args.out)
    print(
        f"{args.out}/vlm, {args.out}/sana: {done.tensors} tensors, {done.bytes / 1e9:.3f} GB; "
        f"trained leaves: {done.trained}"
    )
    if done.bridge:
        print(f"{args.out}/bridge.safetensors: {done.bridge} leaves")
    else:
        print(f"no bridge.safetensors: {args.checkpoint} has no trained bridge")


def export_checkpoint(checkpoint: str, out: str) -> Exported:
    """Writes OUT/vlm, OUT/sana and, of a training workdir, OUT/bridge.safetensors.

    Leaves of the backbones that were trained (the DiT's) take their place in the backbone's own type.

    Args:
      checkpoint: a converted folder or a training workdir.
      out: the folder to write; it appears only when it is complete.

    Raises:
      FileExistsError: `out` is there already.
      FileNotFoundError: there are no weights at `checkpoint`.
      ValueError: they are damaged.
    """
    from wemmu_jax.conversion.bridge import BRIDGE_FILE, save_bridge
    from wemmu_jax.conversion.export import export_backbones
    from wemmu_jax.conversion.staging import staged
    from wemmu_jax.models.wemmu.config import BridgeConfig
    from wemmu_jax.training.origin import Origin

    with staged(pathlib.Path(out)) as partial:
        origin = Origin(checkpoint)
        weights, bridge = origin.backbones, origin.trained(_in_host_memory())
        tuned = {
            path: bridge.pop(path).astype(spec.dtype)
            for path, spec in weights.specs.items()
            if path in bridge
        }
        report = export_backbones(weights.folder, partial / "backbones", tuned)
        for folder in (partial / "backbones").iterdir():
            folder.rename(partial / folder.name)
        (partial / "backbones").rmdir()
        if bridge:
            config = BridgeConfig.from_dict(origin.bridge)
            save_bridge(partial / BRIDGE_FILE, bridge, config, weights.fingerprint)
    return Exported(report.tensors, report.bytes, len(tuned), len(bridge))


def _in_host_memory():
    """The place of all trained leaves, which are 18 GB at the real size: more than an accelerator may have."""
    import jax

    try:
        place = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS names others alone
        return None
    return lambda path, spec: place
