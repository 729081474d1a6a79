"""A stage on a topology: what it needs of memory, what moves between chips, and what a step is predicted to take."""

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from wemmu_jax.models.wemmu.config import WeMMUConfig
from wemmu_jax.planning.chips import GIB, Chip, chip_of
from wemmu_jax.planning.memory import memory, resident, what_fits
from wemmu_jax.planning.predict import ASSUMPTIONS, Prediction, Predictor, Times, Transfer
from wemmu_jax.planning.program import read_program
from wemmu_jax.planning.programs import Key, Library, Setting
from wemmu_jax.planning.shapes import Shape, model_flops, shares, squarest
from wemmu_jax.planning.torus import Torus

ONCE = (Key("update"), Key("zero"))  # programs of an optimizer step beside its micro-batches


@dataclasses.dataclass(frozen=True)
class ShapePlan:
    """Micro-batches of one shape.

    Attributes:
      shape: arity and bucket.
      share: of all micro-batches.
      compiled: the shape whose programs stand for it; times are scaled by the model's FLOPs.
      model_flops: part -> FLOPs of a sample, by formula.
      times: of a micro-batch, its pictures' encoding included, unless their latents are cached.
    """

    shape: Shape
    share: float
    compiled: Shape
    model_flops: Mapping[str, float]
    times: Times


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """One compiled program.

    Attributes:
      name: which.
      runs: how often it runs in an optimizer step, on average, for the shapes that it stands for.
      compile_seconds: when it was compiled.
      beside_arguments: bytes a chip that it needs on top of what it is given.
      prediction: of one run.
    """

    name: str
    runs: float
    compile_seconds: float
    beside_arguments: int
    prediction: Prediction


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """What is known of a stage on a topology; bytes are a chip's, FLOPs and seconds those of an optimizer step. A
    draft's seconds mean nothing, nor does what follows from them."""

    stage: str
    topology: str
    device_kind: str
    chip: Chip
    devices: int
    chips: int
    mesh: Mapping[str, int]
    remat: str
    rows: int
    micro_batches: int
    steps: int
    memory: Mapping[str, int]
    shapes: Sequence[ShapePlan]
    programs: Sequence[ProgramPlan]
    assumptions: Sequence[str]
    draft: bool

    @property
    def spare(self) -> float:
        """Bytes that are left; below zero the stage does not fit."""
        return self.chip.memory - sum(self.memory.values())

    @property
    def model_flops(self) -> float:
        """By formula, of all devices."""
        sample = sum(one.share * sum(one.model_flops.values()) for one in self.shapes)
        return self.rows * self.micro_batches * sample

    @property
    def program_flops(self) -> float:
        """Products in the programs, of all devices."""
        return self.devices * sum(one.runs * one.prediction.flops for one in self.programs)

    @functools.cached_property
    def times(self) -> Times:
        """Seconds."""
        return sum((one.prediction.times * one.runs for one in self.programs), Times())

    @property
    def mfu(self) -> dict[str, float]:
        """Model FLOPs over what the chips could do, by the names of `Times`."""
        could = self.devices * self.chip.peak
        return {name: self.model_flops / (one * could) for name, one in self._seconds}

    @property
    def chip_hours(self) -> dict[str, float]:
        """Of the whole stage, by the names of `Times`."""
        return {name: one * self.steps * self.chips / 3600 for name, one in self._seconds}

    @property
    def days(self) -> dict[str, float]:
        """Of the whole stage, by the names of `Times`."""
        return {name: one * self.steps / 86400 for name, one in self._seconds}

    @property
    def _seconds(self) -> list[tuple[str, float]]:
        return list(dataclasses.asdict(self.times).items())

    @property
    def parts(self) -> dict[str, float]:
        """Part of the model -> seconds on the core, raw."""
        total = collections.Counter()
        for one in self.programs:
            for part, seconds in one.prediction.parts.items():
                total[part] += one.runs * seconds
        return dict(total.most_common())

    @property
    def transfers(self) -> list[Transfer]:
        """Collectives, the longest first."""
        total = {}
        for one in self.programs:
            for transfer in one.prediction.transfers:
                scaled = transfer * one.runs
                known = total.get(scaled.key)
                total[scaled.key] = scaled if known is None else known + scaled
        return sorted(total.values(), key=lambda transfer: -transfer.seconds)

    def to_json(self) -> dict[str, Any]:
        """Fields, and what follows from them."""
        names = ("spare", "model_flops", "program_flops", "mfu", "chip_hours", "days", "parts")
        derived = {name: getattr(self, name) for name in names}
        derived["transfers"] = [dataclasses.asdict(one) for one in self.transfers]
        return dataclasses.asdict(self) | {"times": dataclasses.asdict(self.times)} | derived


