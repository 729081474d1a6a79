"""Time from a program. A relative guide and not a timing: nothing has run."""

import collections
import dataclasses
import re
from collections.abc import Mapping

from wemmu_jax.planning.kernels import kernel_cycles, kernel_flops
from wemmu_jax.planning.program import Operation, Region, Work
from wemmu_jax.planning.torus import Torus

KERNEL_SPEED = 0.6  # of peak, that a Pallas call is trusted to reach
CAP = 0.75  # of HBM bandwidth, that an operation without a product is trusted to reach

ASSUMPTIONS = (
    "a relative guide and not a timing: nothing has run",
    "raw: XLA's cycle estimates x trip counts / clock",
    f"capped: what holds no product takes at most its bytes / {CAP:.0%} of memory bandwidth",
    f"operations without cycles take their bytes / {CAP:.0%} of memory bandwidth",
    f"a Pallas call takes the larger of FLOPs / {KERNEL_SPEED} peak and bytes / memory bandwidth; no block is skipped",
    "a depthwise convolution's takes 1.16 cycles for 1024 products if that is more, as libtpu schedules them",
    "collectives: bytes over the links along which the group lies; no latency, no other traffic",
    "overlapped: a collective hides behind all that runs in the same pass of the same loop; exposed: behind nothing",
    "copies between memories run beside the core: the larger counts",
)

# Module in an operation's name -> part of the model.
_PARTS = (
    (r"VisionTransformer", "ViT"),
    (r"TextModel", "LLM prefill"),
    (r"DecoderStack", "expert"),
    (r"VAEBranch", "VAE branch"),
    (r"PositionMLP", "Position MLP"),
    (r"SanaTransformer", "DiT"),
    (r"DCAE", "DC-AE encode"),
    (r"jit\(update\)", "optimizer"),
    (r"jit\(zeros\)", "zeroing"),
)
OTHER = "other"


def part(op_name: str) -> str:
    """Part of the model that an operation belongs to."""
    return next((name for pattern, name in _PARTS if re.search(pattern, op_name)), OTHER)


def phase(op_name: str) -> str:
    """Pass that an operation belongs to."""
    if "rematted_computation" in op_name:
        return "recompute"
    return "backward" if "transpose(" in op_name else "forward"


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds: XLA's cycles raw or capped, collectives overlapped or exposed."""

    raw_overlapped: float = 0.0
    raw_exposed: float = 0.0
    capped_overlapped: float = 0.0
    capped_exposed: float = 0.0

    def __add__(self, other: "Times") -> "Times":
        return Times(*(a + b for a, b in zip(self._all, other._all, strict=True)))

    def __mul__(self, times: float) -> "Times":
        return Times(*(times * value for value in self._all))

    @property
    def _all(self) -> tuple[float, ...]:
        return dataclasses.astuple(self)


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Collectives that are alike, over one run of a program.

    Attributes:
      kind, array: as in `Collective`.
      part, phase, what: where in the model, in which pass, and of which layer.
      group: devices that take part.
      count: how often.
      bytes: of all of them; of the array that is gathered, reduced or moved.
      seconds: of all of them.
    """

    kind: str
    array: str
    part: str
    phase: str
    what: str
    group: int
    count: float
    bytes: float
    seconds: float

    @property
    def key(self) -> tuple:
        """Equal for those that are alike."""
        return (self.kind, self.array, self.part, self.phase, self.what, self.group)

    def __add__(self, other: "Transfer") -> "Transfer":
        sums = (self.count + other.count, self.bytes + other.bytes, self.seconds + other.seconds)
        return Transfer(*self.key, *sums)

    def __mul__(self, times: float) -> "Transfer":
        return Transfer(*self.key, times * self.count, times * self.bytes, times * self.seconds)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What one run of a program takes.

    Attributes:
      times: seconds.
      flops: of all products on one device.
      parts: part -> seconds on the core, raw.
      works: kind of work -> seconds, raw.
      transfers: collectives, the longest first.
      kernels: Pallas call -> (how often, seconds, whether its FLOPs are known).
      unpriced: opcode without cycles -> seconds.
    """

    times: Times
    flops: float
    parts: Mapping[str, float]
    works: Mapping[str, float]
    transfers: tuple[Transfer, ...]
    kernels: Mapping[str, tuple[float, float, bool]]
    unpriced: Mapping[str, float]


