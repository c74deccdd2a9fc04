"""What adapters change of a model, as in native/adapter.h: numbers as files hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from formula_linears import Back, Branch, Doubles, Linear, stored
from numpy.typing import NDArray

from bedplate import _native

Floats = NDArray[np.float32]
NormPair = tuple[Floats | None, Floats | None]  # weight and bias, of the adapter's own


def stored_or_none(values: Floats | NDArray[np.int64] | None) -> _native.Source | None:
    return None if values is None else stored(values.tobytes())


def native_norm(norm: NormPair) -> _native.Norm:
    return stored_or_none(norm[0]), stored_or_none(norm[1])


@dataclass(frozen=True, kw_only=True, eq=False)
class Change:
    """affines: factor and shift of each linear, None: 1 and 0; or of none of them."""

    branch: Branch | None = None
    affines: Sequence[tuple[Floats | None, Floats | None]] = ()

    def apply(self, x: Doubles, outputs: Sequence[Doubles], scale: float) -> None:
        if self.branch is not None:
            self.branch.add(x, outputs, scale)
        for y, (factor, shift) in zip(outputs, self.affines, strict=False):
            if factor is not None:
                y *= factor.astype(np.float64)
            if shift is not None:
                y += shift.astype(np.float64)

    def native(self) -> _native.Change:
        affines = [(stored_or_none(factor), stored_or_none(shift)) for factor, shift in self.affines]
        return (None if self.branch is None else self.branch.native(), affines)


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """base: the number of the model's layer. norms, head_norms: what replaces those of the model."""

    base: int
    places: Sequence[Change]
    norms: Sequence[NormPair] = ((None, None),) * 4
    head_norms: tuple[Floats | None, Floats | None] = (None, None)

    def native(self) -> _native.AdapterLayer:
        return _native.AdapterLayer(
            base=self.base,
            norms=[native_norm(norm) for norm in self.norms],
            head_norms=[stored_or_none(weight) for weight in self.head_norms],
            places=[change.native() for change in self.places],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class SumOfChanges(Change):
    terms: Sequence[tuple[Change, float]]

    def apply(self, x: Doubles, outputs: Sequence[Doubles], scale: float) -> None:
        for change, factor in self.terms:
            change.apply(x, outputs, scale * factor)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """linear: float32 [tokens, dim], of the tokens `ids`."""

    ids: NDArray[np.int64]
    linear: Linear


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedding:
    """of_head: rows of the adapter's own head. narrow, back: A and B of a branch."""

    table: Linear | None = None
    of_head: bool = False
    narrow: Linear | None = None
    back: Back | None = None
    rows: Rows | None = None

    def read(self, base: Doubles, head: Linear | None, tokens: Sequence[int], scale: float) -> Doubles:
        """float64 [tokens, dim]. base: the model's table. head: the adapter's own."""
        own = head if self.of_head else self.table
        table = base if own is None else own.dense()
        x = np.array([table[token] if token < len(table) else table[0] for token in tokens])
        for number, token in enumerate(tokens):
            if self.rows is not None and token in self.rows.ids:
                x[number] = self.rows.linear.dense()[list(self.rows.ids).index(token)]
        if self.narrow is not None and self.back is not None:
            x = x + self.narrow.dense()[list(tokens)] * scale @ self.back.dense().T
        return x

    def native(self) -> _native.AdapterEmbedding:
        return _native.AdapterEmbedding(
            table=None if self.table is None else self.table.table(),
            of_head=self.of_head,
            narrow=None if self.narrow is None else self.narrow.table(),
            back=None
            if self.back is None
            else _native.BackMatrix(self.back.whole.part(), self.back.column, self.back.rank, 0, 0),
            ids=None if self.rows is None else stored_or_none(self.rows.ids),
            rows=None if self.rows is None else self.rows.linear.table(),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class SumOfEmbeddings(Embedding):
    terms: Sequence[tuple[Embedding, float]]

    def read(self, base: Doubles, head: Linear | None, tokens: Sequence[int], scale: float) -> Doubles:
        x = base[list(tokens)]
        added = [one.read(base, head, tokens, scale * factor) - x for one, factor in self.terms]
        return sum(added, start=x)


@dataclass(frozen=True, kw_only=True, eq=False)
class Head:
    linear: Linear | None = None
    change: Change = field(default_factory=Change)
    rows: Rows | None = None

    def apply(self, base: Linear, x: Doubles, vocab: int, scale: float) -> Doubles:
        """Logits float64 [T, vocab]. base: the model's head."""
        y = (self.linear or base).apply(x)
        self.change.apply(x, [y], scale)
        logits = np.full((len(x), vocab), np.nan)
        logits[:, : y.shape[1]] = y
        if self.rows is not None:
            logits[:, self.rows.ids] = self.rows.linear.apply(x)
        return logits

    def native(self) -> _native.AdapterHead:
        return _native.AdapterHead(
            matrix=None if self.linear is None else self.linear.matrix(),
            change=self.change.native(),
            ids=None if self.rows is None else stored_or_none(self.rows.ids),
            rows=None if self.rows is None else self.rows.linear.matrix(),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    vocab: int
    layers: Sequence[Layer]
    norm: NormPair = (None, None)
    embedding: Embedding = field(default_factory=Embedding)
    head: Head = field(default_factory=Head)

    def native(self) -> _native.Adapter:
        return _native.Adapter(
            vocab=self.vocab,
            layers=[layer.native() for layer in self.layers],
            norm=native_norm(self.norm),
            embedding=self.embedding.native(),
            head=self.head.native(),
            readers=2,
        )


def sum_of(parts: Sequence[tuple[Adapter, float]]) -> Adapter:
    """Of adapters that have branches alone, each times its factor."""
    layers = [
        Layer(
            base=index,
            places=[
                SumOfChanges(terms=[(one.layers[index].places[place], factor) for one, factor in parts])
                for place in range(4)
            ],
        )
        for index in range(len(parts[0][0].layers))
    ]
    return Adapter(
        vocab=parts[0][0].vocab,
        layers=layers,
        embedding=SumOfEmbeddings(terms=[(one.embedding, factor) for one, factor in parts]),
        head=Head(change=SumOfChanges(terms=[(one.head.change, factor) for one, factor in parts])),
    )
