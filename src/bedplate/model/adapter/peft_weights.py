"""The tensors of a PEFT file, sorted by what they are; with what its config says of them → A and B of each linear."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from bedplate.errors import AdapterError, UnsupportedError
from bedplate.model.adapter.peft_config import MERGE
from bedplate.model.adapter.peft_keys import (
    Copy,
    Half,
    Key,
    NotTaken,
    Rows,
    Value,
    meaning_of,
    parse_key,
)
from bedplate.model.adapter.peft_targets import Target
from bedplate.model.adapter.types import AGAIN, LoraPair, Place, module_of

Tensors = Mapping[str, NDArray[np.float32]]
Halves = dict[str, NDArray[np.float32]]
_K = TypeVar("_K")
_T = TypeVar("_T")


@dataclass(kw_only=True)
class Sorted:
    """The tensors of a file.

    halves: `A` and `B` of each linear, and `magnitude` and `bias` where they are.
    values: of the base model's parameters, and PEFT's modules that each is in, by name in the model's files.
    copies: of the embedding and the head, by module and by what they are in.
    rows: of tokens, by module.
    names: of values and rows in the file, by their keys here.
    """

    halves: dict[Place, Halves] = field(default_factory=dict)
    values: dict[str, tuple[str, NDArray[np.float32]]] = field(default_factory=dict)
    copies: dict[tuple[str, str], NDArray[np.float32]] = field(default_factory=dict)
    rows: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


def sort_tensors(tensors: Tensors, where: Path, parse: Callable[[str], Key] = parse_key) -> Sorted:
    """Sort the tensors of a file. parse: what a tensor is, by its name.

    Raises UnsupportedError for tensors of what is not taken, AdapterError for one half alone.
    """
    parsed = {name: parse(name) for name in sorted(tensors)}
    refuse({name: found for name, found in parsed.items() if isinstance(found, NotTaken)}, where)
    found = Sorted()
    for name, key in parsed.items():
        value = tensors[name]
        if isinstance(key, Half):
            there = _put(found.halves.setdefault((key.layer, key.linear), {}), key.half, value)
        elif isinstance(key, Value):
            there = _put(found.values, key.name, (key.inside, value))
            found.names[key.name] = name
        elif isinstance(key, Copy):
            there = _put(found.copies, (key.module, key.inside), value)
        elif isinstance(key, Rows):
            there = _put(found.rows, key.module, value)
            found.names[key.module] = name
        else:
            continue
        if there:
            raise AdapterError(f"tensor {name} is there twice, under two names", where=where, hint=AGAIN)
    for place, halves in found.halves.items():
        for half in "AB":
            if half not in halves:
                raise AdapterError(f"lora_{half} of {module_of(place)} is missing", where=where, hint=AGAIN)
    return found


def refuse(not_taken: Mapping[str, NotTaken], where: Path) -> None:
    """UnsupportedError, if there is anything. It names the tensor that says most about the adapter."""
    if not_taken:
        name, found = min(not_taken.items(), key=lambda pair: pair[1].weight)
        raise UnsupportedError(
            f"tensor {name} is {found.meaning}, which is not supported", where=where, hint=MERGE
        )


def pair_up(tensors: Tensors, where: Path, parse: Callable[[str], Key]) -> dict[Place, Halves]:
    """The halves of each linear, of a format that has nothing else. Raises as `sort_tensors`."""

    def only_halves(name: str) -> Key:
        found = parse(name)
        return meaning_of(name) if isinstance(found, Value | Copy | Rows) else found

    return sort_tensors(tensors, where, only_halves).halves


def _put(into: dict[_K, _T], key: _K, value: _T) -> bool:
    """True: something is there already."""
    if key in into:
        return True
    into[key] = value
    return False


def make_pair(place: Place, halves: Halves, target: Target, blocks: int, where: Path) -> LoraPair:
    """Check the shapes against the rank that the config gives, and lay out diagonal blocks. Raises AdapterError."""
    a, b = halves["A"], halves["B"]
    name = module_of(place)
    for half, value in (("A", a), ("B", b)):
        if value.ndim != 2:
            raise AdapterError(
                f"lora_{half} of {name} has shape {value.shape}, but a matrix has two dimensions",
                where=where,
                hint=AGAIN,
            )
    rows_of_a, columns_of_b = a.shape[0], b.shape[1] * (blocks if target.blocks_of == "B" else 1)
    for half, value, rank in (("A", a, rows_of_a), ("B", b, columns_of_b)):
        if rank != target.rank:
            raise AdapterError(
                f"lora_{half} of {name} has shape {value.shape}, "
                f"but the config gives it rank {target.rank} ({target.rank_from})",
                where=where,
                hint="use the config and the weights of one adapter",
            )
    if target.blocks_of == "A":
        a = _block_diagonal(a, blocks, f"lora_A of {name}", where)
    elif target.blocks_of == "B":
        b = _block_diagonal(b, blocks, f"lora_B of {name}", where)
    magnitude, bias = halves.get("magnitude"), halves.get("bias")
    return LoraPair(a=a, b=b, scale=target.scale, magnitude=magnitude, bias=bias)


def _block_diagonal(stacked: NDArray[np.float32], blocks: int, name: str, where: Path) -> NDArray[np.float32]:
    """[rows, columns] of blocks one below the other → [rows, columns · blocks] with each in its place."""
    rows, columns = stacked.shape
    if rows % blocks:
        raise AdapterError(
            f"{name} has {rows} rows, which is not a multiple of its {blocks} blocks (use_bdlora)",
            where=where,
            hint=AGAIN,
        )
    full = np.zeros((blocks, rows // blocks, blocks, columns), np.float32)
    full[np.arange(blocks), :, np.arange(blocks)] = stacked.reshape(blocks, rows // blocks, columns)
    return full.reshape(rows, columns * blocks)
