"""How often a loop runs: read from its condition, its start and its step, which XLA's text says in three places."""

import dataclasses
import math

from wemmu_jax.planning.hlo import Computation, Instruction, Module

_SAME = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "opt-barrier")
_TURNED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}
_UP, _DOWN = ("LT", "LE", "NE"), ("GT", "GE", "NE")


@dataclasses.dataclass(frozen=True)
class _Value:
    """A whole number: `offset`, on top of carried value number `carried` unless that is None."""

    carried: int | None
    offset: int


def trip_count(module: Module, caller: Computation, loop: Instruction) -> int:
    """Passes of a `while` instruction of `caller`.

    Raises:
      ValueError: the loop does not count from a constant to a constant; a prediction would leave something out.
    """
    condition = module[loop.attribute(r"condition=%([\w.\-]+)")]
    body = module[loop.attribute(r"body=%([\w.\-]+)")]
    try:
        direction, *sides = _comparison(module, condition)
        steps = [_step(module, body, side) for side in sides]
        if steps[0] == 0:  # the counter stands on the right
            sides, steps, direction = sides[::-1], steps[::-1], _TURNED.get(direction)
        start, limit = (_start(module, caller, loop, side) for side in sides)
        step = steps[0]
        if steps[1] or not step or direction not in (_UP if step > 0 else _DOWN):
            raise ValueError(f"steps {steps}, direction {direction}")
        limit += direction in ("LE", "GE") and (1 if step > 0 else -1)
        return max(0, math.ceil((limit - start) / step))
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"cannot read how often loop {loop.name} ({loop.op_name}) runs: {error}"
        ) from error


def _comparison(module: Module, condition: Computation) -> tuple[str, _Value, _Value]:
    root, scope, inputs = condition[condition.root], condition, {}
    while root.opcode == "fusion":
        inner = module[root.calls]
        inputs = {
            number: _value(module, scope, root.operands[number], inputs)
            for number in inner.parameters
        }
        root, scope = inner[inner.root], inner
    if root.opcode != "compare":
        raise ValueError(f"its condition ends in {root.opcode}")
    left, right = (_value(module, scope, name, inputs) for name in root.operands)
    return root.attribute(r"direction=(\w+)"), left, right


def _value(module: Module, scope: Computation, name: str, inputs: dict[int, _Value]) -> _Value:
    one = scope[name]
    match one.opcode:
        case "constant":
            return _Value(None, int(one.literal))
        case "get-tuple-element":
            source, index = scope[one.operands[0]], int(one.attribute(r"index=(\d+)"))
            if source.opcode == "parameter":
                return _Value(index, 0)
            if source.opcode == "tuple":
                return _value(module, scope, source.operands[index], inputs)
        case "parameter":
            return inputs[int(one.literal)]
        case "add" | "subtract":
            left, right = (_value(module, scope, operand, inputs) for operand in one.operands)
            if right.carried is not None and one.opcode == "add":
                left, right = right, left
            if right.carried is None:
                sign = 1 if one.opcode == "add" else -1
                return _Value(left.carried, left.offset + sign * right.offset)
        case "fusion":
            inner = module[one.calls]
            bound = {
                number: _value(module, scope, one.operands[number], inputs)
                for number in inner.parameters
            }
            return _value(module, inner, inner.root, bound)
        case same if same in _SAME:
            return _value(module, scope, one.operands[0], inputs)
    raise ValueError(f"{one.name} = {one.opcode} is no count")


def _step(module: Module, body: Computation, value: _Value) -> int:
    """What a pass adds to a carried value; 0 for a constant."""
    if value.carried is None:
        return 0
    after = _value(module, body, _carried(body, body.root)[value.carried], {})
    if after.carried != value.carried:
        raise ValueError(f"carried value {value.carried} does not count")
    return after.offset


def _start(module: Module, caller: Computation, loop: Instruction, value: _Value) -> int:
    if value.carried is None:
        return value.offset
    before = _value(module, caller, _carried(caller, loop.operands[0])[value.carried], {})
    if before.carried is not None:
        raise ValueError(f"carried value {value.carried} starts at no constant")
    return before.offset + value.offset


def _carried(scope: Computation, name: str) -> tuple[str, ...]:
    """Names of the values that a loop goes in or out of a pass with."""
    one = scope[name]
    while one.opcode in _SAME:
        one = scope[one.operands[0]]
    if one.opcode != "tuple":
        raise ValueError(f"{one.name} = {one.opcode} is no tuple")
    return one.operands
