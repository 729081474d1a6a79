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
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
import ml_collections

from wemmu_jax.data.pools import LEAST_WEIGHT
from wemmu_jax.data.tasks import STAGE_TASKS, Task
from wemmu_jax.diffusion.flow import TimeLaw
from wemmu_jax.models.qwen2_5_vl.prompt import TEXT_LIMIT
from wemmu_jax.models.wemmu.config import BridgeConfig
from wemmu_jax.ops.attention import AttentionBackend
from wemmu_jax.training.optimizer import FreezeRule, Method, OptimizerConfig

_NO_VQA = (
    f"data.mixture: no stage trains on {Task.VQA.value}, because the VLM, which answers, is frozen in all of them; "
    "`wemmu miniworld pretrain vlm` trains one"
)

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


class Remat(enum.StrEnum):
    """What the backward pass recomputes, see `wemmu_jax.ops.remat`."""

    NONE = "none"
    UNROLLED = "unrolled"
    FULL = "full"
    DOTS = "dots"
    NAMED = "named"
    WITHOUT_UP = "without_up"
    OFFLOAD = "offload"


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
                # The kernel: auto is the platform's own, see `wemmu_jax.ops.attention`.
                "attention": "auto",
            },
            "data": {
                "resolution": 512,
                "buckets": 9,
                "max_aspect": 4.0,
                # Tokens of queries and sources are padded to a multiple of this.
                "pad_multiple": 8,
                # One, because each is a program of its own for every bucket and arity, and the longest of hundreds of
                # rows pads them all.
                "text_lengths": (256,),
                "mixture": {"T2I": 0.0, "Uncond": 0.0, "Rec": 0.0, "S-Edit": 0.0, "M-Edit": 0.0},
                # What to train on, and what to validate on: entries of `wemmu_jax.data.sources`, or YAML files of them.
                "sources": (),
                "held_out": (),
                # A folder of `wemmu data encode`, whose latents then stand for the DC-AE's pixels; empty: none.
                "features": "",
                # Processes that make rows; with 0, threads of this process that make micro-batches.
                "workers": 0,
                "threads": 4,
                # The part of the rows whose records may be unreadable before the run stops.
                "bad_share": 0.01,
            },
            "batch": {"rows": 64, "micro_batches": 36},
            # The paper's own numbers; `optimizer.steps` keeps their product with the rounded batch.
            "paper": {"batch": 2336, "steps": 34_000},
            "optimizer": {
                "method": "adamw",
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
                # Noises and times for each sample, which the DiT alone sees. 1 is the paper's; more cost little where
                # the DiT is a small part.
                "draws": 1,
            },
            "trainable": ALL_BUT_VLM_LEARN,
            # Patterns of paths of the bridge that are drawn anew from the seed, whatever `init` has there.
            "redrawn": (),
            # Devices along each axis, see `wemmu_jax.sharding`; data 0 is what the others leave.
            "mesh": {"data": 0, "fsdp": 8, "sequence": 1, "tensor": 1},
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
      ValueError: the file is no config or has no such stage, a key does not exist, or a value has the wrong type.
    """
    path, _, stage = spec.partition(":")
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"no config file {path}; expected FILE.py:STAGE")
    config = _config_of_file(path, stage)
    for key, value in (overrides or {}).items():
        try:
            old = _lookup(config, key)
            config.update_from_flattened_dict({key: _like(old, value)})
        except (KeyError, AttributeError) as error:
            if key == f"data.mixture.{Task.VQA.value}":
                raise ValueError(f"{spec}: {_NO_VQA}") from None
            hint = str(error.args[0]).rpartition("\n")[2]  # ConfigDict's own: did you mean ...?
            raise ValueError(f"{spec} has no key {key!r}: {hint}") from None
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{spec}: {key}={value!r} does not fit: {error}") from None
    return config


def _config_of_file(path: str, stage: str) -> ml_collections.ConfigDict:
    found = importlib.util.spec_from_file_location("wemmu_config", path)
    if found is None:
        raise ValueError(f"{path} is no config file; expected FILE.py:STAGE")
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ValueError("a config file must define get_config(stage)")
        config = module.get_config(stage)
    except Exception as error:  # the file is the user's own, and may raise anything
        if f'Key "{Task.VQA.value}" does not exist' in str(error):
            raise ValueError(f"{path}: {_NO_VQA}") from error
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{path}: {kind}{error}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise ValueError(f"{path}: get_config must return a ConfigDict, found {config!r}")
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
        if not isinstance(value, list):
            raise ValueError(f"expected a list, found {type(value).__name__}")
        return tuple(value)
    if isinstance(old, float) and type(value) is int:
        return float(value)
    if type(value) is not type(old):
        raise ValueError(f"expected {type(old).__name__}, found {type(value).__name__}")
    return value


_Test = Callable[[Any], bool]


def _whole(least: int, below: float = math.inf) -> _Test:
    # By type, because true and false are integers too.
    return lambda value: type(value) is int and least <= value < below


def _number(least: float = 0.0, below: float = math.inf) -> _Test:
    return lambda value: type(value) in (int, float) and least <= value < below  # never NaN


def _above_zero(value: Any) -> bool:
    return _number()(value) and value > 0


def _is_weight(value: Any) -> bool:
    return _number()(value) and (value == 0 or value >= LEAST_WEIGHT)


def _list_of(test: _Test) -> _Test:
    return lambda value: isinstance(value, list | tuple) and all(map(test, value))


def _are_lengths(value: Any) -> bool:
    if not _list_of(_whole(1))(value):
        return False
    return bool(value) and sorted(set(value)) == list(value) and value[-1] <= TEXT_LIMIT


def _is_group(value: Any) -> bool:
    return isinstance(value, Mapping | ml_collections.ConfigDict)


def _is_rule(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except re.error:
        return False


_COUNT = (_whole(1), "a whole number above 0")
_COUNT_OR_ZERO = (_whole(0), "a whole number of at least 0")
_DATA_SETS = (
    _list_of(lambda value: _is_group(value) or isinstance(value, str)),
    'a list of data sets, {"name": ..., "tasks": ..., "type": ..., ...} or a YAML file',
)

# Key -> whether a value makes sense, and what is expected of it. Keys that are a choice, and what hangs on several
# keys or on the weights, are looked at where they are used.
_EXPECTED: dict[str, tuple[_Test, str]] = {
    "seed": (_whole(0, 2**32), "a whole number of at least 0 and below 2**32"),
    "data.max_aspect": (_number(1), "a finite number of at least 1"),
    "data.pad_multiple": _COUNT,
    "data.text_lengths": (
        _are_lengths,
        f"a list of increasing whole numbers from 1 to {TEXT_LIMIT}",
    ),
    **{
        f"data.mixture.{task.value}": (
            _is_weight,
            f"0 (off) or a finite number of at least {LEAST_WEIGHT}",
        )
        for task in STAGE_TASKS
    },
    "data.sources": _DATA_SETS,
    "data.held_out": _DATA_SETS,
    "data.workers": _COUNT_OR_ZERO,
    "data.threads": _COUNT_OR_ZERO,
    "data.bad_share": (_number(0, 1), "a number of at least 0 and below 1"),
    "batch.rows": _COUNT,
    "batch.micro_batches": _COUNT,
    "optimizer.learning_rate": (_above_zero, "a finite number above 0"),
    "optimizer.weight_decay": (_number(), "a finite number of at least 0"),
    "optimizer.clip": (_number(), "0 (off) or a finite number above it"),
    "optimizer.ema": (_number(0, 1), "0 (off) or a number between 0 and 1"),
    "loss.contrast": (
        _number(0, 1),
        "at least 0 and below 1, or the contrastive loss has no minimum",
    ),
    "loss.shift": (_above_zero, "a finite number above 0"),
    "loss.draws": _COUNT,
    "trainable": (_list_of(_is_rule), "a list of [pattern, true or false]"),
    "redrawn": (_list_of(_is_pattern), "a list of regular expressions"),
    "mesh.data": _COUNT_OR_ZERO,
    "mesh.fsdp": _COUNT,
    "mesh.sequence": _COUNT,
    "mesh.tensor": _COUNT,
    "every.log": _COUNT_OR_ZERO,
    "every.checkpoint": _COUNT_OR_ZERO,
    "every.validate": _COUNT_OR_ZERO,
    "every.sample": _COUNT_OR_ZERO,
    "keep_checkpoints": _COUNT,
    "validation_rows": _COUNT,
}


def _check_values(config: ml_collections.ConfigDict) -> None:
    if Task.VQA.value in config.data.mixture:
        raise ValueError(_NO_VQA)
    for key, (makes_sense, expected) in _EXPECTED.items():
        value = _lookup(config, key)
        if not makes_sense(value):
            raise ValueError(f"{key} must be {expected}; found {value!r}")


@dataclasses.dataclass(frozen=True)
class Stage:
    """The resolved settings of one stage; the fields follow `base_config`."""

    name: str
    seed: int
    bridge: BridgeConfig
    dtype: Any
    remat: Remat
    attention: AttentionBackend
    rows: int
    micro_batches: int
    optimizer: OptimizerConfig
    ema: float
    loss: Loss
    contrast: float
    time_law: TimeLaw
    shift: float
    draws: int
    trainable: tuple[FreezeRule, ...]
    redrawn: tuple[str, ...] = ()

    @property
    def batch(self) -> int:
        """Samples of an optimizer step."""
        return self.rows * self.micro_batches

    @classmethod
    def from_config(cls, config: ml_collections.ConfigDict) -> "Stage":
        """Raises ValueError naming a field that makes no sense."""
        _check_values(config)
        fields, loss = config.optimizer, config.loss
        kind = _choice(Loss, "loss.kind", loss.kind)
        if kind is Loss.CONTRASTIVE and config.batch.rows < 2:
            raise ValueError("loss.kind=contrastive needs batch.rows >= 2, found 1")
        return cls(
            name=config.name,
            seed=config.seed,
            bridge=BridgeConfig.from_dict(config.model.bridge.to_dict()),
            dtype=jnp.dtype(_choice(DType, "model.dtype", config.model.dtype)),
            remat=_choice(Remat, "model.remat", config.model.remat),
            attention=_choice(AttentionBackend, "model.attention", config.model.attention),
            rows=config.batch.rows,
            micro_batches=config.batch.micro_batches,
            optimizer=OptimizerConfig(
                learning_rate=fields.learning_rate,
                warmup=fields.warmup,
                steps=fields.steps,
                weight_decay=fields.weight_decay,
                clip=fields.clip or None,
                method=_choice(Method, "optimizer.method", fields.method),
            ),
            ema=fields.ema,
            loss=kind,
            contrast=loss.contrast,
            time_law=_choice(TimeLaw, "loss.time_law", loss.time_law),
            shift=loss.shift,
            draws=loss.draws,
            trainable=tuple(FreezeRule(*rule) for rule in config.trainable),
            redrawn=tuple(config.redrawn),
        )
