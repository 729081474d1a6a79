"""The paper's ablations on miniworld. A config is named BUDGET/ARM/seedN/PHASE:

    wemmu train --config configs/ablations.py:full/noisy/seed0/stage2 --init RUN_OF_STAGE1 --workdir DIR

An arm is a bridge, a phase is a stretch of training, a budget is how long. `wemmu miniworld ablate` trains and grades
what a study compares.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

from configs.tiny import get_config as tiny_config
from configs.tiny import shortened
from wemmu_jax.training.curriculum import ALL_BUT_VLM_LEARN

# Arm -> fields of the bridge. The paper's first three settings have no VAE branch (4.3.1).
ARMS: dict[str, dict[str, Any]] = {
    "fixed": {"queries": "learnable_fixed", "connector": "none"},
    "dynamic": {"queries": "learnable_dynamic", "connector": "none"},
    "noisy": {"connector": "none"},
    "noisy-0.3": {"connector": "none", "noise_scale": 0.3},
    "noisy-0.1": {"connector": "none", "noise_scale": 0.1},
    "noisy-vae": {},
    "scaled-vae": {"queries": "noisy_scaled"},
    "noisy-vae-expert": {"vae_stream": "expert"},
    "vit2": {"connector": "vit_2"},
    "vit2-expert": {"connector": "vit_2", "vae_stream": "expert"},
    "vit6": {"connector": "vit_6"},
    "vit6-expert": {"connector": "vit_6", "vae_stream": "expert"},
    "vit6-distilled": {"connector": "vit_6_distilled"},
    "straight": {"connector": "none", "pathway": "vit"},
}


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of training.

    Attributes:
      base: the tiny stage whose config it changes.
      start: the phase it goes on from; None for the converted backbones.
      changes: flattened keys of the config.
    """

    base: str
    start: str | None
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _mixture(**weights: float) -> dict[str, float]:
    tasks = {"T2I": "T2I", "Uncond": "Uncond", "Rec": "Rec", "S_Edit": "S-Edit", "M_Edit": "M-Edit"}
    return {f"data.mixture.{task}": weights.get(name, 0.0) for name, task in tasks.items()}


# Under the times of the phase before: what editing alone makes forgotten is then no matter of another law.
_EDITS = _mixture(S_Edit=1.0) | {"loss.shift": tiny_config("stage2").loss.shift}
_JOINT = _mixture(Rec=30.0, T2I=30.0, Uncond=5.0, S_Edit=35.0)
_QUERIES_LEARN = (("queries/", True), (".*", False))
_VIT_LEARNS = (("vlm/vision/", True), *ALL_BUT_VLM_LEARN)

PHASES = {
    "stage1": Phase("stage1", None),
    "stage2": Phase("stage2", "stage1"),
    "stage3": Phase("stage3", "stage2"),
    "stage4": Phase("stage4", "stage3"),
    # Fig. 1: editing alone after T2I and reconstruction; with the queries alone; all tasks from the start.
    "edits": Phase("stage3", "stage2", _EDITS),
    "edits-queries": Phase("stage3", "stage2", _EDITS | {"trainable": _QUERIES_LEARN}),
    "edits-new-queries": Phase(
        "stage3", "stage2", _EDITS | {"trainable": _QUERIES_LEARN, "redrawn": ("queries/",)}
    ),
    "joint1": Phase("stage1", None, _JOINT),
    "joint2": Phase("stage2", "joint1", _JOINT),
    # Fig. 4: the ViT unfrozen; connectors; what is lost between the ViT and the queries.
    "stage3-vit": Phase("stage3", "stage2", {"trainable": _VIT_LEARNS}),
    "mixed": Phase("stage3", None),
    "reconstruction": Phase("stage2", None, _mixture(Rec=90.0, Uncond=10.0)),
    # Stage 1 with either loss, at two sizes of the micro-batch, from which the negatives come.
    "cfm-8": Phase("stage1", None, {"loss.kind": "flow_matching", "batch.rows": 8}),
    "cfm-32": Phase("stage1", None, {"loss.kind": "flow_matching", "batch.rows": 32}),
    "contrastive-8": Phase("stage1", None, {"batch.rows": 8}),
    "contrastive-32": Phase("stage1", None, {"batch.rows": 32}),
}


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much is trained and graded.

    Attributes:
      steps: of each phase.
      seeds: of the arms that are compared over several.
      graded: held-out requests of each kind.
      solver_steps: for each picture.
      optimised: whether programs are compiled to run fast, or to be compiled fast and run on few rows.
    """

    steps: Mapping[str, int]
    seeds: int
    graded: int
    solver_steps: int
    optimised: bool


BUDGETS = {
    "smoke": Budget(
        dict.fromkeys(PHASES, 4),
        seeds=1,
        graded=1,
        solver_steps=2,
        optimised=False,
    ),
    "full": Budget(
        {
            "stage1": 400,
            "stage2": 800,
            "stage3": 900,
            "stage4": 600,
            "edits": 500,
            "edits-queries": 300,
            "edits-new-queries": 300,
            # As many steps as stage 1, stage 2 and the edits after them.
            "joint1": 400,
            "joint2": 1300,
            "stage3-vit": 900,
            "mixed": 600,
            "reconstruction": 600,
            "cfm-8": 400,
            "cfm-32": 400,
            "contrastive-8": 400,
            "contrastive-32": 400,
        },
        seeds=3,
        graded=32,
        solver_steps=20,
        optimised=True,
    ),
}


def get_config(name: str) -> ml_collections.ConfigDict:
    """The config of BUDGET/ARM/seedN/PHASE.

    Raises:
      ValueError: there is no such budget, arm, seed or phase.
    """
    parts = name.split("/")
    if len(parts) != 4 or not parts[2].removeprefix("seed").isdecimal():
        raise ValueError(f"{name!r}: expected BUDGET/ARM/seedN/PHASE")
    for part, known in zip((parts[0], parts[1], parts[3]), (BUDGETS, ARMS, PHASES), strict=True):
        if part not in known:
            raise ValueError(f"{name!r}: {part!r} is none of {', '.join(known)}")
    budget, phase, seed = BUDGETS[parts[0]], PHASES[parts[3]], int(parts[2].removeprefix("seed"))
    config = tiny_config(phase.base)
    config.name = name
    config.seed += 100 * seed  # the stages of a seed keep seeds of their own
    config.model.bridge.update(ARMS[parts[1]])
    if not budget.optimised:
        config.batch.rows = config.validation_rows = 4
    config.update_from_flattened_dict(dict(phase.changes))
    config.data.buckets = 1  # squares, as they are graded: other shapes are learned much later
    steps = budget.steps[parts[3]]
    shortened(config, steps)
    if budget.optimised:
        config.model.remat = "unrolled"
    else:
        config.optimizer.method = "adamw"  # Muon's products take longer to compile than to teach
    config.paper.batch = config.batch.rows * config.batch.micro_batches
    # The last step is looked at as well: eight times in a long phase, once in a short one.
    validate = max(4, steps // 8)
    config.every.update({"log": 25, "checkpoint": 100, "validate": validate, "sample": 0})
    config.keep_checkpoints = 1
    return config
