"""What lies in one Hugging Face model folder: its config and where each tensor is. Nothing is read but headers."""

import dataclasses
import re
from pathlib import Path

from wemmu_jax.conversion.safetensors_io import Stored, read_header
from wemmu_jax.files import read_object

_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_OTHER_WEIGHTS = {".safetensors", ".h5", ".msgpack", ".onnx", ".gguf", ".npz", ".npy"}


@dataclasses.dataclass(frozen=True)
class HFFolder:
    """A model folder, as far as it could be read.

    Attributes:
      folder: where it is.
      config: its `config.json`; None if that could not be read.
      tensors: name -> where it lies, over all shards; of a tensor that lies in two shards, the first.
      unread: tensors that the index puts into shards which are missing or broken.
      faults: everything that is wrong with it, one sentence each.
    """

    folder: Path
    config: dict | None
    tensors: dict[str, Stored]
    unread: frozenset[str]
    faults: list[str]


def read_folder(folder: Path, stem: str) -> HFFolder:
    """Reads the config and the headers of `{stem}.safetensors`, or of the shards that its index names."""
    faults: list[str] = []
    config = _read_object(folder / "config.json", faults)
    tensors: dict[str, Stored] = {}
    for file in _weight_files(folder, stem, faults):
        try:
            header = read_header(file)
        except ValueError as error:
            faults.append(str(error))
            continue
        for name, stored in header.tensors.items():
            if name in tensors:
                faults.append(f"{name} is both in {tensors[name].file.name} and in {file}")
            tensors.setdefault(name, stored)
    if not tensors and not faults:
        faults.append(f"{folder}: its weight files hold no tensor")
    _, index = _single_and_index(folder, stem)
    unread: frozenset[str] = frozenset()
    if index.exists():
        weight_map = _weight_map(index, [])
        found = {stored.file.name for stored in tensors.values()}
        unread = frozenset(name for name, file in weight_map.items() if file not in found)
        faults += _disagreements(index, weight_map, tensors, unread)
    return HFFolder(folder, config, tensors, unread, faults)


def other_files(folder: Path) -> list[str]:
    """The names of the files directly in `folder` that hold no weights: configs, tokenizer, templates."""
    return sorted(
        path.name
        for path in folder.glob("[!.]*")
        if path.is_file()
        and path.suffix not in _PICKLED | _OTHER_WEIGHTS
        and ".safetensors.index." not in path.name
    )


def _single_and_index(folder: Path, stem: str) -> tuple[Path, Path]:
    """The names of the one weight file and of the index of several; either, both or none may exist.

    A plain save goes before a variant (`variant="bf16"` of diffusers' `save_pretrained`): several of the published
    Sana models come as a variant only.
    """
    saves = [
        (
            folder / f"{stem}{variant}.safetensors",
            folder / f"{stem}.safetensors.index{variant}.json",
        )
        for variant in ("", ".bf16", ".fp16")
    ]
    found = (save for save in saves if any(file.exists() for file in save))
    return next(found, saves[0])


def _weight_files(folder: Path, stem: str, faults: list[str]) -> list[Path]:
    """The files that hold the model's tensors; notes why when that is not clear."""
    single, index = _single_and_index(folder, stem)
    shards = sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
    if single.exists() and (index.exists() or shards):
        other = index if index.exists() else shards[0]
        faults.append(
            f"{folder}: both {single.name} and {other.name}: two saves in one folder; remove one of them"
        )
        return []
    if single.exists():
        return [single]
    if index.exists():
        return _indexed_files(index, faults)
    faults.append(_why_no_weights(folder, single, index, shards))
    return []


def _why_no_weights(folder: Path, single: Path, index: Path, shards: list[Path]) -> str:
    if shards:
        return f"{index}: missing, but there are shards ({shards[0].name}); it names the tensors of each"
    pickled = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLED)
    if pickled:
        return (
            f"{folder / pickled[0]}: pickled weights are refused, because unpickling runs code that the file "
            "carries; save the model as safetensors (`save_pretrained` of transformers and diffusers "
            "does by default) and convert that"
        )
    return f"{folder}: no weights; expected {single.name}, or shards with {index.name}"


def _indexed_files(index: Path, faults: list[str]) -> list[Path]:
    """The shards that an index names, those of them that exist."""
    files = []
    for name in sorted(set(_weight_map(index, faults).values())):
        file = index.parent / name
        # A bare file name: an index is downloaded data, and must not lead out of its folder.
        if not re.fullmatch(r"[^/\\]+\.safetensors", name):
            faults.append(
                f"{index}: names {name!r}; expected a .safetensors file in the same folder"
            )
        elif not file.is_file():
            faults.append(f"{file}: missing; {index.name} names it")
        else:
            files.append(file)
    return files


def _weight_map(index: Path, faults: list[str]) -> dict[str, str]:
    weight_map = (_read_object(index, faults) or {}).get("weight_map")
    is_map = isinstance(weight_map, dict) and all(isinstance(f, str) for f in weight_map.values())
    if not is_map or not weight_map:
        faults.append(f"{index}: no weight_map of tensor names to file names")
        return {}
    return weight_map


def _disagreements(
    index: Path, weight_map: dict[str, str], tensors: dict[str, Stored], unread: frozenset[str]
) -> list[str]:
    """Where an index and the shards that it names tell different stories."""
    faults = [
        f"{index}: says that {name} is in {file}, which does not have it"
        for name, file in weight_map.items()
        if name not in unread and (name not in tensors or tensors[name].file.name != file)
    ]
    return faults + [
        f"{tensors[name].file}: has {name}, which {index.name} does not name"
        for name in tensors
        if name not in weight_map
    ]


def _read_object(file: Path, faults: list[str]) -> dict | None:
    """A JSON object from a file; None, with a fault noted, if there is none."""
    try:
        return read_object(file)
    except (ValueError, OSError) as error:
        faults.append(str(error))
        return None
