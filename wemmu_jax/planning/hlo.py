"""Optimised HLO text as data: `compiled.as_text()` -> computations of instructions, nothing interpreted yet."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

# Bytes of one value. Types that XLA packs below a byte count as a byte, like tokens that hold nothing as nothing.
_BYTES = {"pred": 1, "token": 0, "s2": 1, "u2": 1, "s4": 1, "u4": 1, "c64": 8, "c128": 16}
_SHAPE = re.compile(r"\b(token|pred|bf16|c64|c128|[suf]\d+\w*)\[([\d,<=]*)\]")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = ")
_HEADER = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_END = re.compile(r'\}(, execution_thread="\w+")?')


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array's type and sides."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Values."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes without the padding of tiles."""
        if self.dtype in _BYTES:
            return self.size * _BYTES[self.dtype]
        bits = 16 if self.dtype == "bf16" else int(re.match(r"\D+(\d+)", self.dtype)[1])
        return self.size * max(bits // 8, 1)


@functools.lru_cache(maxsize=65536)
def shapes(text: str) -> tuple[Shape, ...]:
    """Every array in the text of a type; a tuple gives those of its parts in order."""
    return tuple(
        Shape(dtype, tuple(int(side.strip("<=")) for side in sides.split(",") if side))
        for dtype, sides in _SHAPE.findall(text)
    )


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name, opcode: as in the text.
      type: text of its result's type.
      operands: names of instructions of the same computation.
      literal: what stands in the parentheses, for constants and parameters.
      attributes: the rest of the line.
    """

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    literal: str
    attributes: str

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Arrays of the result."""
        return shapes(self.type)

    @property
    def bytes(self) -> int:
        """Of the result."""
        return sum(shape.bytes for shape in self.shapes)

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern that the attributes match somewhere."""
        match = re.search(pattern, self.attributes)
        return match and match[1]

    @property
    def cycles(self) -> int | None:
        """XLA's estimate, of one execution on one core pair; None where it gives none."""
        found = self.attribute(r'"estimated_cycles":"(-?\d+)"')
        return int(found) if found and int(found) > 0 else None

    @property
    def op_name(self) -> str:
        """Where in the model it comes from; empty where XLA has lost it."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    @property
    def calls(self) -> str | None:
        """The computation of a fusion, call or asynchronous wrapper."""
        return self.attribute(r"(?:calls|to_apply)=%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run."""

    name: str
    instructions: Mapping[str, Instruction]
    root: str

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        """Number -> name."""
        return {int(one.literal): one.name for one in self if one.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Name -> the instructions that read it."""
        users: dict[str, list[Instruction]] = {}
        for one in self:
            for operand in one.operands:
                users.setdefault(operand, []).append(one)
        return users


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations by name, and which of them is run."""

    computations: Mapping[str, Computation]
    entry: str

    def __getitem__(self, name: str) -> Computation:
        return self.computations[name]


def parse(text: str) -> Module:
    """Reads the text of an optimised program.

    Raises:
      ValueError: it is none, or a line of it has another form than XLA's printer gives.
    """
    computations, entry, name, lines = {}, None, None, []
    for line in text.splitlines():
        if name is None:
            if header := _HEADER.match(line):
                name, lines = header[2], []
                entry = name if header[1] else entry
        elif _END.fullmatch(line):
            computations[name] = _computation(name, lines)
            name = None
        elif _INSTRUCTION.match(line):
            lines.append(line)
        elif lines:
            lines[-1] += line  # a kernel's metadata has lines of its own
    if entry is None:
        raise ValueError("expected the text of an optimised HLO program, found no ENTRY")
    return Module(computations, entry)


def _computation(name: str, lines: list[str]) -> Computation:
    found, root = {}, ""
    for line in lines:
        start = _INSTRUCTION.match(line)
        found[start[2]] = _instruction(start[2], line[start.end() :])
        root = start[2] if start[1] else root
    return Computation(name, found, root)


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opening = rest.index("(", end)
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    opcode = rest[end:opening].strip()
    return Instruction(name, opcode, rest[:end], operands, inside, rest[closing + 1 :])


def _closing(text: str, opening: int) -> int:
    """Place of the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"no closing parenthesis: {text[:200]}")
