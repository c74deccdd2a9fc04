"""Linears that one operator computes together, and the constants that it takes: made of the constants of each.

q, k and v take one input, so the rows of their weights stand in one matrix (`….q_proj+k_proj+v_proj.weight`). Their
LoRA branches leave one narrow value each, side by side in one row, so the matrices that take these lie along a
diagonal (`….q_proj&k_proj&v_proj.lora_b.weight`), with zeros beside them. gate and up stay apart: to take their
wide results apart again costs a long prompt more than one product less gains.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bedplate.constants import Constant
from bedplate.names import CODES, DIAGONAL, ROWS, SCALES, joined_name, kin, parts_of, way_of
from bedplate.quantize.recipe import Scheme


def joined_names(schemes: Mapping[str, Scheme], with_bias: Collection[str] = ()) -> frozenset[str]:
    """The names of what is joined of linears, given by module path in the order of the model.

    with_bias: those that have one. Kin of one scheme are joined; `compile.join_linears` joins the same, and linking a
    program shows it.
    """
    alike: dict[object, list[str]] = {}
    for path, scheme in schemes.items():
        if (family := kin(f"{path}.weight")) is not None:
            alike.setdefault((family, scheme.bits, scheme.group_size, scheme.weight_only), []).append(path)
    names: set[str] = set()
    for paths in alike.values():
        if len(paths) < 2:
            continue
        way = DIAGONAL if paths[0].endswith(".lora_b") else ROWS
        parts = ("",) if schemes[paths[0]].bits is None else (CODES, SCALES)
        names |= {joined_name([f"{path}.weight{part}" for path in paths], way) for part in parts}
        if paths[0] in with_bias:
            names.add(joined_name([f"{path}.bias" for path in paths], way))
    return frozenset(names)


def join(name: str, parts: Sequence[Constant]) -> Constant:
    """One constant of those named by `parts_of(name)`, in this order; a constant like any other: its key names its
    own bytes and scales, whatever it was joined of.

    Rows: [a, n] and [b, n] → [a + b, n]. Diagonal: [a, m] and [b, n] → [a + b, m + n], of 8 bits or float32; scales
    of rows and biases are one below the other in both.
    """
    rows = [part.data.reshape(part.shape[0], -1) for part in parts]
    columns = sum(part.shape[-1] for part in parts) if len(parts[0].shape) == 2 else 1
    on_diagonal = way_of(name) == DIAGONAL and len(parts[0].shape) == 2 and not name.endswith(SCALES)
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
