"""Constants by the place of a layer that they belong to → what the native layer is made of."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from bedplate import _native
from bedplate.bundle.named import NamedConstants, Part, Source
from bedplate.spec import ModelSpec, correction_places, linear_shapes

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
Offsets = tuple[int, int, float, Source, Source]  # as the native layer's `Offsets`


class Reader:
    """Reads weights by place.

    places: the linears of each, by its name in a layer.  ranks: of the branches beside the linears.
    """

    def __init__(
        self,
        constants: NamedConstants,
        spec: ModelSpec,
        ranks: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.places = correction_places(spec)
        self.spec, self.constants, self.ranks = spec, constants, ranks
        self._rows = {name.rpartition(".")[2]: rows for name, (rows, _) in linear_shapes(spec).items()}
        self._parts: dict[str, Part] = {}  # of joined matrices
        self._units: dict[tuple[str, str, int], float | None] = {}

    def norm(self, name: str) -> _native.Norm:
        dim, bias = self.spec.dim, f"{name}.bias"
        return (
            self.constants.floats(f"{name}.weight", dim),
            self.constants.floats(bias, dim) if self.spec.norm_bias else None,
        )

    def head_norm(self, layer: int, part: str) -> Source | None:
        """The norm of the queries' or the keys' heads. None: there is none."""
        if self.spec.qk_norm is None:
            return None
        heads = {"q": self.spec.n_heads, "k": self.spec.n_kv_heads}[part]
        width = self.spec.head_dim * (heads if self.spec.qk_norm == "whole" else 1)
        return self.constants.floats(f"layers.{layer}.self_attn.{part}_norm.weight", width)

    def place(self, layer: int, place: str) -> tuple[list[_native.Matrix], _native.Branch | None]:
        """The linears of a place with their offsets and biases, and the rest of their correction."""
        linears, at = self.places[place], f"layers.{layer}.{place}"
        weights = [self.matrix(f"layers.{layer}.{name}.weight") for name in linears]
        biases = [
            self._bias(f"layers.{layer}.{name}.bias", part.rows)
            for name, part in zip(linears, weights, strict=True)
        ]
        names = [f"{at}.{name.rpartition('.')[2]}.weight" for name in linears]
        # Linears of one input may have a correction or none, as their bits differ.
        backs = [self.matrix(name) if self.constants.has(name) else None for name in names]
        if not any(backs):
            return [
                _native.Matrix([part], None, bias) for part, bias in zip(weights, biases, strict=True)
            ], None
        directions = self.matrix(f"{at}.directions.weight")
        offsets = [
            self._offsets(weight, f"{at}.directions.weight", directions, back)
            for weight, back in zip(weights, backs, strict=True)
        ]
        matrices = [
            _native.Matrix([part], offset, bias)
            for part, offset, bias in zip(weights, offsets, biases, strict=True)
        ]
        return matrices, _beyond_offsets(directions, backs, offsets, weights)

    def _offsets(self, weight: Part, name: str, directions: Part, back: Part | None) -> Offsets | None:
        """The offsets of a weight's groups, if the first directions are the sums of those; None: they are not."""
        if back is None or weight.bits != 4 or weight.group == 0 or back.bits != 8:
            return None
        groups = weight.columns // weight.group
        place = (*self.constants.keys_of(name), groups)
        if place not in self._units:  # all layers share the same directions, unless some were recovered
            self._units[place] = _native.unit_of_groups(directions, groups)
        unit = self._units[place]
        return None if unit is None else (back.columns, weight.group, unit, back.codes, back.scales)

    def branch(self, layer: int, linears: tuple[str, ...]) -> _native.Branch | None:
        """The branch of an adapter at the linears of one input. None: it adapts none of them."""
        narrow, backs, rank = [], [], 0
        for number, name in enumerate(linears):
            if name not in self.ranks:
                continue
            a, b = (self.matrix(f"layers.{layer}.{name}.{half}.weight") for half in ("lora_a", "lora_b"))
            before = self.constants.before_on_diagonal(f"layers.{layer}.{name}.lora_b.weight")
            column = sum(self._rank_of(part) for part in before)
            narrow.append(a)
            backs.append(_native.BackMatrix(b, column, a.rows, linear=number, narrow=rank))
            rank += a.rows
        return _native.Branch(_native.Matrix(narrow), backs) if narrow else None

    def matrix(self, name: str) -> Part:
        """The matrix of this name, without what it is joined with. BundleError: there is no such matrix."""
        if name in self._parts:
            return self._parts[name]
        whole, names = self.constants.matrix(name), self.constants.joined_with(name)
        if len(names) == 1:
            return whole
        counts = [self._rows_of(part) for part in names]
        if sum(counts) != whole.rows:
            raise _native.NativeError(
                f"{name}: {whole.rows} rows of {len(names)} matrices, not {sum(counts)}"
            )
        first = 0
        for part, count in zip(names, counts, strict=True):
            self._parts[part] = whole.slice(first, count)
            first += count
        return self._parts[name]

    def rows_of_linear(self, name: str) -> int:
        """The outputs of a linear, by its name in a layer."""
        return self._rows[name.rpartition(".")[2]]

    def _rank_of(self, name: str) -> int:
        """The rank of the branch that a constant belongs to. NativeError: the adapter has none there."""
        linear = name.split(".", 2)[2].rpartition(".lora_")[0]
        if linear not in self.ranks:
            raise _native.NativeError(f"{name}: the adapter has no branch there")
        return self.ranks[linear]

    def _rows_of(self, name: str) -> int:
        """Rows of a part: those of its linear, but for the narrow halves of branches."""
        if name.endswith(".lora_a.weight"):
            return self._rank_of(name)
        return next(self._rows[piece] for piece in name.split(".") if piece in self._rows)

    def _bias(self, name: str, rows: int) -> Source | None:
        if not self.constants.has(name):
            return None
        names = self.constants.joined_with(name)
        counts = [self._rows_of(part) for part in names] if len(names) > 1 else [rows]
        start = sum(counts[: names.index(name)])
        whole = self.constants.floats(name, sum(counts))
        return whole.slice(4 * start, 4 * rows)


def _beyond_offsets(
    directions: Part, backs: list[Part | None], offsets: list[Offsets | None], weights: list[Part]
) -> _native.Branch | None:
    """The rest of a correction: the directions after the offsets. All directions, if a linear has no offsets."""
    done = [
        0 if own is None else weight.columns // own[1] for own, weight in zip(offsets, weights, strict=True)
    ]
    first = min(begun for back, begun in zip(backs, done, strict=True) if back is not None)
    if first == directions.rows:
        return None
    narrow = _native.Matrix([directions.slice(first, directions.rows - first)])
    return _native.Branch(
        narrow,
        [
            _native.BackMatrix(back, start, back.columns - start, linear=number, narrow=start - first)
            for number, (back, start) in enumerate(zip(backs, done, strict=True))
            if back is not None and start < back.columns
        ],
    )
