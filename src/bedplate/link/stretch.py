"""A lowered program of a few layers → the same program at any depth.

Layers differ in their KV caches, their norm weights and the symbols in their delegates; layers of different kinds
differ also in which tables and masks they take. In a program, a layer is the run [delegate, update_cache,
update_cache, custom_sdpa], and its delegate ends the layer before, too. So a run takes two values, the residual stream
and what attention gave, and it gives two. It is put in the place of every layer that is like it. The ends stay.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from bedplate.compile.units import LayersDifferError, Lowered, placeholder
from bedplate.names import KEY_IN_PROGRAM

_ATTENTION = ("llama::update_cache", "llama::update_cache", "llama::custom_sdpa")
_LAYER = re.compile(r"^layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The values that pass from a layer to the next: the residual stream, and what attention gave."""

    residual: int
    attended: int

    def renamed(self, other: Stream) -> dict[int, int]:
        return {self.residual: other.residual, self.attended: other.attended}


@dataclass(frozen=True, kw_only=True)
class Run:
    """Instructions of a layer of the short program, and the stream that they take."""

    layer: int
    steps: list[Any]
    takes: Stream


def stretch(lowered: Lowered, like: Sequence[int]) -> Lowered:
    """The lowered program with a layer for each of `like`, which is the number of the short program's layer that it is
    like. The first is 0, and no other. Raises LayersDifferError if the program is not of the expected form.
    """
    program = copy.copy(lowered.program)
    plan = copy.deepcopy(program.execution_plan[0])
    blobs = list(program.backend_delegate_data)
    head, runs, tail = _split(plan)
    of_placeholder = {placeholder(symbol): symbol for symbol in lowered.symbols}
    instructions, current = list(head), (runs[0] if runs else tail).takes
    for layer, unit in enumerate(like[1:], start=1):
        run = runs[unit - 1]
        mapping = _clone_values(plan, run, current, of_placeholder, layer)
        instructions += [
            _clone(plan, blobs, step, mapping, of_placeholder, layer - unit) for step in run.steps
        ]
        gives = (runs[unit] if unit < len(runs) else tail).takes
        current = Stream(residual=mapping[gives.residual], attended=mapping[gives.attended])
    mapping = _clone_values(plan, tail, current, of_placeholder, len(like))
    shift = len(like) - tail.layer
    instructions += [_clone(plan, blobs, step, mapping, of_placeholder, shift) for step in tail.steps]
    plan.chains[0].instructions = instructions
    plan.outputs = [mapping[index] for index in plan.outputs]
    program.execution_plan, program.backend_delegate_data = [plan], blobs
    return _compact(replace(lowered, program=program, symbols=_stretched_symbols(lowered.symbols, len(like))))


def _stretched_symbols(symbols: tuple[str, ...], depth: int) -> tuple[str, ...]:
    per_layer = [symbol for symbol in symbols if symbol.startswith("layers.0.")]
    rest = [symbol for symbol in symbols if _LAYER.match(symbol) is None]
    stretched = [_shift_name(symbol, layer) for layer in range(depth) for symbol in per_layer]
    return tuple(stretched + rest)


def _split(plan: Any) -> tuple[list[Any], list[Run], Run]:
    """What comes before the second layer; the runs of all others; and what comes after them, as of one more layer."""
    steps = plan.chains[0].instructions
    names = [_name(plan, step) for step in steps]
    expected = (*_ATTENTION, "delegate")
    # Where the delegates are that attention is before.
    starts = [i for i in range(4, len(steps)) if tuple(names[i - 3 : i + 1]) == expected]
    if not starts or any(after - before != len(expected) for before, after in pairwise(starts)):
        raise LayersDifferError(
            "the lowered layers are not runs of [delegate, update_cache, update_cache, custom_sdpa]"
        )
    head = steps[: starts[0]]
    runs, ends = [], [*starts[1:], len(steps)]
    written, before = _written(plan, head) - _sliced(plan, head), head
    for layer, (start, end) in enumerate(zip(starts, ends, strict=True), start=1):
        runs.append(
            Run(layer=layer, steps=steps[start:end], takes=_stream(plan, before, steps[start], written))
        )
        before = steps[start:end]
        written = _written(plan, before)
    *layers, tail = runs
    return head, layers, tail


def _stream(plan: Any, before: list[Any], delegate: Any, written: set[int]) -> Stream:
    """What a delegate takes of the layer before. written: by that layer, RoPE's slices and masks aside."""
    attended = _args(before[-1])[-1]
    taken = [
        index for index in dict.fromkeys(_args(delegate)) if index in written and _is_tensor(plan, index)
    ]
    rest = [index for index in taken if index != attended]
    if attended not in taken or len(rest) != 1:
        raise LayersDifferError("the lowered layers do not pass one residual stream on to the next")
    return Stream(residual=rest[0], attended=attended)


def _sliced(plan: Any, steps: list[Any]) -> set[int]:
    return {_args(step)[-1] for step in steps if _name(plan, step) == "aten::slice_copy"}


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
    plan: Any, run: Run, given: Stream, of_placeholder: Mapping[str, str], layer: int
) -> dict[int, int]:
    """New values for all that belongs to the run, in the place of `layer`, to which `given` is given."""
    mapping, shift = run.takes.renamed(given), layer - run.layer
    own = _written(plan, run.steps)
    for index in dict.fromkeys(i for step in run.steps for i in _args(step)):
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
