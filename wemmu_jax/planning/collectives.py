"""Collectives: which an instruction starts, over how many bytes, and who takes part."""

import dataclasses
import functools
import math
import re

import numpy as np

from wemmu_jax.planning.hlo import Computation, Instruction, Module

# Up to the next attribute; the order of a mesh's devices is still a part of this one.
_TAKE_PART = r"(?:replica_groups|source_target_pairs)=(.*?)(?:, (?!device_ids=)\w+=|$)"
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective.

    Attributes:
      kind: one of KINDS.
      array: type and sides of what is gathered to, reduced or moved; the first of several.
      bytes: of all of it.
      groups: XLA's text of who takes part.
    """

    kind: str
    array: str
    bytes: int
    groups: str

    @property
    def group(self) -> tuple[int, ...]:
        """Who takes part, by place in the mesh: the first group, of a permutation the first pair."""
        return first_group(self.groups)

    @property
    def pairs(self) -> np.ndarray:
        """int[N, 2], source and target of each part of a permutation, by place in the mesh."""
        return listed_groups(self.groups)


def collectives(
    module: Module, computation: Computation, instruction: Instruction, *, fused: bool = False
) -> list[Collective]:
    """What `instruction` starts: itself, or what is fused or wrapped in the computation that it calls. `fused`: whether
    `computation` is a fusion's.

    Raises:
      ValueError: it is a collective of another kind.
    """
    kind = instruction.opcode.removesuffix("-start")
    if kind in KINDS:
        return [_collective(kind, computation, instruction, fused=fused)]
    if instruction.opcode not in ("fusion", "async-start") or not instruction.calls:
        if not instruction.opcode.endswith("-done") and instruction.attribute(_TAKE_PART):
            raise ValueError(
                f"{instruction.opcode} {instruction.name}: nothing is known of what such a collective takes"
            )
        return []
    inner = module[instruction.calls]
    # A collective that runs beside several fusions stands in each of them, and only in one with its start.
    starts = any('custom_call_target="AsyncCollectiveStart"' in one.attributes for one in inner)
    return [
        found
        for one in inner
        if starts or "chain_id=" not in one.attributes
        for found in collectives(module, inner, one, fused=instruction.opcode == "fusion")
    ]


def _collective(
    kind: str, computation: Computation, instruction: Instruction, *, fused: bool
) -> Collective:
    groups = instruction.attribute(_TAKE_PART)
    operands = [computation[name] for name in instruction.operands]
    moved = sum(operand.bytes for operand in operands)
    first = operands[0].shapes[0]
    dims = list(first.dims)
    if kind == "all-gather":
        size = len(first_group(groups))
        moved *= size
        dims[int(instruction.attribute(r"dimensions=\{(\d+)\}"))] *= size
    elif kind == "all-reduce":
        # XLA fuses an all-reduce with the slice that each device keeps of it, which moves half as much.
        users = computation.users.get(instruction.name, [])
        if fused and users and all(user.opcode == "dynamic-slice" for user in users):
            kind = "reduce-scatter"
    return Collective(kind, f"{first.dtype}{dims}".replace(" ", ""), moved, groups)


@functools.lru_cache(maxsize=1024)
def first_group(text: str) -> tuple[int, ...]:
    """The first group of `{{0,1},{2,3}}`, of `[2,4]<=[4,2]T(1,0)` or of `mesh['a'=2,'b'=4] {'b'}`.

    Raises:
      ValueError: the text has another form.
    """
    if listed := re.match(r"\{\{([\d,]+)\}", text):
        return _numbers(listed[1])
    if tile := re.match(r"\[([\d,]+)\](<=.*)", text):
        return tuple(_order(tile[2]).reshape(_numbers(tile[1])[0], -1)[0].tolist())
    mesh = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((.*)\))? \{([^}:]*)\}", text)
    if mesh is None:
        raise ValueError(f"cannot read who takes part in a collective: {text[:200]}")
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
    total = math.prod(sizes.values())
    order = np.arange(total)
    if mesh[2] is not None:
        # `[8]<=[4,2]T(1,0)`, or without the first part where that is the mesh's own.
        order = _order("<=" + mesh[2].rpartition("<=")[2])
    chosen = [list(sizes).index(name) for name in re.findall(r"'([^']+)'", mesh[3])]
    places = np.moveaxis(order.reshape(list(sizes.values())), chosen, range(len(chosen)))
    size = math.prod(places.shape[: len(chosen)])
    return tuple(places.reshape(size, -1)[:, 0].tolist())


@functools.lru_cache(maxsize=1024)
def listed_groups(text: str) -> np.ndarray:
    """All groups of `{{0,1},{2,3}}`.

    Raises:
      ValueError: the text has another form.
    """
    if not re.fullmatch(r"\{\{[\d,]+\}(,\{[\d,]+\})*\}", text):
        raise ValueError(f"cannot read who takes part in a collective: {text[:200]}")
    return np.array([_numbers(group) for group in re.findall(r"[\d,]+(?=\})", text)])


def _order(text: str) -> np.ndarray:
    """All devices in the order of `<=[4,2]T(1,0)`."""
    tile = re.match(r"<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if tile is None:
        raise ValueError(f"cannot read the order of the devices: {text[:200]}")
    sizes = _numbers(tile[1])
    places = np.arange(math.prod(sizes)).reshape(sizes)
    return (places.transpose(_numbers(tile[2])) if tile[2] else places).ravel()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))
