"""What the native layer computes, in numpy and float64: the formulas of native/kernels.h, written down once more.

A model here is data, as in native/model.h: numbers as files hold them, from which both `dense` matrices and the
native layer's own objects are made.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bedplate import _native

Doubles = NDArray[np.float64]
GROUP = 32
_FILE = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  open as long as the tests run


def stored(data: bytes) -> _native.Source:
    """Where these bytes lie in a file."""
    offset = _FILE.seek(0, 2)
    _FILE.write(data)
    return _FILE.fileno(), offset, len(data)


def bfloat16(values: NDArray[Any]) -> NDArray[np.float32]:
    """Rounded towards zero."""
    bits = np.asarray(values, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Offsets:
    """codes int8 [rows, rank]; scales float32 [rows]; those of the first columns / group count, times `unit`."""

    group: int
    unit: float
    codes: NDArray[np.int8]
    scales: NDArray[np.float32]

    def dense(self, columns: int) -> Doubles:
        used = self.codes[:, : columns // self.group].astype(np.float64)
        return np.repeat(used * (self.scales.astype(np.float64) * self.unit)[:, None], self.group, axis=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Linear:
    """values: codes int8 [rows, columns], or float32 with 32 bits. scales: float32 [rows, groups]; none with 32."""

    bits: int
    values: NDArray[Any]
    scales: NDArray[np.float32] | None = None
    group: int = 0
    offsets: Offsets | None = None
    bias: NDArray[np.float32] | None = None

    @property
    def rows(self) -> int:
        return int(self.values.shape[0])

    @property
    def columns(self) -> int:
        return int(self.values.shape[1])

    def dense(self) -> Doubles:
        """float64 [rows, columns], offsets included."""
        weights = self.values.astype(np.float64)
        if self.scales is not None:
            weights *= np.repeat(self.scales.astype(np.float64), self.group or self.columns, axis=1)
        return weights if self.offsets is None else weights + self.offsets.dense(self.columns)

    def apply(self, x: Doubles) -> Doubles:
        """x float64 [rows of inputs, columns]."""
        y = (x if self.bits == 32 else in_groups(x)) @ self.dense().T
        return y if self.bias is None else y + self.bias.astype(np.float64)

    def part(self, *, even_low: bool = True) -> _native.Part:
        codes: NDArray[Any] = np.ascontiguousarray(self.values)
        if self.bits == 4:
            shifted = (codes + 8).astype(np.uint8)
            even, odd = shifted[:, 0::2], shifted[:, 1::2]
            codes = even | odd << 4 if even_low else odd | even << 4
        scales = b"" if self.scales is None else self.scales.tobytes()
        if self.bits == 4 and self.group and even_low:
            assert self.scales is not None
            scales = (self.scales.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        return (self.rows, self.columns, self.bits, self.group, stored(codes.tobytes()), stored(scales))

    def matrix(self) -> _native.Matrix:
        offsets, bias = None, None if self.bias is None else stored(self.bias.tobytes())
        if self.offsets is not None:
            o = self.offsets
            codes, scales = stored(o.codes.tobytes()), stored(o.scales.tobytes())
            offsets = (o.codes.shape[1], o.group, o.unit, codes, scales)
        return _native.Matrix([self.part()], offsets, bias)

    def table(self) -> _native.Table:
        return _native.Table(self.part(even_low=False))


def in_groups(x: Doubles) -> Doubles:
    """Inputs as products of codes see them: 8 bits, a scale for each 32 columns."""
    padded = np.zeros((len(x), -(-x.shape[1] // GROUP), GROUP))
    padded.reshape(len(x), -1)[:, : x.shape[1]] = x
    largest = np.abs(padded).max(axis=2, keepdims=True)
    scale = np.where(largest > 1e-35, largest / 127, 1.0)
    return (np.rint(padded / scale) * scale).reshape(len(x), -1)[:, : x.shape[1]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Back:
    """B [rows, rank] of one linear, of `whole` from `column` on."""

    whole: Linear
    column: int
    rank: int
    linear: int
    narrow: int

    def dense(self) -> Doubles:
        return self.whole.dense()[:, self.column : self.column + self.rank]


@dataclass(frozen=True, kw_only=True, eq=False)
class Branch:
    narrow: Linear
    backs: Sequence[Back]

    def add(self, x: Doubles, outputs: Sequence[Doubles], scale: Doubles | float = 1.0) -> None:
        t = self.narrow.apply(x) * scale
        for back in self.backs:
            outputs[back.linear][...] += t[:, back.narrow : back.narrow + back.rank] @ back.dense().T

    def native(self) -> _native.Branch:
        backs = [
            _native.BackMatrix(b.whole.part(), b.column, b.rank, linear=b.linear, narrow=b.narrow)
            for b in self.backs
        ]
        return _native.Branch(self.narrow.matrix(), backs)


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    linears: Sequence[Linear]
    correction: Branch | None = None

    def apply(self, x: Doubles, branch: Branch | None, scale: Doubles | float) -> list[Doubles]:
        outputs = [linear.apply(x) for linear in self.linears]
        if self.correction is not None:
            self.correction.add(x, outputs)
        if branch is not None:
            branch.add(x, outputs, scale)
        return outputs


Adapter = list[list[Branch | None]]  # of each layer's four places


@dataclass(frozen=True, kw_only=True, eq=False)
class Norm:
    """float32 [dim]."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None = None

    def native(self) -> _native.Norm:
        return stored(self.weight.tobytes()), None if self.bias is None else stored(self.bias.tobytes())


