"""The paper's model and its four stages (Table 3; the rows as design reads them: batch x steps = samples).

    wemmu train --config configs/wemmu_3b.py:stage1 --init CONVERTED --workdir runs/stage1
    wemmu train --config configs/wemmu_3b.py:stage2 --init runs/stage1 --workdir runs/stage2

`data.sources` must be filled in: nobody's folders are known here. Every stage has a seed of its own, or it would see
the records in the order, and with the noise, of the stage before.
"""

import ml_collections

from wemmu_jax.training.curriculum import BRIDGE_LEARNS, base_config, rounded_steps

STAGES = {
    "stage1": {
        "seed": 1,
        "data.resolution": 512,
        "data.mixture": {"Rec": 50.0, "T2I": 47.0, "Uncond": 3.0},
        "paper": {"batch": 2336, "steps": 34_000},
        "batch": {"rows": 768, "micro_batches": 3},
        "optimizer.learning_rate": 1e-4,
        "optimizer.warmup": 1000,
        "loss.kind": "contrastive",
        "trainable": BRIDGE_LEARNS,
    },
    "stage2": {
        "seed": 2,
        "data.resolution": 1024,
        "data.mixture": {"Rec": 50.0, "T2I": 47.0, "Uncond": 3.0},
        "paper": {"batch": 584, "steps": 44_000},
        "batch": {"rows": 256, "micro_batches": 2},
    },
    "stage3": {
        "seed": 3,
        "data.resolution": 1024,
        "data.mixture": {"S-Edit": 55.0, "T2I": 25.0, "Rec": 20.0, "Uncond": 10.0},
        "paper": {"batch": 584, "steps": 34_000},
        "batch": {"rows": 256, "micro_batches": 2},
    },
    "stage4": {
        "seed": 4,
        "data.resolution": 1024,
        "data.mixture": {"S-Edit": 35.0, "M-Edit": 20.0, "T2I": 25.0, "Rec": 20.0, "Uncond": 10.0},
        "paper": {"batch": 244, "steps": 18_000},
        "batch": {"rows": 128, "micro_batches": 2},
    },
}


def get_config(stage: str) -> ml_collections.ConfigDict:
    """The config of `stage1` to `stage4`."""
    if stage not in STAGES:
        raise ValueError(f"no stage {stage!r}; expected one of {sorted(STAGES)}")
    config = base_config()
    config.name = stage
    config.model.remat = (
        "named"  # on TPU pods the fastest that there is memory for, see docs/plan.md
    )
    config.validation_rows = 256  # of each task; 128 and 256 chips divide it
    for key, value in STAGES[stage].items():
        group = value.items() if isinstance(value, dict) else [("", value)]
        for name, leaf in group:
            config.update_from_flattened_dict({f"{key}.{name}".rstrip("."): leaf})
    config.optimizer.steps = rounded_steps(config)
    return config
