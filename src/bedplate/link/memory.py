"""Where each planned tensor of a method lies: activations in arena 1, KV caches in arena 2.

KV has an arena of its own so that a runtime can give each session its KV and let all programs share one arena 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

ACTIVATIONS, KV = 1, 2
_ALIGNMENT = 64  # a cache line, and more than any vector load of XNNPACK wants
_ITEM_BYTES = {0: 1, 1: 1, 4: 8, 6: 4}  # uint8, int8, int64, float32


@dataclass(frozen=True, kw_only=True)
class Lifetime:
    """A tensor of `nbytes` that is written first at instruction `first` and read last at `last`."""

    index: int
    nbytes: int
    first: int
    last: int


def plan_memory(plan: Any, caches: Iterable[int]) -> None:
    """Give every planned tensor of an ExecutionPlan its arena and offset, in place.

    caches: indices of the KV values, in the order in which they are to lie.
    """
    kv_offset, cache_set = 0, set()
    for index in caches:
        cache_set.add(index)
        _place(plan.values[index].val, KV, kv_offset)
        kv_offset += _aligned(tensor_bytes(plan.values[index].val))
    size = 0
    placed: list[tuple[Lifetime, int]] = []
    # Largest first: the usual greedy (Pisarchyk & Lee 2020, "greedy by size"), at most some percent off the best.
    for life in sorted(_lifetimes(plan, cache_set), key=lambda life: (-life.nbytes, life.index)):
        offset = _first_gap(life, placed)
        placed.append((life, offset))
        _place(plan.values[life.index].val, ACTIVATIONS, offset)
        size = max(size, offset + _aligned(life.nbytes))
    plan.non_const_buffer_sizes = [0, size, kv_offset] if cache_set else [0, size]


def tensor_bytes(tensor: Any) -> int:
    """Bytes of a tensor at its upper bound."""
    return int(prod(tensor.sizes)) * _ITEM_BYTES[int(tensor.scalar_type)]


def _lifetimes(plan: Any, skip: set[int]) -> list[Lifetime]:
    instructions = plan.chains[0].instructions
    first: dict[int, int] = dict.fromkeys(plan.inputs, -1)
    last: dict[int, int] = {}
    for step, instruction in enumerate(instructions):
        for index in instruction.instr_args.args:
            first.setdefault(index, step)
            last[index] = step
    last.update(dict.fromkeys(plan.outputs, len(instructions)))
    return [
        Lifetime(index=i, nbytes=tensor_bytes(plan.values[i].val), first=first[i], last=last.get(i, first[i]))
        for i in first
        if i not in skip and getattr(plan.values[i].val, "allocation_info", None) is not None
    ]


def _first_gap(life: Lifetime, placed: list[tuple[Lifetime, int]]) -> int:
    overlapping = sorted(
        (offset, offset + _aligned(other.nbytes))
        for other, offset in placed
        if other.first <= life.last and life.first <= other.last
    )
    start = 0
    for low, high in overlapping:
        if low - start >= _aligned(life.nbytes):
            break
        start = max(start, high)
    return start


def _place(tensor: Any, arena: int, offset: int) -> None:
    info = tensor.allocation_info
    info.memory_id, info.memory_offset_low, info.memory_offset_high = arena, offset & 0xFFFFFFFF, offset >> 32


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
