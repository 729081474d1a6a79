"""Hugging Face folders -> our checkpoint, streamed: one reference tensor is in memory at a time.

First everything is checked by headers and configs alone, and all faults are reported together; then each layer's
tensor is read, transposed and written to its place in the stack, which the header in front fixed in advance.
"""

import dataclasses
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from wemmu_jax.conversion.backbones import DC_AE, DIT, VLM, Backbone, Rows
from wemmu_jax.conversion.bridge import BRIDGE_FILE, bridge_misfits, read_bridge_config
from wemmu_jax.conversion.hf_folder import HFFolder, other_files, read_folder
from wemmu_jax.conversion.hub import SANA_FILES, VLM_FILES, local_folder
from wemmu_jax.conversion.memory import nest
from wemmu_jax.conversion.safetensors_io import Spec, Stored
from wemmu_jax.conversion.staging import check_free, copy_files, staged
from wemmu_jax.conversion.table import Entry, Layout
from wemmu_jax.conversion.weights import write_weights
from wemmu_jax.files import read_config
from wemmu_jax.models.dc_ae.config import DCAEConfig
from wemmu_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from wemmu_jax.models.qwen2_5_vl.prompt import PromptEncoder
from wemmu_jax.models.qwen2_5_vl.tokenizer import load_tokenizer
from wemmu_jax.models.sana.config import SanaConfig
from wemmu_jax.models.wemmu.config import BridgeConfig, WeMMUConfig
from wemmu_jax.models.wemmu.inputs import read_preprocessing, read_sample_size
from wemmu_jax.models.wemmu.modeling import WeMMUModel

