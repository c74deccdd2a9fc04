"""What passes between compile and link."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

from bedplate.constants import KEY_LENGTH, Constant
from bedplate.quantize.recipe import Recipe
from bedplate.spec import LayerSpec, ModelSpec, narrow_window

# Rises when units of an older bedplate no longer fit the linker.
UNIT_FORMAT = 8


@dataclass(frozen=True, kw_only=True)
class Structure:
    """All that a program's instructions depend on; never a weight's value.

    ranks: rank of the LoRA branch of each targeted linear, by its name in a layer; empty for the base.
    max_chunk: the longest run of tokens that one call of `forward` takes.
    """

    spec: ModelSpec
    recipe: Recipe
    max_context: int
    max_chunk: int
    ranks: Mapping[str, int]

    @property
    def corrections(self) -> dict[str, int]:
        """Rank of the correction of each linear that has one, by its name in a layer."""
        return self.recipe.corrections(self.spec)

    @property
    def unit_layers(self) -> tuple[LayerSpec, ...]:
        """The layers of the short model that is lowered: the first one, and one of each kind that comes after it."""
        first, *rest = self._kinds()
        return (first, *dict.fromkeys(rest))

    @property
    def unit_of_layer(self) -> tuple[int, ...]:
        """For each layer, which of `unit_layers` it is like. For the first, it is the first."""
        kinds = self.unit_layers[1:]
        return (0, *(kinds.index(kind) + 1 for kind in self._kinds()[1:]))

    def _kinds(self) -> list[LayerSpec]:
        """The layers, but a window that is as wide as the context is none."""
        return [replace(one, window=narrow_window(one, self.max_context)) for one in self.spec.layers]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def fingerprint(self, versions: Mapping[str, str], *, any_depth: bool) -> str:
        """SHA-256 over the structure and the versions of what compiles it; with `any_depth`, less the depth."""
        content = self.to_dict() | {"versions": dict(versions), "unit_format": UNIT_FORMAT}
        content["ranks"] = sorted(self.ranks.items())
        # Of the positions that the model has, a program takes max_context. The rest is of its files.
        for name in ("max_positions", "model_type", "architecture", "rotary"):
            del content["spec"][name]
        if any_depth:
            content["spec"]["layers"] = [asdict(layer) for layer in self.unit_layers]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class StaticShapes:
    """The methods of a program of fixed shapes: how many tokens each call takes.

    split_heads: see `model.static_attention`.
    """

    prefill: int
    decode: int
    split_heads: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Lowered:
    """A lowered program in which every constant is a symbol.

    program: an `executorch.exir.schema.Program`; where a key belongs it holds `placeholder(symbol)`.
    symbols: the names of the constants that it wants (`layers.0.mlp.up_proj.weight#codes`).
    fixed: the constants that depend on the structure alone (RoPE tables, the rotation, the row of 1/dim), by symbol.
    """

    program: Any
    symbols: tuple[str, ...]
    fixed: Mapping[str, Constant]


class LayersDifferError(Exception):
    """The layers of a model are not alike, so that one cannot stand for all; says how they differ."""


def versions() -> dict[str, str]:
    """Versions of everything that a lowered program depends on."""
    return {name: version(name) for name in ("executorch", "torch", "torchao")}


def placeholder(symbol: str) -> str:
    """64 hex characters that stand in a program where the key of `symbol` goes."""
    text = hashlib.sha256(f"bedplate symbol {symbol}".encode()).hexdigest()
    assert len(text) == KEY_LENGTH
    return text
