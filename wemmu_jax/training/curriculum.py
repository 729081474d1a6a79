"""A training stage as data. `configs/` holds `ml_collections.ConfigDict`s; here they become frozen dataclasses.

The four stages of the paper differ in what they train on, at which resolution, with which loss and which weights
(Table 3); nothing in the code asks which stage it is.
"""

import dataclasses
import enum
import importlib.util
import json
import math
import pathlib
from typing import Any, TypeVar

import jax.numpy as jnp
import ml_collections

from wemmu_jax.diffusion.flow import TimeLaw
from wemmu_jax.models.wemmu.config import BridgeConfig
from wemmu_jax.training.optimizer import FreezeRule, OptimizerConfig

FROZEN_BACKBONES = (("vlm/", False), ("dc_ae/", False))
BRIDGE_LEARNS = (*FROZEN_BACKBONES, ("dit/", False), (".*", True))  # stage 1
ALL_BUT_VLM_LEARN = (*FROZEN_BACKBONES, (".*", True))  # stages 2 to 4


class Loss(enum.StrEnum):
    """The training objective."""

    FLOW_MATCHING = "flow_matching"  # Eq. 3
    CONTRASTIVE = "contrastive"  # Eq. 4


class DType(enum.StrEnum):
    """The type of frozen weights and of the large products."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


_Choice = TypeVar("_Choice", bound=enum.StrEnum)


def _choice(kind: type[_Choice], key: str, value: str) -> _Choice:
    try:
        return kind(value)
    except ValueError:
        choices = [member.value for member in kind]
        raise ValueError(f"{key}={value!r}; expected one of {choices}") from None


def base_config() -> ml_collections.ConfigDict:
    """Every field that a stage may set, with the defaults of design and paper. Locked: a typo is an error."""
    config = ml_collections.ConfigDict(
        {
            "name": "",
            "seed": 0,
            # A folder that `wemmu convert` wrote, or the workdir of the stage before.
            "init": "",
            "model": {
                "bridge": BridgeConfig().to_dict(),
                "dtype": "bfloat16",
                "remat": "full",
            },
            "data": {
                "resolution": 512,
                "buckets": 9,
                "max_aspect": 4.0,
                # Tokens of queries and sources are padded to a multiple of this.
                "pad_multiple": 128,
                "text_lengths": (128, 256, 512),
                "mixture": {"T2I": 0.0, "Uncond": 0.0, "Rec": 0.0, "S-Edit": 0.0, "M-Edit": 0.0},
                # Entries of `wemmu_jax.data.sources`: what to train on, and what to validate on.
                "sources": (),
                "held_out": (),
                "threads": 4,
            },
            "batch": {"rows": 64, "micro_batches": 36},
            # The paper's own numbers; `optimizer.steps` keeps their product with the rounded batch.
            "paper": {"batch": 2336, "steps": 34_000},
            "optimizer": {
                "learning_rate": 1e-5,
                "warmup": 1500,
                "steps": 0,
                "weight_decay": 1e-5,
                "clip": 1.0,
                "ema": 0.0,
            },
            "loss": {
                "kind": "flow_matching",
                "contrast": 0.05,
                "time_law": "logit_normal",
                "shift": 3.0,
            },
            "trainable": ALL_BUT_VLM_LEARN,
            "mesh": {"fsdp": 8},
            "every": {"log": 10, "checkpoint": 1000, "validate": 1000, "sample": 1000},
            "keep_checkpoints": 3,
            "validation_rows": 64,
        }
    )
    config.lock()
    return config


def rounded_steps(config: ml_collections.ConfigDict) -> int:
    """Optimizer steps that show the paper's number of samples at the config's batch."""
    batch = config.batch.rows * config.batch.micro_batches
    return round(config.paper.batch * config.paper.steps / batch)


def load_config(spec: str, overrides: dict[str, Any] | None = None) -> ml_collections.ConfigDict:
    """`path/to/file.py:stage` -> the locked config, with `{"optimizer.steps": 60}` laid over it.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file has no such stage, a key does not exist, or a value has the wrong type.
    """
    path, _, stage = spec.partition(":")
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"no config file {path}; expected FILE.py:STAGE")
    found = importlib.util.spec_from_file_location("wemmu_config", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    config = module.get_config(stage)
    for key, value in (overrides or {}).items():
        try:
            old = _lookup(config, key)
            config.update_from_flattened_dict({key: _like(old, value)})
        except (KeyError, AttributeError) as error:
            hint = str(error.args[0]).rpartition("\n")[2]  # ConfigDict's own: did you mean ...?
            raise ValueError(f"{spec} has no key {key!r}: {hint}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{spec}: {key}={value!r} does not fit: {error}") from None
    return config


def _lookup(config: ml_collections.ConfigDict, key: str) -> Any:
    node = config
    for part in key.split("."):
        if not isinstance(node, ml_collections.ConfigDict):
            raise KeyError(f"{part!r} is below a plain value")
        node = node[part]
    return node


def _like(old: Any, text: Any) -> Any:
    """A command line's text as a value of the type of `old`."""
    if not isinstance(text, str) or isinstance(old, str):
        return text
    if isinstance(old, ml_collections.ConfigDict):
        raise ValueError("expected a single value, found a group of keys")
    try:
        value = json.loads(text.lower() if isinstance(old, bool) else text)
    except json.JSONDecodeError:
        raise ValueError(f"expected {type(old).__name__}") from None
    if isinstance(old, tuple):
        return tuple(value)
    if isinstance(old, float) and type(value) is int:
        return float(value)
    if type(value) is not type(old):
        raise ValueError(f"expected {type(old).__name__}, found {type(value).__name__}")
    return value