NO_NORM: _native.Norm = (None, None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """norms: before and after attention, before and after the MLP. head_norms: of q and of k, float32 [head_dim], or
    of all heads. rope: of the model's; None: none. window: keys that a query sees; 0: all.
    """

    norms: tuple[Norm | None, Norm | None, Norm | None, Norm | None]
    places: Sequence[Place]
    head_norms: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
    rope: int | None = 0
    window: int = 0

    def native(self) -> _native.Layer:
        heads = self.head_norms or (None, None)
        return _native.Layer(
            norms=[NO_NORM if norm is None else norm.native() for norm in self.norms],
            head_norms=[None if weight is None else stored(weight.tobytes()) for weight in heads],
            rope=-1 if self.rope is None else self.rope,
            window=self.window,
            places=[
                (
                    [linear.matrix() for linear in place.linears],
                    None if place.correction is None else place.correction.native(),
                )
                for place in self.places
            ],
        )


@dataclass(frozen=True, kw_only=True)
class Rules:
    """As native/model.h's; attention_scale None: 1 / sqrt(head_dim)."""

    layer_norm: bool = False
    norm_eps: float = 1e-5
    parallel: bool = False
    activation: str = "silu"
    gated: bool = True
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None
    logit_scale: float = 1.0
    score_cap: float = 0.0
    logit_cap: float = 0.0
    query_growth: float = 0.0
    growth_positions: int = 1

    def native(self, head_dim: int) -> _native.Rules:
        return _native.Rules(**{**vars(self), "attention_scale": self.scale(head_dim)})

    def scale(self, head_dim: int) -> float:
        return float(head_dim**-0.5) if self.attention_scale is None else self.attention_scale


Rope = tuple[Sequence[float], Sequence[float], float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """ropes: frequencies [head_dim / 2] of each rotary embedding, those of long texts, and the scale; none given:
    that of Llama.
    """

    heads: int
    kv_heads: int
    head_dim: int
    embedding: Linear | None  # None: the head
    head: Linear
    norm: Norm
    layers: Sequence[Layer]
    rules: Rules = field(default_factory=Rules)
    max_positions: int = 512
    ropes: Sequence[Rope] = ()

    @property
    def turns(self) -> Sequence[Rope]:
        exponents = np.arange(0, self.head_dim, 2) / self.head_dim
        return self.ropes or [([float(f) for f in (1 / 10_000**exponents).astype(np.float32)], (), 1.0)]

    def decoder(self, threads: int = 1, **changes: Any) -> _native.Decoder:
        fields: dict[str, Any] = {
            "dim": self.head.columns,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden": self.layers[0].places[2].linears[0].rows,
            "vocab": self.head.rows,
            "max_positions": self.max_positions,
            "rules": self.rules.native(self.head_dim),
            "ropes": self.turns,
            "embedding": None if self.embedding is None else self.embedding.table(),
            "head": self.head.matrix(),
            "norm": self.norm.native(),
            "layers": [layer.native() for layer in self.layers],
            "threads": threads,
            "readers": threads,
        }
        return _native.Decoder(**{**fields, **changes})

    def logits(
        self, tokens: Sequence[int], adapter: Adapter | None = None, scale: float = 1.0, *, half: bool = False
    ) -> Doubles:
        """float64 [T, vocab] of a text from position 0 on; half: keys and values are kept in float16."""
        rules = self.rules
        x = (self.embedding or self.head).dense()[list(tokens)] * rules.embedding_scale
        for layer, branches in zip(self.layers, adapter or [[None] * 4] * len(self.layers), strict=True):
            first, second, third, fourth = zip(layer.places, branches, strict=True)
            read = self._normed(x, layer.norms[0])
            q, k, v = first[0].apply(read, first[1], scale)
            given = second[0].apply(self._attention(layer, q, k, v, half), second[1], scale)[0]
            x = x + rules.residual_scale * self._normed(given, layer.norms[1])
            if not rules.parallel:
                read = self._normed(x, layer.norms[2])
            outputs = third[0].apply(read, third[1], scale)
            hidden = activated(rules.activation, outputs[0]) * (outputs[1] if rules.gated else 1)
            given = fourth[0].apply(hidden, fourth[1], scale)[0]
            x = x + rules.residual_scale * self._normed(given, layer.norms[3])
        return capped(self.head.apply(self._normed(x, self.norm)) * rules.logit_scale, rules.logit_cap)

    def _normed(self, x: Doubles, norm: Norm | None) -> Doubles:
        if norm is None:
            return x
        if self.rules.layer_norm:
            x = x - x.mean(axis=1, keepdims=True)
        normed = self._rms(x, norm.weight)
        return normed if norm.bias is None else normed + norm.bias.astype(np.float64)

    def _rms(self, x: Doubles, weight: NDArray[np.float32]) -> Doubles:
        mean = (x**2).mean(axis=-1, keepdims=True)
        normed: Doubles = x / np.sqrt(mean + self.rules.norm_eps) * weight.astype(np.float64)
        return normed

    def _attention(self, layer: Layer, q: Doubles, k: Doubles, v: Doubles, half: bool) -> Doubles:
        length, norms = len(q), layer.head_norms
        whole = norms is not None and len(norms[0]) == q.shape[1]
        if norms is not None and whole:
            q, k = self._rms(q, norms[0]), self._rms(k, norms[1])
        queries = q.reshape(length, self.heads, self.head_dim)
        keys = k.reshape(length, self.kv_heads, self.head_dim)
        if norms is not None and not whole:
            queries, keys = self._rms(queries, norms[0]), self._rms(keys, norms[1])
        queries, keys = self._turned(queries, layer.rope), self._turned(keys, layer.rope)
        values = v.reshape(length, self.kv_heads, self.head_dim)
        if half:
            keys, values = (x.astype(np.float16).astype(np.float64) for x in (keys, values))
        keys, values = (np.repeat(x, self.heads // self.kv_heads, axis=1) for x in (keys, values))
        positions = np.arange(length)
        growth = 1 + self.rules.query_growth * np.log(1 + positions // self.rules.growth_positions)
        scores = np.einsum("shd,thd->hst", queries, keys) * self.rules.scale(self.head_dim)
        scores = capped(scores * growth[:, None], self.rules.score_cap)
        back = positions[:, None] - positions[None, :]
        scores = np.where((back >= 0) & (back < (layer.window or length)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("hst,thd->shd", weights, values).reshape(length, -1)

    def _turned(self, x: Doubles, rope: int | None) -> Doubles:
        if rope is None:
            return x
        frequencies, _, scale = self.turns[rope]
        positions = np.arange(len(x), dtype=np.float32)
        # The angle is a product in float32, as everywhere: at position 500 that is 3e-5 of a turn.
        angles = (positions[:, None] * np.float32(frequencies)).astype(np.float64)[:, None, :]
        low, high = np.split(x, 2, axis=-1)
        still = np.asarray(frequencies) == 0  # such a pair stays as it is
        cos, sin = np.where(still, 1, np.cos(angles) * scale), np.where(still, 0, np.sin(angles) * scale)
        return np.concatenate((low * cos - high * sin, high * cos + low * sin), axis=-1)


def activated(name: str, x: Doubles) -> Doubles:
    if name == "silu":
        y: Doubles = x / (1 + np.exp(-np.clip(x, -700, 700)))
    elif name == "gelu_tanh":
        y = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    else:
        y = np.maximum(x, 0) ** 2
    return y


def capped(x: Doubles, cap: float) -> Doubles:
    """cap 0: none."""
    return cap * np.tanh(x / cap) if cap else x
