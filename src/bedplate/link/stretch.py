"""A lowered program of two layers → the same program at any depth.

All layers are alike: a layer is the run [update_cache, update_cache, custom_sdpa, delegate] and differs from the
next in its KV caches, its norm weights, and the symbols in its delegate. So layer 0 of the short program is the
body that is repeated, and what follows it is the tail.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bedplate.compile.units import LayersDifferError, Lowered, placeholder
from bedplate.names import KEY_IN_PROGRAM

_ATTENTION = ("llama::update_cache", "llama::update_cache", "llama::custom_sdpa")
_LAYER = re.compile(r"^layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Joint:
    """How a layer's values hang together with the layer before: value that it takes → value that it gives on."""

    gives: Mapping[int, int]


def stretch(lowered: Lowered, depth: int) -> Lowered:
    """The lowered program at `depth` layers. Raises LayersDifferError if it is not of the expected form."""
    program = copy.copy(lowered.program)
    plan = copy.deepcopy(program.execution_plan[0])
    blobs = list(program.backend_delegate_data)
    head, body, tail = _split(plan)
    joint = _joint(plan, head, body, tail)
    of_placeholder = {placeholder(symbol): symbol for symbol in lowered.symbols}
    instructions = list(head)
    current = {taken: taken for taken in joint.gives}  # what the next layer takes, under layer 0's names
    for layer in range(depth - 1):
        mapping = _clone_values(plan, body, current, of_placeholder, layer)
        instructions += [_clone(plan, blobs, step, mapping, of_placeholder, layer) for step in body]
        current = {taken: mapping[given] for taken, given in joint.gives.items()}
    renamed = {given: current[taken] for taken, given in joint.gives.items()}
    mapping = _clone_values(plan, tail, renamed, of_placeholder, depth - 2)
    instructions += [_clone(plan, blobs, step, mapping, of_placeholder, depth - 2) for step in tail]
    plan.chains[0].instructions = instructions
    plan.outputs = [mapping[index] for index in plan.outputs]
    program.execution_plan, program.backend_delegate_data = [plan], blobs
    return _compact(replace(lowered, program=program, symbols=_stretched_symbols(lowered.symbols, depth)))


def _stretched_symbols(symbols: tuple[str, ...], depth: int) -> tuple[str, ...]:
    per_layer = [symbol for symbol in symbols if symbol.startswith("layers.0.")]
    rest = [symbol for symbol in symbols if _LAYER.match(symbol) is None]
    stretched = [_shift_name(symbol, layer) for layer in range(depth) for symbol in per_layer]
    return tuple(stretched + rest)


def _split(plan: Any) -> tuple[list[Any], list[Any], list[Any]]:
    instructions = plan.chains[0].instructions
    starts = [
        i
        for i in range(len(instructions) - 3)
        if tuple(_name(plan, step) for step in instructions[i : i + 4]) == (*_ATTENTION, "delegate")
    ]
    if len(starts) != 2 or starts[1] != starts[0] + 4:
        raise LayersDifferError(
            "the lowered layers are not runs of [update_cache, update_cache, custom_sdpa, delegate]"
        )
    first, second = starts
    return instructions[:first], instructions[first:second], instructions[second:]


def _joint(plan: Any, head: list[Any], body: list[Any], tail: list[Any]) -> Joint:
    # q, k, v: at the same places of the attention operators of both layers.
    made_by_head = _written(plan, head)
    made_by_body = _written(plan, body)
    gives = {
        taken: given
        for step, after in zip(body[:3], tail[:3], strict=True)
        for taken, given in zip(_args(step), _args(after), strict=True)
        if taken in made_by_head and given in made_by_body
    }
    # The residual stream: the one other activation of the head that the body's delegate takes, RoPE's slices aside.
    slices = {_args(step)[-1] for step in head if _name(plan, step) == "aten::slice_copy"}
    taken = [i for i in _args(body[3]) if i in made_by_head and i not in slices and _is_tensor(plan, i)]
    given = [i for i in _args(body[3]) if i in made_by_body - set(gives.values()) and i not in _args(body[2])]
    if len(gives) != 3 or len(taken) != 1 or len(given) != 1 or given[0] not in _args(tail[3]):
        raise LayersDifferError(
            "the lowered layers do not pass q, k, v and one residual stream on to the next"
        )
    return Joint(gives={**gives, taken[0]: given[0]})


