"""The four stages on the tiny preset and on miniworld, sized for two cores.

    wemmu train --config configs/tiny.py:stage1 --init CONVERTED --workdir runs/tiny/stage1

Tasks, mixtures, losses and what learns are the paper's, by way of `wemmu_3b`; only sizes and data differ.
"""

import ml_collections

from configs.wemmu_3b import get_config as paper_config
from wemmu_jax.tiny.backbones import BRIDGE

STEPS = {"stage1": 1000, "stage2": 4500, "stage3": 3400, "stage4": 7000}


def _miniworld(split: str, size: int) -> list[dict]:
    common = {"type": "miniworld", "seed": 0, "size": size, "split": split}
    return [
        {"name": "scenes", "tasks": ("T2I", "Uncond", "Rec"), "kind": "caption", **common},
        # Half of what is drawn from text: seen as often as the other captions, relations would hardly be learned.
        {"name": "prompts", "tasks": ("T2I",), "kind": "prompt", **common},
        {"name": "scene edits", "tasks": ("S-Edit",), "kind": "edit", **common},
        {"name": "compositions", "tasks": ("M-Edit",), "kind": "composition", **common},
    ]


def photographs(folder: str) -> list[dict]:
    """The data entry of a folder of photographs, see `wemmu_jax.data.formats.lists.Folder`."""
    entry = {"name": "photographs", "tasks": ("T2I", "Rec", "S-Edit"), "weight": 0.25}
    return [{**entry, "type": "folder", "folder": folder}]


def get_config(stage: str) -> ml_collections.ConfigDict:
    """The config of `stage1` to `stage4`."""
    config = paper_config(stage)
    config.name = f"tiny {stage}"
    config.model.bridge.update(BRIDGE)
    config.model.dtype = "float32"
    config.model.remat = "unrolled"  # the fastest on a CPU
    # A scene is a few large facts, which noise hides last: with Sana's 3, few samples have to ask the condition for
    # the background's colour, and it was not learned. Once it is asked, what is wrong comes from less noise as well.
    if stage in ("stage1", "stage2"):
        config.loss.shift = 6.0
    # The DiT is the part that learns slowest (docs/miniworld.md), and all others run once for the four.
    config.loss.draws = 4
    data = config.data
    data.resolution, data.buckets, data.max_aspect, data.pad_multiple = 48, 3, 2.0, 4
    data.text_lengths = (64,)
    data.sources = tuple(_miniworld("train", 200_000))
    data.held_out = tuple(_miniworld("held_out", 1000))
    data.threads = 2
    config.batch.rows, config.batch.micro_batches = 16, 2
    config.paper.batch = config.batch.rows * config.batch.micro_batches
    config.paper.steps = config.optimizer.steps = STEPS[stage]
    config.optimizer.warmup = 100
    config.optimizer.method = "muon"
    # Stage 1 teaches fresh parts beside a DiT that stays as it is, and 400 steps of it end at a training loss of .41 at
    # 1e-3, .32 at 2e-3, .27 at 4e-3 and 8e-3. Later stages go on from what can do something: more was no better.
    config.optimizer.learning_rate = 4e-3 if stage == "stage1" else 1e-3
    config.optimizer.ema = 0.998
    config.mesh.fsdp = 1
    config.validation_rows = 16
    config.every.update({"log": 50, "checkpoint": 500, "validate": 1000, "sample": 1000})
    return config


def shortened(config: ml_collections.ConfigDict, steps: int) -> ml_collections.ConfigDict:
    """The same stage in `steps` steps, a running mean of few of them; compiled soon rather than run fast."""
    config.model.remat = "full"
    config.optimizer.steps, config.optimizer.warmup = steps, min(50, steps // 4)
    config.optimizer.ema = 1 - 1 / max(2, steps // 20)
    config.paper.steps = steps
    return config
