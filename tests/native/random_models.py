"""Random weights and models for the formulas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from formula import Layer, Model, Norm, Place, Rules
from formula_adapters import Adapter, Change
from formula_adapters import Layer as AdapterLayer
from formula_linears import Back, Branch, Linear, Offsets, bfloat16

from bedplate import _native

Kind = tuple[int, int]  # bits, group
FLOAT, EIGHT, FOUR = (32, 0), (8, 0), (4, 32)
# Every kind among the linears of one layer.
MIXED: dict[str, Kind] = {
    "q": FOUR,
    "k": EIGHT,
    "v": FLOAT,
    "o": (4, 64),
    "gate": (4, 0),
    "up": EIGHT,
    "down": FOUR,
}
KINDS: list[Kind] = [(4, 32), (4, 64), (4, 128), (4, 0), EIGHT, FLOAT]


class Random:
    """Draws weights; equal seeds, equal weights."""

    def __init__(self, seed: int) -> None:
        self.draw = np.random.default_rng(seed)

    def linear(
        self, rows: int, columns: int, kind: Kind = FLOAT, *, size: float = 1.0, bias: bool = False
    ) -> Linear:
        """Outputs are about `size` times as large as inputs."""
        bits, group = kind
        size = size / np.sqrt(columns)
        added = self.draw.normal(0, size, rows).astype(np.float32) if bias else None
        if bits == 32:
            return Linear(
                bits=32, values=self.draw.normal(0, size, (rows, columns)).astype(np.float32), bias=added
            )
        most = 1 << (bits - 1)
        codes = self.draw.integers(-most, most, (rows, columns)).astype(np.int8)
        groups = columns // group if group else 1
        scales = (size / most * self.draw.uniform(1, 3, (rows, groups))).astype(np.float32)
        return Linear(
            bits=bits, values=codes, scales=bfloat16(scales) if group else scales, group=group, bias=added
        )

    def offsets(self, rows: int, columns: int, group: int, *, beyond: int = 0, size: float = 1.0) -> Offsets:
        """beyond: columns that stand behind the offsets, and are none."""
        rank = columns // group + beyond
        return Offsets(
            group=group,
            unit=0.875,
            codes=self.draw.integers(-128, 128, (rows, rank)).astype(np.int8),
            scales=(size / np.sqrt(columns) / 128 * self.draw.uniform(0.5, 1, rows)).astype(np.float32),
        )

    def norm(self, dim: int, *, bias: bool = False) -> Norm:
        weight = self.draw.uniform(0.5, 1.5, dim).astype(np.float32)
        return Norm(weight=weight, bias=self.draw.normal(0, 0.5, dim).astype(np.float32) if bias else None)

    def branch(
        self,
        rows: Sequence[int],
        columns: int,
        rank: int,
        *,
        of: Sequence[int] | None = None,
        narrow: Kind = FLOAT,
        back: Kind = FLOAT,
        size: float = 0.5,
    ) -> Branch:
        """A branch of those linears, of `rows` each, that `of` numbers; B stand on a diagonal of one matrix."""
        of = range(len(rows)) if of is None else of
        whole = self.linear(sum(rows[i] for i in of), rank * len(of), back, size=size)
        backs, first = [], 0
        for place, number in enumerate(of):
            values = whole.values[first : first + rows[number]]
            scales = None if whole.scales is None else whole.scales[first : first + rows[number]]
            part = Linear(bits=whole.bits, values=values, scales=scales)
            backs.append(Back(whole=part, column=place * rank, rank=rank, linear=number, narrow=place * rank))
            first += rows[number]
        return Branch(narrow=self.linear(rank * len(of), columns, narrow), backs=backs)

    def model(
        self,
        *,
        dim: int = 64,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 16,
        hidden: int = 96,
        vocab: int = 50,
        layers: int = 2,
        kinds: Mapping[str, Kind] | None = None,
        kind: Kind = FLOAT,
        bias: bool = False,
        offsets: bool = False,
        correction: int = 0,
        sharpness: float = 1.0,
        tied: bool = False,
        norms: tuple[bool, bool, bool, bool] = (True, False, True, False),
        norm_bias: bool = False,
        head_norms: Literal["head", "whole"] | None = None,
        rope: Sequence[int | None] = (0,),
        window: Sequence[int] = (0,),
        rules: Rules | None = None,
        **fields: Any,
    ) -> Model:
        """kinds: of single linears, by q, k, v, o, gate, up, down, head, embedding; `kind`: of the others.

        offsets: of the linears of 4 bits in groups.  correction: ranks of each place's.  sharpness: of attention.
        norms: which a layer has.  rope, window: of the layers in turn.
        """
        kinds, rules = kinds or {}, rules or Rules()

        def linear(name: str, rows: int, columns: int, size: float = 1.0) -> Linear:
            found = self.linear(rows, columns, kinds.get(name, kind), size=size, bias=bias)
            if not offsets or found.bits != 4 or not found.group:
                return found
            more = self.offsets(rows, columns, found.group, beyond=2, size=size)
            return Linear(**{**vars(found), "offsets": more})

        q, kv = heads * head_dim, kv_heads * head_dim
        shapes = [
            {"q": (q, dim), "k": (kv, dim), "v": (kv, dim)},
            {"o": (dim, q)},
            {**({"gate": (hidden, dim)} if rules.gated else {}), "up": (hidden, dim)},
            {"down": (dim, hidden)},
        ]
        made = []
        for index in range(layers):
            places = []
            for names in shapes:
                linears = [
                    linear(name, *shape, size=sharpness if name == "q" else 1.0)
                    for name, shape in names.items()
                ]
                rows, columns = [one.rows for one in linears], linears[0].columns
                four = FOUR if columns % 32 == 0 else EIGHT
                given = (
                    self.branch(rows, columns, correction, narrow=four, back=EIGHT) if correction else None
                )
                places.append(Place(linears=linears, correction=given))
            first, second, third, fourth = (self.norm(dim, bias=norm_bias) if has else None for has in norms)
            widths = (head_dim, head_dim) if head_norms == "head" else (q, kv)
            made.append(
                Layer(
                    norms=(first, second, third, fourth),
                    head_norms=(self.norm(widths[0]).weight, self.norm(widths[1]).weight)
                    if head_norms
                    else None,
                    rope=rope[index % len(rope)],
                    window=window[index % len(window)],
                    places=places,
                )
            )
        table = kinds.get("embedding", FLOAT)
        return Model(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            embedding=None if tied else self.linear(vocab, dim, table, size=np.sqrt(dim)),
            head=self.linear(vocab, dim, kinds.get("head", kind)),
            norm=self.norm(dim, bias=norm_bias),
            rules=rules,
            layers=made,
            **fields,
        )

    def adapter(
        self,
        model: Model,
        rank: int,
        of: str = "q k v o gate up down",
        narrow: Kind = FLOAT,
        back: Kind = FLOAT,
    ) -> Adapter:
        """Branches of the linears that `of` names, of rank `rank` each."""
        mlp = ["gate", "up"] if model.rules.gated else ["up"]
        names = [["q", "k", "v"], ["o"], mlp, ["down"]]
        wanted = of.split()

        def change(place: Place, at: int) -> Change:
            rows, columns = [linear.rows for linear in place.linears], place.linears[0].columns
            numbers = [i for i, name in enumerate(names[at]) if name in wanted]
            if not numbers:
                return Change()
            return Change(branch=self.branch(rows, columns, rank, of=numbers, narrow=narrow, back=back))

        return Adapter(
            vocab=model.head.rows,
            layers=[
                AdapterLayer(base=index, places=[change(place, at) for at, place in enumerate(layer.places)])
                for index, layer in enumerate(model.layers)
            ],
        )


def run(
    decoder: _native.Decoder,
    tokens: Sequence[int],
    *,
    adapter: _native.Adapter | None = None,
    scale: float = 1.0,
    half: bool = False,
    chunk: int = 64,
) -> Any:
    """Logits float32 [T, vocab] of a text of a session of its own, in steps of `chunk` tokens."""
    kv, rows = decoder.kv(half=half, adapter=adapter), []
    for first in range(0, len(tokens), chunk):
        some = [
            (token, first + i, kv, adapter, scale, True)
            for i, token in enumerate(tokens[first : first + chunk])
        ]
        rows.append(decoder.step(some).array)
    return np.concatenate(rows)