_DTYPES = {np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class Report:
    """What was done.

    Attributes:
      tensors: how many tensors of Hugging Face folders were read or written.
      bytes: their size.
      seconds: wall-clock time.
      ignored: names of tensors that were there and not needed.
    """

    tensors: int
    bytes: int
    seconds: float
    ignored: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One of our leaves and the reference tensors that it is made of, in stacking order."""

    spec: Spec
    layout: Layout
    sources: tuple[Stored, ...]

    def parts(self) -> Iterator[np.ndarray]:
        """The leaf in C order, one reference tensor at a time."""
        for source in self.sources:
            yield self.layout.to_ours(source.read())


def convert(vlm: str, sana: str, out: str, bridge: str | None = None) -> Report:
    """Converts the backbones, and puts a trained bridge beside them.

    Args:
      vlm: folder or hub id of a Qwen2.5-VL.
      sana: folder or hub id of a Sana in diffusers' layout, with its DC-AE in `vae/`.
      out: the folder to write; it appears only when it is complete.
      bridge: the `bridge.safetensors` of `wemmu export`; with it, `out` is a whole trained model.

    Raises:
      FileExistsError: `out` is there already.
      FileNotFoundError: `bridge` is not there; `vlm` or `sana` is neither a folder nor a model that can be downloaded.
      ValueError: the models cannot be converted; names every fault, and nothing was written.
      OSError: the disk has not enough room.
    """
    started = time.monotonic()
    check_free(Path(out))
    vlm_folder = local_folder(vlm, VLM_FILES)
    sana_folder = local_folder(sana, SANA_FILES)
    sources = {VLM: vlm_folder, DIT: sana_folder / "transformer", DC_AE: sana_folder / "vae"}
    leaves, ignored, faults = _survey(sources)
    _refuse(faults + _unloadable(vlm_folder, sana_folder))
    if bridge is not None:
        _check_bridge(Path(bridge), vlm_folder, sana_folder, leaves)
    _check_room(Path(out), sum(leaf.spec.nbytes for leaf in leaves.values()))
    with staged(Path(out)) as partial:
        for backbone, folder in sources.items():
            copy_files(folder, other_files(folder), partial / backbone.folder)
        for part in (".", "scheduler"):  # what belongs to the Sana pipeline as a whole
            copy_files(sana_folder / part, other_files(sana_folder / part), partial / "sana" / part)
        if bridge is not None:
            copy_files(Path(bridge).parent, [Path(bridge).name], partial)
            (partial / Path(bridge).name).rename(partial / BRIDGE_FILE)
        specs = {path: leaf.spec for path, leaf in leaves.items()}
        write_weights(partial, specs, lambda path: leaves[path].parts())
    read = [source for leaf in leaves.values() for source in leaf.sources]
    size = sum(source.nbytes for source in read)
    return Report(len(read), size, time.monotonic() - started, tuple(ignored))


def plan(sources: Mapping[Backbone, Path]) -> tuple[dict[str, Leaf], list[str]]:
    """Our leaves by their paths, and the tensors to be ignored; reads headers and configs only.

    Raises:
      ValueError: names every fault of every model.
    """
    leaves, ignored, faults = _survey(sources)
    _refuse(faults)
    return leaves, ignored


def _refuse(faults: list[str]) -> None:
    """Raises one ValueError of all faults, if there are any."""
    if faults:
        # Two readers of one file say the same about it.
        listed = "\n  ".join(dict.fromkeys(faults))
        raise ValueError(f"these models cannot be converted:\n  {listed}")


def _survey(sources: Mapping[Backbone, Path]) -> tuple[dict[str, Leaf], list[str], list[str]]:
    """What `plan` returns, and all faults of weights and configs; with a fault the leaves are incomplete."""
    leaves: dict[str, Leaf] = {}
    ignored: list[str] = []
    faults: list[str] = []
    for backbone, path in sources.items():
        folder = read_folder(path, backbone.stem)
        faults += folder.faults
        if folder.config is None or not folder.tensors:
            continue  # a fault says why
        try:
            rows = backbone.rows(folder.config, folder.tensors.keys() | folder.unread)
        except ValueError as error:
            faults.append(f"{path / 'config.json'}: {error}")
            continue
        faults += _misfits(folder, rows)
        if not faults:
            leaves |= {f"{backbone.prefix}/{e.target}": _leaf(e, folder) for e in rows.table}
            ignored += [name for name in rows.repeats if name in folder.tensors]
    return leaves, ignored, faults


def _unloadable(vlm: Path, sana: Path) -> list[str]:
    """Why inference could not load these folders: it reads more of them than the weights."""
    faults: list[str] = []

    def attempt(load: Callable, *args) -> None:
        try:
            load(*args)
        except (ValueError, OSError) as error:
            faults.append(str(error))

    config, transformer = vlm / "config.json", sana / "transformer/config.json"
    attempt(read_preprocessing, vlm)
    attempt(read_sample_size, transformer)
    # How the parts fit each other can be said of sound configs only.
    attempt(PromptEncoder.load if _is_sound(Qwen25VLConfig, config) else load_tokenizer, vlm)
    vae = sana / "vae/config.json"
    if all(map(_is_sound, (Qwen25VLConfig, SanaConfig, DCAEConfig), (config, transformer, vae))):
        attempt(WeMMUConfig.from_parts, vlm, sana, BridgeConfig())
    return faults


def _is_sound(kind: type[Qwen25VLConfig | SanaConfig | DCAEConfig], file: Path) -> bool:
    try:
        read_config(file, kind.from_hf)
    except (ValueError, OSError):
        return False
    return True


def _check_bridge(bridge: Path, vlm: Path, sana: Path, leaves: Mapping[str, Leaf]) -> None:
    """Raises ValueError naming every leaf of the bridge that does not stand on these backbones."""
    config = WeMMUConfig.from_parts(vlm, sana, read_bridge_config(bridge))
    text = {
        path.removeprefix("vlm/text/"): jax.ShapeDtypeStruct(leaf.spec.shape, leaf.spec.dtype)
        for path, leaf in leaves.items()
        if path.startswith("vlm/text/")
    }
    if faults := bridge_misfits(bridge, WeMMUModel(config), nest(text)):
        raise ValueError("this bridge does not fit these backbones:\n  " + "\n  ".join(faults))


def _misfits(folder: HFFolder, rows: Rows) -> list[str]:
    """Where the tensors of a folder are not what its config implies."""
    faults: list[str] = []
    wanted = {name: entry for entry in rows.table for name in entry.sources()}
    for name, entry in wanted.items():
        found = folder.tensors.get(name)
        if found is None:
            if name not in folder.unread:
                faults.append(f"{folder.folder}: missing tensor {name} {entry.shape}")
        elif found.shape != entry.shape:
            faults.append(
                f"{found.file}: shape of {name}: the config implies {entry.shape}, found {found.shape}"
            )
    for name, found in folder.tensors.items():
        if name in rows.repeats:
            faults += _different(name, rows.repeats[name], folder.tensors)
        elif name not in wanted:
            faults.append(f"{found.file}: tensor {name} {found.shape} is not part of the model")
        elif found.dtype not in _DTYPES:
            faults.append(
                f"{found.file}: unsupported dtype of {name}: expected float32, float16 or bfloat16, "
                f"found {found.dtype}"
            )
    for entry in rows.table:
        dtypes = {folder.tensors[n].dtype.name for n in entry.sources() if n in folder.tensors}
        if len(dtypes) > 1:
            faults.append(f"{folder.folder}: mixed dtypes in {entry.source}: {sorted(dtypes)}")
    return faults


def _different(name: str, first: str, tensors: Mapping[str, Stored]) -> list[str]:
    """A fault if a repeated tensor is not bit for bit its first: then the config is wrong about the two."""
    if first not in tensors or _digest(tensors[name]) == _digest(tensors[first]):
        return []
    return [
        f"{tensors[name].file}: {name} differs from {first}, but the config says that they are tied "
        "(tie_word_embeddings)"
    ]


def _digest(stored: Stored) -> bytes:
    return hashlib.sha256(stored.read().reshape(-1).view(np.uint8)).digest()


def _leaf(entry: Entry, folder: HFFolder) -> Leaf:
    sources = tuple(folder.tensors[name] for name in entry.sources())
    return Leaf(Spec(sources[0].dtype, entry.target_shape), entry.layout, sources)


def _check_room(out: Path, needed: int) -> None:
    """Raises OSError if the disk that `out` will be on has fewer than `needed` bytes left."""
    existing = next(path for path in out.absolute().parents if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(f"{out}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free on this disk")
