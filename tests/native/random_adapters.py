"""Random adapters that change anything that an adapter may change, in any mixture."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from formula import Model, Norm
from formula_adapters import Adapter, Change, Embedding, Floats, Head, Layer, NormPair, Rows
from formula_linears import Back, Linear
from random_models import FLOAT, Kind, Random

PARTS = (
    "branches",
    "factors",
    "shifts",
    "norms",
    "head norms",
    "embedding",
    "embedding branch",
    "embedding rows",
    "head",
    "head branch",
    "head affine",
    "head rows",
    "layers",
    "more tokens",
)


class RandomAdapter:
    """parts: what it changes, of PARTS.  back, narrow: of its branches.  kind: of its embedding and its head."""

    def __init__(
        self,
        random: Random,
        model: Model,
        parts: Collection[str],
        *,
        rank: int = 5,
        narrow: Kind = FLOAT,
        back: Kind = FLOAT,
        kind: Kind = FLOAT,
    ) -> None:
        self._random, self._model, self._parts = random, model, frozenset(parts)
        assert self._parts <= set(PARTS)
        self._rank, self._narrow, self._back, self._kind = rank, narrow, back, kind
        self._draw = random.draw
        self._dim, self._vocab = model.head.columns, model.head.rows
        self._more = 21 if "more tokens" in self._parts else 0

    def make(self) -> Adapter:
        order: Sequence[int] = range(len(self._model.layers))
        if "layers" in self._parts:
            order = [int(i) for i in self._draw.integers(0, len(order), len(order) + 1)]
        return Adapter(
            vocab=self._vocab + self._more,
            layers=[self._layer(index) for index in order],
            norm=self._norm(self._model.norm),
            embedding=self._embedding(),
            head=self._head(),
        )

    def _some(self, part: str) -> bool:
        """Whether one of many changes: of those that may, two in three do."""
        return part in self._parts and bool(self._draw.random() < 0.67)

    def _floats(self, count: int, middle: float, size: float) -> Floats:
        return self._draw.normal(middle, size, count).astype(np.float32)

    def _change(self, rows: Sequence[int], columns: int, branch: str, factor: str, shift: str) -> Change:
        affines = [
            (
                self._floats(count, 1, 0.3) if self._some(factor) else None,
                self._floats(count, 0, 0.3) if self._some(shift) else None,
            )
            for count in rows
        ]
        of = [i for i in range(len(rows)) if self._draw.random() < 0.7] or [0]
        made = None
        if self._some(branch):
            made = self._random.branch(rows, columns, self._rank, of=of, narrow=self._narrow, back=self._back)
        return Change(branch=made, affines=affines if self._draw.random() < 0.8 else ())

    def _norm(self, norm: Norm | None) -> NormPair:
        if norm is None:
            return None, None
        bias = norm.bias is not None and self._some("norms")
        return (
            self._floats(len(norm.weight), 1, 0.3) if self._some("norms") else None,
            self._floats(len(norm.weight), 0, 0.5) if bias else None,
        )

    def _layer(self, index: int) -> Layer:
        layer = self._model.layers[index]
        q, k = (
            self._floats(len(one), 1, 0.3) if self._some("head norms") else None
            for one in layer.head_norms or ((), ())
        )
        return Layer(
            base=index,
            norms=[self._norm(norm) for norm in layer.norms],
            head_norms=(q, k) if layer.head_norms else (None, None),
            places=[
                self._change(
                    [linear.rows for linear in place.linears],
                    place.linears[0].columns,
                    "branches",
                    "factors",
                    "shifts",
                )
                for place in layer.places
            ],
        )

    def _rows(self, *, needed: bool) -> Rows:
        """Of some tokens. needed: and of all that the model has not."""
        ids = sorted({int(i) for i in self._draw.integers(0, self._vocab, 9)})
        if needed:
            ids += range(self._vocab, self._vocab + self._more)
        return Rows(ids=np.array(ids, np.int64), linear=self._random.linear(len(ids), self._dim, size=1.5))

    def _embedding(self) -> Embedding:
        own = "embedding" in self._parts
        of_head = own and "head" in self._parts and self._kind[0] != 4 and self._draw.random() < 0.5
        vocab, size = self._vocab + self._more, float(np.sqrt(self._dim))
        needed = self._more > 0 and not own
        branch = "embedding branch" in self._parts
        narrow = self._random.linear(vocab, self._rank, (32, 0) if self._back == FLOAT else (8, 0), size=0.5)
        whole: Linear = self._random.linear(self._dim, self._rank + 2, self._back)
        return Embedding(
            table=self._random.linear(vocab, self._dim, self._kind, size=size)
            if own and not of_head
            else None,
            of_head=of_head,
            narrow=narrow if branch else None,
            back=Back(whole=whole, column=1, rank=self._rank, linear=0, narrow=0) if branch else None,
            rows=self._rows(needed=needed) if needed or "embedding rows" in self._parts else None,
        )

    def _head(self) -> Head:
        own = "head" in self._parts
        vocab = self._vocab + (self._more if own else 0)
        needed = self._more > 0 and not own
        return Head(
            linear=self._random.linear(vocab, self._dim, self._kind) if own else None,
            change=self._change([vocab], self._dim, "head branch", "head affine", "head affine"),
            rows=self._rows(needed=needed) if needed or "head rows" in self._parts else None,
        )