@dataclasses.dataclass(frozen=True)
class Stage:
    """The resolved settings of one stage; the fields follow `base_config`."""

    name: str
    seed: int
    bridge: BridgeConfig
    dtype: Any
    remat: str
    rows: int
    micro_batches: int
    optimizer: OptimizerConfig
    ema: float
    loss: Loss
    contrast: float
    time_law: TimeLaw
    shift: float
    trainable: tuple[FreezeRule, ...]

    @property
    def batch(self) -> int:
        """Samples of an optimizer step."""
        return self.rows * self.micro_batches

    @classmethod
    def from_config(cls, config: ml_collections.ConfigDict) -> "Stage":
        """Raises ValueError naming a field that makes no sense."""
        fields, loss = config.optimizer, config.loss
        kind = _choice(Loss, "loss.kind", loss.kind)
        if min(config.batch.rows, config.batch.micro_batches) < 1:
            raise ValueError(
                f"batch.rows and batch.micro_batches must be positive, found {config.batch}"
            )
        if kind is Loss.CONTRASTIVE and config.batch.rows < 2:
            raise ValueError("loss.kind=contrastive needs batch.rows >= 2, found 1")
        if kind is Loss.CONTRASTIVE and not 0 <= loss.contrast < 1:
            raise ValueError(
                f"loss.contrast must be at least 0 and below 1, or the loss has no minimum; found {loss.contrast}"
            )
        if not 0 < loss.shift < math.inf:
            raise ValueError(f"loss.shift must be positive, found {loss.shift}")
        if not 0 < fields.learning_rate < math.inf:
            raise ValueError(
                f"optimizer.learning_rate must be positive, found {fields.learning_rate}"
            )
        if not 0 <= fields.ema < 1:
            raise ValueError(f"optimizer.ema must be 0 (off) or below 1, found {fields.ema}")
        return cls(
            name=config.name,
            seed=config.seed,
            bridge=BridgeConfig.from_dict(config.model.bridge.to_dict()),
            dtype=jnp.dtype(_choice(DType, "model.dtype", config.model.dtype)),
            remat=config.model.remat,
            rows=config.batch.rows,
            micro_batches=config.batch.micro_batches,
            optimizer=OptimizerConfig(
                learning_rate=fields.learning_rate,
                warmup=fields.warmup,
                steps=fields.steps,
                weight_decay=fields.weight_decay,
                clip=fields.clip or None,
            ),
            ema=fields.ema,
            loss=kind,
            contrast=loss.contrast,
            time_law=_choice(TimeLaw, "loss.time_law", loss.time_law),
            shift=loss.shift,
            trainable=tuple(FreezeRule(*rule) for rule in config.trainable),
        )
