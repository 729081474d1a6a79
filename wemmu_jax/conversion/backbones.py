"""The three frozen models: where each lies in a checkpoint, and which table it goes through."""

import dataclasses
from collections.abc import Callable, Collection, Mapping

from wemmu_jax.conversion import dc_ae, qwen2_5_vl, sana
from wemmu_jax.conversion.table import Entry
from wemmu_jax.models.dc_ae.config import DCAEConfig
from wemmu_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from wemmu_jax.models.sana.config import SanaConfig


@dataclasses.dataclass(frozen=True)
class Rows:
    """What one model's tensors must be.

    Attributes:
      table: a row for each tensor, or stack of tensors.
      repeats: tensors that a file may hold once more under a second name -> their first name.
    """

    table: list[Entry]
    repeats: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Backbone:
    """One of the models.

    Attributes:
      prefix: of its leaf paths.
      folder: its folder in our checkpoint and in an export, relative to their roots.
      stem: what its weight files are called in Hugging Face folders.
      rows: (its `config.json`, the names of the tensors found, or None for the published ones) -> rows; ValueError
        if those cannot be.
    """

    prefix: str
    folder: str
    stem: str
    rows: Callable[[Mapping, Collection[str] | None], Rows]


def _vlm_rows(hf: Mapping, names: Collection[str] | None) -> Rows:
    config = Qwen25VLConfig.from_hf(hf)
    naming = qwen2_5_vl.Naming.FILES if names is None else qwen2_5_vl.naming(names)
    embedding = f"{naming.value[1]}embed_tokens.weight"
    is_tied = config.text.tie_word_embeddings
    repeats = dict.fromkeys(qwen2_5_vl.IGNORED, embedding) if is_tied else {}
    return Rows(qwen2_5_vl.table(config, naming), repeats)


def _dit_rows(hf: Mapping, names: Collection[str] | None) -> Rows:
    return Rows(sana.table(SanaConfig.from_hf(hf)))


def _dc_ae_rows(hf: Mapping, names: Collection[str] | None) -> Rows:
    return Rows(dc_ae.table(DCAEConfig.from_hf(hf)))


VLM = Backbone("vlm", "vlm", "model", _vlm_rows)
DIT = Backbone("dit", "sana/transformer", "diffusion_pytorch_model", _dit_rows)
DC_AE = Backbone("dc_ae", "sana/vae", "diffusion_pytorch_model", _dc_ae_rows)
