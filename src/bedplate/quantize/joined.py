"""Linears that one operator computes together, and the constants that it takes: made of the constants of each.

q, k and v take one input, so the rows of their weights stand in one matrix (`….q_proj+k_proj+v_proj.weight`). Their
LoRA branches leave one narrow value each, side by side in one row, so the matrices that take these lie along a
diagonal (`….q_proj&k_proj&v_proj.lora_b.weight`), with zeros beside them. gate and up stay apart: to take their
wide results apart again costs a long prompt more than one product less gains.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bedplate.constants import Constant
from bedplate.quantize.packing import CODES, SCALES

Way = Literal["+", "&"]
ROWS: Way = "+"
DIAGONAL: Way = "&"

_LINEAR = re.compile(r"(?<=\.)[qkv]_proj(?=\.)")
_JOINED = re.compile(r"(?<=\.)[qkv]_proj(?:([+&])[qkv]_proj)+(?=\.)")


def kin(name: str) -> str | None:
    """What the names of constants that can be joined have in common; None: this one cannot be."""
    return _LINEAR.sub("*", name) if len(_LINEAR.findall(name)) == 1 else None


def joined_name(names: Sequence[str], way: Way) -> str:
    """The name of what is joined of constants that are kin: `a.q_proj.weight`, `a.k_proj.weight` …"""
    linears = way.join(_LINEAR.findall(name)[0] for name in names)
    return _LINEAR.sub(linears, names[0])


def parts_of(name: str) -> tuple[str, ...]:
    """The names of the constants that this one is joined of; its own name if it is not joined."""
    match = _JOINED.search(name)
    if match is None:
        return (name,)
    return tuple(name[: match.start()] + one + name[match.end() :] for one in match[0].split(match[1]))


def join(name: str, parts: Sequence[Constant]) -> Constant:
    """One constant of those named by `parts_of(name)`, in this order; a constant like any other: its key names its
    own bytes and scales, whatever it was joined of.

    Rows: [a, n] and [b, n] → [a + b, n]. Diagonal: [a, m] and [b, n] → [a + b, m + n], of 8 bits or float32; scales
    of rows and biases are one below the other in both.
    """
    rows = [part.data.reshape(part.shape[0], -1) for part in parts]
    columns = sum(part.shape[-1] for part in parts) if len(parts[0].shape) == 2 else 1
    match = _JOINED.search(name)
    assert match is not None, f"{name} is not joined"
    on_diagonal = match[1] == DIAGONAL and len(parts[0].shape) == 2 and not name.endswith(SCALES)
    data = _diagonal(rows) if on_diagonal else np.concatenate(rows)
    first = parts[0]
    shape = (sum(part.shape[0] for part in parts), *((columns,) if on_diagonal else first.shape[1:]))
    assert all(part.layout == first.layout for part in parts), f"{name}: parts of different layouts"
    scales = [part.scales for part in parts if part.scales is not None]
    joined_scales = join(name.removesuffix(CODES) + SCALES, scales) if scales else None
    return Constant.of(name, first.dtype, shape, first.layout, data.reshape(-1), joined_scales)


def _diagonal(blocks: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    whole = np.zeros((sum(len(b) for b in blocks), sum(b.shape[1] for b in blocks)), np.uint8)
    row = column = 0
    for block in blocks:
        whole[row : row + len(block), column : column + block.shape[1]] = block
        row, column = row + len(block), column + block.shape[1]
    return whole


def joined(constants: Iterable[Constant], wanted: Collection[str]) -> Iterator[Constant]:
    """`constants`, but joined as the names in `wanted` say. Parts are held until all of them came."""
    goes_into = {part: name for name in wanted for part in parts_of(name) if part != name}
    held: dict[str, dict[str, Constant]] = {}
    for constant in constants:
        name = goes_into.get(constant.name)
        if name is None:
            yield constant
            continue
        waiting = held.setdefault(name, {})
        waiting[constant.name] = constant
        if len(waiting) == len(parts_of(name)):
            yield join(name, [waiting[part] for part in parts_of(name)])
            del held[name]
    assert not held, f"parts are missing of {sorted(held)[:3]}"
