"""A program as what it does and how often: optimised HLO text -> operations in nested regions.

A region is what runs together once: a program, a pass of a loop, a branch. Loops count by their trip counts, branches
by how often the model takes them.
"""

import dataclasses
import enum
import re
from collections.abc import Callable, Iterator, Sequence

from wemmu_jax.planning.collectives import Collective, collectives
from wemmu_jax.planning.hlo import Computation, Instruction, Module, Shape, parse
from wemmu_jax.planning.products import flops
from wemmu_jax.planning.trips import trip_count

# What takes no time: names for values, and the ends of what was counted where it started.
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "add-dependency", "async-done", "async-update"),
)
# Slices that were copied to vector memory are whole there already, see `kConcatBitcastCustomCall` in XLA's
# memory_space_assignment/slice.h.
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "Sharding")
_DONE = 'custom_call_target="AsyncCollectiveDone"'
_KERNEL = "tpu_custom_call"
_COPIES = ("copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start")
_HOST = "S(5)"  # the host's memory

# op_name of a conditional, its number of branches -> how often each is taken.
Branches = Callable[[str, int], Sequence[float]]


class Work(enum.Enum):
    """What an operation keeps busy."""

    CORE = "core"  # has XLA's cycles
    UNPRICED = "unpriced"  # runs on the core too, but XLA gives no cycles: costed by its bytes
    KERNEL = "kernel"  # Pallas
    COPY = "copy"  # between memories or by a SparseCore, beside the core
    COLLECTIVE = "collective"


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction that takes time.

    Attributes:
      opcode, name, op_name: as in the text; of a kernel the name without its number.
      work: what it keeps busy.
      cycles: XLA's estimate; 0 where there is none.
      bytes: that it reads and writes, of HBM or VMEM.
      flops: of its products; of a kernel, what it says itself (0: nothing).
      operands: a kernel's operands.
      to_host: whether a copy goes to the host's memory or comes from it.
      collective: what it starts, or None.
    """

    opcode: str
    name: str
    op_name: str
    work: Work
    cycles: int = 0
    bytes: int = 0
    flops: int = 0
    operands: tuple[Shape, ...] = ()
    to_host: bool = False
    collective: Collective | None = None


@dataclasses.dataclass(frozen=True)
class Region:
    """Operations, and regions inside with how often each runs when this one runs once."""

    operations: tuple[Operation, ...]
    inner: tuple[tuple[float, "Region"], ...] = ()

    def walk(self, times: float = 1) -> Iterator[tuple[float, Operation]]:
        """Every operation with how often it runs."""
        yield from ((times, one) for one in self.operations)
        for count, region in self.inner:
            yield from region.walk(times * count)

    @property
    def flops(self) -> float:
        """Of all products, padding included."""
        return sum(times * one.flops for times, one in self.walk())


def read_program(text: str, branches: Branches) -> Region:
    """The program of an optimised HLO text.

    Raises:
      ValueError: a loop whose trip count is not in the text, or a text that is no program.
    """
    module = parse(text)
    return _region(module, module[module.entry], branches, "")


def _region(module: Module, computation: Computation, branches: Branches, where: str) -> Region:
    """`where`: the name of the loop or branch, which operations without a name of their own are given."""
    operations, inner = [], []
    for one in computation:
        if one.opcode == "while":
            body = one.attribute(r"body=%([\w.\-]+)")
            inner.append((trip_count(module, computation, one), body, one.op_name))
        elif one.opcode == "conditional":
            bodies = _branches(one)
            name = _path([one, *(inside for body in bodies for inside in module[body])]) or where
            taken = branches(name, len(bodies))
            inner += [(*both, name) for both in zip(taken, bodies, strict=True)]
        elif one.opcode == "call":
            inner.append((1, one.calls, one.op_name))
        elif one.opcode not in _FREE:
            operations += _operations(module, computation, one)
    # XLA's own operations have no name, or only that of the operation that they were made of, without a path.
    operations = [
        one if "/" in one.op_name else dataclasses.replace(one, op_name=where) for one in operations
    ]
    regions = tuple(
        (times, _region(module, module[body], branches, name if "/" in name else where))
        for times, body, name in inner
    )
    return Region(tuple(operations), regions)


def _path(instructions: Sequence[Instruction]) -> str:
    """The first operation name that says where in the model it is; empty if none does."""
    named = (one.op_name for one in instructions if one.opcode not in _FREE)
    return next((name for name in named if "/" in name), "")


def _branches(conditional: Instruction) -> list[str]:
    """Bodies in the order of the index; of a boolean the false one first."""
    if listed := conditional.attribute(r"branch_computations=\{([^}]*)\}"):
        return re.findall(r"%([\w.\-]+)", listed)
    return [conditional.attribute(rf"{side}_computation=%([\w.\-]+)") for side in ("false", "true")]


def _operations(module: Module, scope: Computation, one: Instruction) -> list[Operation]:
    found = [
        Operation(one.opcode, one.name, one.op_name, Work.COLLECTIVE, collective=collective)
        for collective in collectives(module, scope, one)
    ]
    cost = {"bytes": _traffic(module, scope, one), "flops": flops(module, scope, one)}
    if one.cycles:
        found.append(
            Operation(one.opcode, one.name, one.op_name, Work.CORE, cycles=one.cycles, **cost)
        )
    elif one.opcode == "custom-call":
        found += _custom_call(scope, one, cost["bytes"])
    elif kernels := _fused_kernels(module, one):
        found += [
            kernel
            for call in kernels
            for kernel in _custom_call(module[one.calls], call, cost["bytes"])
        ]
    elif one.opcode in _COPIES:
        # The result stands before the last part of the type, except where it is the whole that a slice goes into.
        updated = one.opcode == "dynamic-update-slice-start"
        moved = scope[one.operands[1]].bytes if updated else one.shapes[-2].bytes
        copy = Operation(one.opcode, one.name, one.op_name, Work.COPY, bytes=moved)
        found.append(dataclasses.replace(copy, to_host=_HOST in one.type))
    elif one.opcode == "call-start":  # a SparseCore lays out anew what it reads and writes
        laid = module[one.calls]
        both = 2 * laid[laid.root].bytes
        found.append(Operation(one.opcode, one.name, one.op_name, Work.COPY, bytes=both))
    elif not found and not one.opcode.endswith("-done") and not _ends_collective(module, one):
        found.append(Operation(one.opcode, one.name, one.op_name, Work.UNPRICED, **cost))
    return found


def _fused_kernels(module: Module, one: Instruction) -> list[Instruction]:
    """Pallas calls that XLA has fused what goes in or comes out with."""
    if one.opcode != "fusion" or not one.calls:
        return []
    return [inner for inner in module[one.calls] if f'target="{_KERNEL}"' in inner.attributes]


def _ends_collective(module: Module, one: Instruction) -> bool:
    return one.opcode == "fusion" and any(_DONE in inner.attributes for inner in module[one.calls])


def _custom_call(scope: Computation, one: Instruction, moved: int) -> list[Operation]:
    target = one.attribute(r'custom_call_target="([^"]*)"')
    if target in _FREE_CALLS:
        return []
    if target != _KERNEL:
        return [Operation(target, one.name, one.op_name, Work.UNPRICED, bytes=moved)]
    own = r'"cost_estimate":\{[^}]*"%s":"(\d+)"'
    said = {key: int(one.attribute(own % key) or 0) for key in ("flops", "bytes_accessed")}
    fused = "_fused" if r"use_fused_bwd_kernel\": true" in one.attributes else ""
    kernel = Operation(
        opcode=one.opcode,
        name=re.sub(r"(\.\d+)+$", "", one.name) + fused,
        op_name=one.op_name,
        work=Work.KERNEL,
        bytes=max(moved, said["bytes_accessed"]),
        flops=said["flops"],
        operands=tuple(scope[name].shapes[0] for name in one.operands),
    )
    return [kernel]


def _traffic(module: Module, scope: Computation, one: Instruction) -> int:
    """Bytes read and written. Of an array that is only sliced, or updated in place, just that part."""
    if one.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * one.bytes
    if one.opcode == "dynamic-update-slice":
        return 2 * scope[one.operands[1]].bytes
    inner = module[one.calls] if one.opcode == "fusion" and one.calls else None
    if inner is None:
        return one.bytes + sum(scope[name].bytes for name in one.operands)
    read = sum(_read(inner, inner.parameters[number]) for number in range(len(one.operands)))
    root = inner[inner.root]
    results = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return read + sum(_written(inner, result) for result in results)


def _read(inner: Computation, name: str) -> int:
    total, whole = 0, inner[name].bytes
    for user in inner.users.get(name, []):
        if user.opcode == "bitcast":
            total += _read(inner, user.name)
        elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            total += user.bytes
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
            return whole
    return min(total, whole)


def _written(inner: Computation, result: Instruction) -> int:
    while result.opcode == "bitcast":
        result = inner[result.operands[0]]
    if result.opcode == "dynamic-update-slice":
        return inner[result.operands[1]].bytes
    return result.bytes