def _written(plan: Any, steps: list[Any]) -> set[int]:
    # An operator's output is its last argument. A delegate writes what nobody wrote before and no file holds.
    seen: set[int] = set(plan.inputs)
    before = plan.chains[0].instructions.index(steps[0])
    for step in plan.chains[0].instructions[:before]:
        seen.update(_args(step))
    written: set[int] = set()
    for step in steps:
        new = [i for i in _args(step) if i not in seen and _is_planned(plan, i)]
        written.update(new if hasattr(step.instr_args, "delegate_index") else _args(step)[-1:])
        seen.update(_args(step))
    return written


def _clone_values(
    plan: Any, steps: list[Any], given: Mapping[int, int], of_placeholder: Mapping[str, str], shift: int
) -> dict[int, int]:
    """New values for all that belongs to the layer; `given` says what it takes from the layer before."""
    mapping = dict(given)
    own = _written(plan, steps)
    for index in dict.fromkeys(i for step in steps for i in _args(step)):
        if index in mapping:
            continue
        name = _tensor_name(plan, index)
        symbol = of_placeholder.get(name, name)
        if index not in own and _LAYER.match(symbol) is None:
            mapping[index] = index
            continue
        value = copy.deepcopy(plan.values[index])
        if _LAYER.match(symbol):
            shifted = _shift_name(symbol, shift)
            is_key = name in of_placeholder
            value.val.extra_tensor_info.fully_qualified_name = placeholder(shifted) if is_key else shifted
        mapping[index] = len(plan.values)
        plan.values.append(value)
    return mapping


def _clone(
    plan: Any, blobs: list[Any], step: Any, mapping: Mapping[int, int], names: Mapping[str, str], shift: int
) -> Any:
    step = copy.deepcopy(step)
    step.instr_args.args = [mapping[index] for index in _args(step)]
    if hasattr(step.instr_args, "delegate_index"):
        delegate = copy.deepcopy(plan.delegates[step.instr_args.delegate_index])
        blob = blobs[delegate.processed.index]
        delegate.processed.index = len(blobs)
        blobs.append(type(blob)(data=_shift_payload(blob.data, names, shift)))
        step.instr_args.delegate_index = len(plan.delegates)
        plan.delegates.append(delegate)
    return step


def _shift_payload(payload: bytes, names: Mapping[str, str], shift: int) -> bytes:
    def shifted(match: re.Match[bytes]) -> bytes:
        symbol = names.get(match[1].decode())
        if symbol is None or _LAYER.match(symbol) is None:
            return match[0]
        return match[0].replace(match[1], placeholder(_shift_name(symbol, shift)).encode())

    return KEY_IN_PROGRAM.sub(shifted, payload)


def _shift_name(name: str, shift: int) -> str:
    return _LAYER.sub(lambda match: f"layers.{int(match[1]) + shift}.", name)


def _compact(lowered: Lowered) -> Lowered:
    """Drop the values and delegates of the short program that nothing refers to any more."""
    program = lowered.program
    plan = program.execution_plan[0]
    steps = plan.chains[0].instructions
    used = sorted({i for step in steps for i in _args(step)} | set(plan.inputs) | set(plan.outputs))
    new_index = {old: new for new, old in enumerate(used)}
    plan.values = [plan.values[old] for old in used]
    plan.inputs = [new_index[i] for i in plan.inputs]
    plan.outputs = [new_index[i] for i in plan.outputs]
    delegates, blobs = [], []
    for step in steps:
        step.instr_args.args = [new_index[i] for i in _args(step)]
        if hasattr(step.instr_args, "delegate_index"):
            delegate = plan.delegates[step.instr_args.delegate_index]
            blobs.append(program.backend_delegate_data[delegate.processed.index])
            delegate.processed.index = len(blobs) - 1
            delegates.append(delegate)
            step.instr_args.delegate_index = len(delegates) - 1
    plan.delegates, program.backend_delegate_data = delegates, blobs
    return lowered


def _name(plan: Any, step: Any) -> str:
    if hasattr(step.instr_args, "delegate_index"):
        return "delegate"
    return str(plan.operators[step.instr_args.op_index].name)


def _args(step: Any) -> list[int]:
    return step.instr_args.args  # type: ignore[no-any-return]


def _is_tensor(plan: Any, index: int) -> bool:
    return hasattr(plan.values[index].val, "sizes")


def _is_planned(plan: Any, index: int) -> bool:
    return getattr(plan.values[index].val, "allocation_info", None) is not None


def _tensor_name(plan: Any, index: int) -> str:
    extra = getattr(plan.values[index].val, "extra_tensor_info", None)
    return (extra.fully_qualified_name or "") if extra is not None else ""