class Predictor:
    """Costs operations on the devices of a mesh."""

    def __init__(self, torus: Torus):
        self._torus, self._chip = torus, torus.chip

    def seconds(self, one: Operation, *, capped: bool) -> float:
        """Of one operation by itself; never 0 for one that moves a byte."""
        chip = self._chip
        at_cap = one.bytes / (CAP * chip.bandwidth)
        match one.work:
            case Work.CORE:
                raw = one.cycles / chip.clock
                return min(raw, at_cap) if capped and not one.flops else raw
            case Work.UNPRICED:
                return at_cap
            case Work.KERNEL:
                compute = kernel_flops(one) / (KERNEL_SPEED * chip.peak)
                return max(compute, kernel_cycles(one) / chip.clock, one.bytes / chip.bandwidth)
            case Work.COPY:
                return one.bytes / (chip.host if one.to_host else chip.bandwidth)
            case Work.COLLECTIVE:
                return self._torus.seconds(one.collective)

    def times(self, region: Region) -> Times:
        """Of a region with all that is inside it."""
        sums = {True: collections.Counter(), False: collections.Counter()}
        for one in region.operations:
            resource = one.work if one.work in (Work.COPY, Work.COLLECTIVE) else Work.CORE
            for capped in sums:
                sums[capped][resource] += self.seconds(one, capped=capped)
        own = []
        for capped in (False, True):
            core = max(sums[capped][Work.CORE], sums[capped][Work.COPY])
            wire = sums[capped][Work.COLLECTIVE]
            own += [max(core, wire), core + wire]
        inner = [self.times(region) * count for count, region in region.inner]
        return sum(inner, Times(*own))

    def predict(self, region: Region) -> Prediction:
        """Of a program."""
        parts, works = collections.Counter(), collections.Counter()
        unpriced, transfers, kernels, total = collections.Counter(), {}, {}, 0.0
        for count, one in region.walk():
            seconds = count * self.seconds(one, capped=False)
            works[one.work.value] += seconds
            total += count * (kernel_flops(one) if one.work is Work.KERNEL else one.flops)
            if one.work is Work.COLLECTIVE:
                new = _transfer(one, self.seconds(one, capped=False)) * count
                transfers[new.key] = transfers[new.key] + new if new.key in transfers else new
            elif one.work is not Work.COPY:
                parts[part(one.op_name)] += seconds
            if one.work is Work.UNPRICED:
                unpriced[one.opcode] += seconds
            if one.work is Work.KERNEL:
                often, before, known = kernels.get(one.name, (0, 0.0, True))
                known = known and kernel_flops(one) > 0
                kernels[one.name] = (often + count, before + seconds, known)
        return Prediction(
            times=self.times(region),
            flops=total,
            parts=dict(parts),
            works=dict(works),
            transfers=tuple(sorted(transfers.values(), key=lambda one: -one.seconds)),
            kernels=kernels,
            unpriced=dict(unpriced),
        )


def _transfer(one: Operation, seconds: float) -> Transfer:
    collective, name = one.collective, one.op_name
    return Transfer(
        kind=collective.kind,
        array=collective.array,
        part=part(name),
        phase=phase(name),
        what=_layer(name),
        group=len(collective.group),
        count=1,
        bytes=collective.bytes,
        seconds=seconds,
    )


def _layer(op_name: str) -> str:
    """The modules in an operation's name, without jax's own words and the operation itself."""
    own = re.compile(
        r"jit\(|jvp\(|transpose\(|while$|body$|cond$|branch_|closed_call|checkpoint|remat"
    )
    return "/".join(word for word in op_name.split("/")[:-1] if not own.match(word))
