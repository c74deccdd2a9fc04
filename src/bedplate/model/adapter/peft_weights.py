"""The tensors of a PEFT file and what its config says of them → A and B of each linear."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bedplate.errors import AdapterError, UnsupportedError
from bedplate.model.adapter.peft_config import MERGE
from bedplate.model.adapter.peft_keys import Half, NotTaken, parse_key
from bedplate.model.adapter.peft_targets import Target
from bedplate.model.adapter.types import AGAIN, LoraPair, Place

Tensors = Mapping[str, NDArray[np.float32]]
Halves = dict[str, NDArray[np.float32]]


def pair_up(
    tensors: Tensors, where: Path, parse: Callable[[str], Half | NotTaken | None] = parse_key
) -> dict[Place, Halves]:
    """`A` and `B` of each linear. parse: what a tensor is, by its name.

    Raises UnsupportedError for tensors of anything else, AdapterError for one alone.
    """
    parsed = {name: parse(name) for name in sorted(tensors)}
    not_taken = [(found, name) for name, found in parsed.items() if isinstance(found, NotTaken)]
    if not_taken:
        found, name = min(not_taken, key=lambda pair: pair[0].weight)
        raise UnsupportedError(
            f"tensor {name} is {found.meaning}, which is not supported", where=where, hint=MERGE
        )
    halves: dict[Place, Halves] = {}
    for name, half in parsed.items():
        if isinstance(half, Half):
            of_linear = halves.setdefault((half.layer, half.linear), {})
            if half.half in of_linear:
                raise AdapterError(f"tensor {name} is there twice, under two names", where=where, hint=AGAIN)
            of_linear[half.half] = tensors[name]
    for (layer, linear), of_linear in halves.items():
        for half_name in "AB":
            if half_name not in of_linear:
                raise AdapterError(
                    f"lora_{half_name} of layers.{layer}.{linear} is missing", where=where, hint=AGAIN
                )
    return halves


def make_pair(place: Place, halves: Halves, target: Target, blocks: int, where: Path) -> LoraPair:
    """Check the shapes against the rank that the config gives, and lay out diagonal blocks. Raises AdapterError."""
    a, b = halves["A"], halves["B"]
    name = f"layers.{place[0]}.{place[1]}"
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
    return LoraPair(a=a, b=b, scale=target.scale)


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