class DoesNotFit(ValueError):
    """A stage needs more memory than there is; the message says what would work."""


def branches(sizes: WeMMUConfig):
    """How often the branches of the model's conditionals are taken, see `program.Branches`."""
    vision = sizes.vlm.vision
    full = len(vision.fullatt_block_indexes) / vision.depth

    def taken(op_name: str, count: int) -> tuple[float, ...]:
        if "VisionTransformer" in op_name and count == 2:
            return (1 - full, full)  # attention in windows, attention over all
        if "attention_splash" in op_name:
            return (1 / count,) * count  # which part of causal queries a device has
        if "jit(update)" in op_name and count == 2:
            return (0.0, 1.0)  # losses and gradients are finite
        raise ValueError(f"it is not known how often the {count} branches of {op_name!r} are taken")

    return taken


def plan_stage(
    setting: Setting, library: Library, *, all_shapes: bool = False, processes: int = 1
) -> StagePlan:
    """Plans a stage.

    Args:
      setting: stage and topology.
      library: where compiled programs are kept.
      all_shapes: compile every shape; else the squarest bucket of each arity, and scale the others.
      processes: that compile at once.

    Raises:
      DoesNotFit: the weights, or a program beside them, are too large for the compiler.
      ValueError: mesh, rows and devices do not fit each other, or a program holds what planning cannot read.
    """
    stage, chip = setting.run.trainer.stage, chip_of(setting.devices[0])
    if (weights := sum(resident(setting).values())) > chip.memory:
        raise DoesNotFit(_misfit(setting, "what lies there all the time", weights, 0, chip))
    torus, taken = Torus.of(setting.devices, chip), branches(setting.sizes)
    predictor = Predictor(torus)
    share_of = shares(setting)
    stands_for = {
        shape: shape if all_shapes else squarest(share_of, shape.arity) for shape in share_of
    }
    keys = {key: 0.0 for shape in stands_for.values() for key in shape.programs}
    runs = keys | dict.fromkeys(ONCE, 1.0)
    programs = library.compile(setting, list(runs), processes=processes)
    for key, one in programs.items():
        if one.too_large:
            needed = one.memory["temporaries"]
            raise DoesNotFit(_misfit(setting, f"{key}: the program", needed, needed, chip))
    predictions = {
        key: predictor.predict(read_program(one.text, taken)) for key, one in programs.items()
    }
    shapes = []
    for shape, share in share_of.items():
        own, compiled = model_flops(setting, shape), stands_for[shape]
        scale = sum(own.values()) / sum(model_flops(setting, compiled).values())
        times = Times()
        for key, count in compiled.programs.items():
            runs[key] += stage.micro_batches * share * scale * count
            times += predictions[key].times * (scale * count)
        shapes.append(ShapePlan(shape, share, compiled, own, times))
    devices, slices = setting.devices, setting.slices
    return StagePlan(
        stage=stage.name,
        topology=f"{slices} x {setting.topology}" if slices > 1 else setting.topology,
        device_kind=devices[0].device_kind,
        chip=chip,
        devices=len(devices),
        chips=torus.chips,
        mesh=dict(setting.run.trainer.mesh.shape),
        remat=stage.remat.value,
        rows=stage.rows,
        micro_batches=stage.micro_batches,
        steps=stage.optimizer.steps,
        memory=memory(setting, programs),
        shapes=shapes,
        programs=[
            ProgramPlan(str(key), runs[key], one.seconds, one.beside_arguments, predictions[key])
            for key, one in programs.items()
        ],
        assumptions=[*ASSUMPTIONS, *_own_assumptions(setting, all_shapes)],
        draft=setting.draft,
    )


def _misfit(setting: Setting, what: str, needed: float, temporaries: float, chip: Chip) -> str:
    return (
        f"{setting.config.name} does not fit {setting.topology}: {what} needs {needed / GIB:.1f} GiB a device of "
        f"{chip.memory / GIB:.2f}; {what_fits(setting, temporaries, chip.memory)}"
    )


def _own_assumptions(setting: Setting, all_shapes: bool) -> list[str]:
    said = [f"texts fill the {setting.text_length} tokens that they are padded to"]
    if not setting.config.data.sources:
        said.append("no data.sources: every bucket alike; M-Edit has two sources, S-Edit one")
    if setting.draft:
        said.append("a draft: compiled with the least effort; memory within a tenth, and no times")
    if not all_shapes:
        said.append("buckets marked * are scaled from the compiled one by the model's FLOPs")
    if setting.run.cached:
        said.append("latents come from data.features: the DC-AE encodes nothing")
    said.append("cutting and packing the ViT's pixels, a program of its own, is not planned")
    said.append(
        "memory: arrays without the padding of tiles; the next step's micro-batches are there too"
    )
    said.append("no input, checkpoint or logging is waited for")
    return said
