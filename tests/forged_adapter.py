"""Adapters of a bundle that are written constant by constant, whatever an adapter may hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bedplate.api import Bundle
from bedplate.bundle.facts import AdapterFacts
from bedplate.bundle.manifest import ADAPTER_WEIGHTS, AdapterInfo
from bedplate.bundle.ptd import write_ptd
from bedplate.constants import Constant
from bedplate.quantize.options import AdapterScheme
from bedplate.quantize.rows import pack_branch

Tensors = Mapping[str, NDArray[Any]]


def constants_of(tensors: Tensors, scheme: AdapterScheme) -> list[Constant]:
    """float32, and int64 ids. scheme: of the halves of branches."""
    packed: list[Constant] = []
    for name, value in tensors.items():
        if ".lora_" in name:
            packed += pack_branch(name, value, scheme)
            continue
        data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        packed.append(Constant.of(name, value.dtype.name, value.shape, "dense", data))
    return packed


def forge_adapter(
    bundle: Bundle,
    name: str,
    tensors: Tensors,
    *,
    vocab: int,
    layers: Sequence[int] | None = None,
    invocation: Sequence[int] | None = None,
    scheme: AdapterScheme = "none",
) -> None:
    """Add an adapter that holds these tensors, under the names that they have in bundles."""
    ranks = {
        key.split(".", 2)[2].removesuffix(".lora_a.weight"): len(value)
        for key, value in tensors.items()
        if key.startswith("layers.") and key.endswith(".lora_a.weight")
    }

    def write(folder: Path) -> AdapterFacts:
        info = AdapterInfo(
            name=name,
            foundation=bundle.foundation_sha256,
            rank=max(ranks.values(), default=0),
            ranks=ranks,
            alpha=1.0,
            dtype="float32" if scheme == "none" else scheme,
            layers=None if layers is None else tuple(layers),
            vocab=vocab,
            invocation=None if invocation is None else tuple(invocation),
            source="a" * 64,
            constants=write_ptd(folder / ADAPTER_WEIGHTS, constants_of(tensors, scheme)),
            shared=(),
        )
        return AdapterFacts(info=info, special_tokens=None)

    bundle.add_adapters({name: write})


class Drawn:
    """Random tensors for a model of some family. shapes: of the linears of a layer, (rows, columns)."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], dim: int, vocab: int, *, seed: int = 0) -> None:
        self.shapes, self.dim, self.vocab = shapes, dim, vocab
        self._draw = np.random.default_rng(seed)

    def floats(self, *shape: int, middle: float = 0.0, size: float = 0.2) -> NDArray[np.float32]:
        return self._draw.normal(middle, size, shape).astype(np.float32)

    def branch(self, name: str, rows: int, columns: int, rank: int = 3) -> dict[str, NDArray[Any]]:
        return {
            f"{name}.lora_a.weight": self.floats(rank, columns),
            f"{name}.lora_b.weight": self.floats(rows, rank),
        }

    def affine(self, name: str, rows: int) -> dict[str, NDArray[Any]]:
        return {f"{name}.factor": self.floats(rows, middle=1.0), f"{name}.shift": self.floats(rows)}

    def layers(self, count: int, *, branches: bool, affines: bool) -> dict[str, NDArray[Any]]:
        """Of every linear."""
        made: dict[str, NDArray[Any]] = {}
        for layer in range(count):
            for linear, (rows, columns) in self.shapes.items():
                name = f"layers.{layer}.{linear}"
                made |= self.branch(name, rows, columns) if branches else {}
                made |= self.affine(name, rows) if affines else {}
        return made

    def rows(self, name: str, ids: Sequence[int]) -> dict[str, NDArray[Any]]:
        return {
            f"{name}.rows.ids": np.array(ids, np.int64),
            f"{name}.rows.weight": self.floats(len(ids), self.dim),
        }
