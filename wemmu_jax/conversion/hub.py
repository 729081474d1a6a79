"""A model named on the command line becomes a local folder."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub

from wemmu_jax.errors import passes

VLM_FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja")
# Sana's own text encoder (5 GB) and tokenizer are not needed: WeMMU's queries take their place.
SANA_FILES = (
    "model_index.json",
    "guidance.json",
    "scheduler/*.json",
    *(
        f"{part}/*.{suffix}"
        for part in ("transformer", "vae")
        for suffix in ("safetensors", "json")
    ),
)


def local_folder(source: str, files: Sequence[str]) -> Path:
    """The folder of a model: `source` itself if it is one, else the downloaded snapshot of that hub id.

    Args:
      source: a folder, or a hub id (`owner/name`).
      files: patterns of the files to download. Weights in pickles match none, so they never arrive.

    Raises:
      FileNotFoundError: it is neither a folder nor a model that can be reached; says what to do.
      ConnectionError: the network failed on the way.
    """
    folder = Path(os.path.expanduser(source))  # leaves a user that is not there as it is written
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FileNotFoundError(f"{source}: is a file; expected the model's folder, or a hub id")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise FileNotFoundError(
            f"{source}: no such folder, and not a hub id ('owner/name') either; check the path"
        )
    try:
        snapshot = huggingface_hub.snapshot_download(source, allow_patterns=list(files))
    except Exception as error:  # those of the network are of the hub's client, and no OSError
        final = isinstance(error, OSError | ValueError) and not passes(error)
        kind = FileNotFoundError if final else ConnectionError
        raise kind(
            f"{source}: no such folder, and as a hub id it cannot be reached ({type(error).__name__}: "
            f"{error}). Check the name, the network and your access to the model; or download it "
            "elsewhere and give the path of its folder"
        ) from error
    return Path(snapshot)
