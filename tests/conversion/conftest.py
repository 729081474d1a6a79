"""Small random models, saved the way that transformers and diffusers save them, in several shards."""

import dataclasses
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.parity.harness import randomise
from wemmu_jax.conversion.convert import convert
from wemmu_jax.models.qwen2_5_vl.tokenizer import (
    IMAGE_PAD,
    VISION_END,
    VISION_START,
    train_tokenizer,
)
from wemmu_jax.tiny.backbones import PREPROCESSOR

BF16 = np.dtype(ml_dtypes.bfloat16)

VOCABULARY = 300
CAPTIONS = ["a red circle", "a blue square on white"]

VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "window_size": 56,
    "fullatt_block_indexes": [1],
}
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "eos_token_id": 1,
    "bos_token_id": 0,
}
SANA = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 3,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 12,
    "sample_size": 8,
    "qk_norm": "rms_norm_across_heads",
}
DC_AE = {
    "latent_channels": 4,
    "attention_head_dim": 8,
    "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 16),
    "decoder_block_out_channels": (8, 16),
    "encoder_layers_per_block": (2, 3),
    "decoder_layers_per_block": (3, 2),
    "encoder_qkv_multiscales": ((), (5,)),
    "decoder_qkv_multiscales": ((), (5,)),
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
}


@dataclasses.dataclass(frozen=True)
class Models:
    """Folders of one saved pair of models."""

    vlm: Path
    sana: Path

    def folder(self, prefix: str) -> Path:
        """The folder of the model whose leaves have this prefix."""
        return {"vlm": self.vlm, "dit": self.sana / "transformer", "dc_ae": self.sana / "vae"}[
            prefix
        ]


def save_models(root: Path, *, tied: bool, dtype: torch.dtype) -> Models:
    """Writes the models with the files that stand beside them in published folders."""
    models = Models(root / "vlm", root / "sana")
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=VOCABULARY, folder=models.vlm)
    special = tokenizer.get_added_vocab()
    config = Qwen2_5_VLConfig(
        image_token_id=special[IMAGE_PAD],
        vision_start_token_id=special[VISION_START],
        vision_end_token_id=special[VISION_END],
        vision_config=VISION,
        text_config={**TEXT, "tie_word_embeddings": tied},
        tie_word_embeddings=tied,
    )
    vlm = Qwen2_5_VLForConditionalGeneration(config)
    for seed, (module, folder, size) in enumerate(
        (
            (vlm, models.vlm, "60KB"),
            (SanaTransformer2DModel(**SANA), models.sana / "transformer", "20KB"),
            (AutoencoderDC(**DC_AE), models.sana / "vae", "1GB"),
        )
    ):
        randomise(module, seed=seed).to(dtype).save_pretrained(folder, max_shard_size=size)
    (models.vlm / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    (models.vlm / "README.txt").write_text("ü\n")
    (models.vlm / ".gitattributes").write_text("x")
    (models.sana / "model_index.json").write_text("{}")
    for part in ("scheduler", "text_encoder", "tokenizer"):
        (models.sana / part).mkdir()
        (models.sana / part / f"{part}_config.json").write_text("{}")
    return models


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, by the library's own reader."""
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(file)
    return tensors


def rewrite(file: Path, change) -> None:
    """Applies `change` (in place) to the tensors of a file."""
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})


def edit_json(file: Path, change) -> None:
    """Applies `change` (in place) to the object in a JSON file."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal in dtype, shape and every bit."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.fixture(scope="session")
def tied(tmp_path_factory) -> Models:
    """Tied embeddings, bfloat16."""
    return save_models(tmp_path_factory.mktemp("tied"), tied=True, dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def untied(tmp_path_factory) -> Models:
    """An output layer of its own, float32."""
    return save_models(tmp_path_factory.mktemp("untied"), tied=False, dtype=torch.float32)


@pytest.fixture(scope="session", params=["tied", "untied"])
def models(request) -> Models:
    """Either of the two."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def copy(tied, tmp_path) -> Models:
    """Models that a test may damage."""
    shutil.copytree(tied.vlm, tmp_path / "vlm")
    shutil.copytree(tied.sana, tmp_path / "sana")
    return Models(tmp_path / "vlm", tmp_path / "sana")


@pytest.fixture(scope="session")
def checkpoint(tied, tmp_path_factory) -> Path:
    """The tied models, converted; not to be changed."""
    out = tmp_path_factory.mktemp("checkpoint") / "backbones"
    convert(str(tied.vlm), str(tied.sana), str(out))
    return out
