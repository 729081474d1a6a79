"""The tiny preset's backbones as ordinary Hugging Face folders: configs, tokenizer, weights."""

import json
import pathlib
from collections.abc import Iterable, Mapping

import numpy as np

from wemmu_jax.conversion.backbones import Backbone
from wemmu_jax.conversion.convert import plan
from wemmu_jax.conversion.memory import flatten, nest
from wemmu_jax.conversion.safetensors_io import Spec, write_file
from wemmu_jax.models.qwen2_5_vl.tokenizer import train_tokenizer

VOCABULARY = 1024
# With heads of 32, what Qwen's theta of 1e6 and its sections leave for columns hardly turns at all. Here rows and
# columns have pairs that tell neighbours apart, and texts keep some that are still after a hundred words.
ROPE = {"rope_theta": 300.0, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 14]}}

VLM_CONFIG = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    **ROPE,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 4,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_heads": 4,
        "in_chans": 3,
        "patch_size": 8,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 32,
        "fullatt_block_indexes": [1, 3],
        "out_hidden_size": 128,
        "hidden_act": "silu",
    },
}

PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "min_pixels": 2304,
    "max_pixels": 3456,
    "patch_size": 8,
    "temporal_patch_size": 2,
    "merge_size": 2,
}

DIT_CONFIG = {
    "_class_name": "SanaTransformer2DModel",
    "in_channels": 64,
    "out_channels": 64,
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "num_layers": 4,
    "num_cross_attention_heads": 6,
    "cross_attention_head_dim": 32,
    "cross_attention_dim": 192,
    "caption_channels": 160,
    "mlp_ratio": 2.5,
    "dropout": 0.0,
    "attention_bias": False,
    "sample_size": 3,
    "patch_size": 1,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "interpolation_scale": None,
    "qk_norm": "rms_norm_across_heads",
}

_BLOCKS = ["ResBlock"] * 4 + ["EfficientViTBlock"]
DC_AE_CONFIG = {
    "_class_name": "AutoencoderDC",
    "in_channels": 3,
    "latent_channels": 64,
    "attention_head_dim": 16,
    "encoder_block_types": _BLOCKS,
    "decoder_block_types": _BLOCKS,
    "encoder_block_out_channels": [16, 32, 64, 128, 128],
    "decoder_block_out_channels": [16, 32, 64, 128, 128],
    "encoder_layers_per_block": [1, 1, 1, 1, 1],
    "decoder_layers_per_block": [1, 1, 1, 1, 1],
    "encoder_qkv_multiscales": [[], [], [], [], [5]],
    "decoder_qkv_multiscales": [[], [], [], [], [5]],
    "upsample_block_type": "interpolate",
    "downsample_block_type": "conv",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "scaling_factor": 0.2,  # latents of about unit variance, with random weights
}

BRIDGE = {"fixed_grid": 3, "max_grid": 24, "position_mlp_hidden": 512, "connector_heads": 4}

SCHEDULER_CONFIG = {
    "_class_name": "DPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 6.0,
    "solver_order": 2,
}
# Of those tried the ones with which most is drawn rightly (docs/miniworld.md); with more, shapes are counted worse.
GUIDANCE = {"generate": 2.0, "image": 1.5, "edit": 1.5}


def save_backbone(backbone: Backbone, root: pathlib.Path, config: Mapping, params: Mapping) -> None:
    """Writes one model's `config.json` and weights below `root`, as its library's `save_pretrained` would."""
    folder = root / backbone.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    leaves = flatten(params)
    tensors = {}
    for entry in backbone.rows(config, None).table:
        leaf = np.asarray(leaves[entry.target])
        for layer, name in enumerate(entry.sources()):
            one = leaf if entry.stack is None else leaf[layer]
            tensors[name] = np.ascontiguousarray(entry.layout.to_reference(one, entry.shape))
    specs = {name: Spec(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_file(
        folder / f"{backbone.stem}.safetensors",
        specs,
        lambda name: [tensors[name]],
        metadata={"format": "pt"},
    )


def load_backbone(backbone: Backbone, root: pathlib.Path) -> dict:
    """One model's parameters from `save_backbone`'s folder, as they are in the file.

    Raises:
      ValueError: its weights are missing or do not fit its config.
    """
    leaves, _ = plan({backbone: root / backbone.folder})
    flat = {
        path: np.stack(list(leaf.parts())).reshape(leaf.spec.shape) for path, leaf in leaves.items()
    }
    return nest(flat)[backbone.prefix]


def write_configs(root: pathlib.Path, texts: Iterable[str]) -> None:
    """Writes ROOT/vlm and ROOT/sana without weights, with a tokenizer learned from `texts`. A config that is there
    stays, for it belongs to the weights beside it."""
    vlm = root / "vlm"
    tokenizer = train_tokenizer(texts, vocab_size=VOCABULARY, folder=vlm)
    special = tokenizer.get_added_vocab()
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    names |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    config = {
        **VLM_CONFIG,
        "vocab_size": VOCABULARY,
        "bos_token_id": special["<|endoftext|>"],
        "eos_token_id": special["<|im_end|>"],
        **{f"{name}_token_id": special[token] for name, token in names.items()},
    }
    ends = [special["<|im_end|>"], special["<|endoftext|>"]]
    _write(vlm / "config.json", config)
    _write(vlm / "generation_config.json", {"eos_token_id": ends})
    _write(vlm / "preprocessor_config.json", PREPROCESSOR)
    _write(root / "sana/transformer/config.json", DIT_CONFIG)
    _write(root / "sana/vae/config.json", DC_AE_CONFIG)
    _write(root / "sana/scheduler/scheduler_config.json", SCHEDULER_CONFIG)
    _write(root / "sana/guidance.json", GUIDANCE)
    _write(root / "sana/model_index.json", {"_class_name": "SanaPipeline"})


def _write(path: pathlib.Path, content: Mapping) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(json.dumps(content, indent=2) + "\n")
