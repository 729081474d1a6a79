"""Our checkpoint -> Hugging Face folders that transformers and diffusers load."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax
import numpy as np

from wemmu_jax.conversion.backbones import DC_AE, DIT, VLM, Backbone
from wemmu_jax.conversion.convert import Report
from wemmu_jax.conversion.hf_folder import other_files
from wemmu_jax.conversion.safetensors_io import Spec, pack, write_file
from wemmu_jax.conversion.staging import copy_files, staged, write_text
from wemmu_jax.conversion.table import Entry
from wemmu_jax.conversion.weights import Weights

_FILE_BYTES = 5_000_000_000  # a file is no larger, unless it holds a single tensor that is
_METADATA = {"format": "pt"}  # without it, transformers and diffusers refuse the file

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where a reference tensor comes from: a row of the table and, if that is stacked, which layer of it."""

    path: str
    entry: Entry
    layer: int

    def cut(self, leaf: Callable[[str], np.ndarray]) -> np.ndarray:
        """The reference tensor, cut out of its leaf."""
        ours = leaf(self.path)
        one = ours if self.entry.stack is None else ours[self.layer]
        return self.entry.layout.to_reference(one, self.entry.shape)


def export_backbones(
    checkpoint_dir: str | Path, out: str | Path, overrides: Mapping[str, Array] | None = None
) -> Report:
    """Writes OUT/vlm, OUT/sana/transformer and OUT/sana/vae, each for its library's `from_pretrained`.

    Args:
      checkpoint_dir: what `convert` wrote.
      out: the folder to write; it appears only when it is complete.
      overrides: whole leaf path ('dit/...') -> the trained leaf that takes the backbone's place; written in its
        own dtype, so cast it first if it must be the backbone's.

    Raises:
      FileExistsError: `out` is there already.
      ValueError: an override fits no leaf of the checkpoint; all such are named.
    """
    started = time.monotonic()
    weights, overrides = Weights.open(checkpoint_dir), dict(overrides or {})
    models = {backbone: _sources(backbone, weights.folder) for backbone in (VLM, DIT, DC_AE)}
    _check(weights, [s for sources in models.values() for s in sources.values()], overrides)

    # Rows of one stack follow each other, so that a trained leaf leaves its device once.
    @functools.lru_cache(maxsize=1)
    def trained(path: str) -> np.ndarray:
        return np.asarray(overrides[path])

    def leaf(path: str) -> np.ndarray:
        # Mapped anew for each layer: what is mapped and was read counts as ours until it is let go.
        return trained(path) if path in overrides else weights.map(path)

    def dtype(path: str) -> np.dtype:
        return np.dtype(overrides[path].dtype if path in overrides else weights.specs[path].dtype)

    size = 0
    with staged(Path(out)) as partial:
        for backbone, sources in models.items():
            folder = partial / backbone.folder
            original = weights.folder / backbone.folder
            copy_files(original, other_files(original), folder)
            specs = {name: Spec(dtype(s.path), s.entry.shape) for name, s in sources.items()}
            _write_model(folder, backbone.stem, specs, lambda name, s=sources: [s[name].cut(leaf)])
            size += sum(spec.nbytes for spec in specs.values())
        for part in ("sana", "sana/scheduler"):
            copy_files(weights.folder / part, other_files(weights.folder / part), partial / part)
    tensors = sum(len(sources) for sources in models.values())
    return Report(tensors, size, time.monotonic() - started, ())


def _sources(backbone: Backbone, checkpoint: Path) -> dict[str, _Source]:
    """Reference name -> where it comes from, rows of one stack next to each other."""
    config = json.loads((checkpoint / backbone.folder / "config.json").read_text(encoding="utf-8"))
    return {
        name: _Source(f"{backbone.prefix}/{entry.target}", entry, layer)
        for entry in backbone.rows(config, None).table
        for layer, name in enumerate(entry.sources())
    }


def _check(weights: Weights, sources: Iterable[_Source], overrides: Mapping[str, Array]) -> None:
    shapes = {path: spec.shape for path, spec in weights.specs.items()}
    implied = {source.path: source.entry.target_shape for source in sources}
    faults = [
        f"{path}: the configs imply {implied.get(path)}, the weights have {shapes.get(path)}"
        for path in sorted(implied.keys() | shapes.keys())
        if implied.get(path) != shapes.get(path)
    ]
    faults += [
        f"override {path}: expected {shapes.get(path, 'no such leaf')}, found {tuple(array.shape)}"
        for path, array in overrides.items()
        if shapes.get(path) != tuple(array.shape)
    ]
    if faults:
        raise ValueError(f"{weights.folder}: cannot be exported:\n  " + "\n  ".join(faults))


def _write_model(
    folder: Path, stem: str, specs: Mapping[str, Spec], parts: Callable[[str], list[np.ndarray]]
) -> None:
    """One file, or shards and their index, named as `from_pretrained` looks for them."""
    shards = pack(specs, _FILE_BYTES)
    if len(shards) == 1:
        write_file(folder / f"{stem}.safetensors", specs, parts, metadata=_METADATA)
        return
    weight_map = {}
    for i, shard in enumerate(shards):
        file = folder / f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_file(file, shard, parts, metadata=_METADATA)
        weight_map |= dict.fromkeys(shard, file.name)
    size = sum(spec.nbytes for spec in specs.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_text(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=1) + "\n")
