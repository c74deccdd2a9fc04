"""Models of the native layer in numpy and float64, as in native/model.h: numbers as files hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import formula_adapters as adapters
import numpy as np
from formula_adapters import Adapter, Change, Floats, NormPair
from formula_linears import Branch, Doubles, Linear, stored
from numpy.typing import NDArray

from bedplate import _native


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    linears: Sequence[Linear]
    correction: Branch | None = None

    def apply(self, x: Doubles, change: Change, scale: float) -> list[Doubles]:
        outputs = [linear.apply(x) for linear in self.linears]
        if self.correction is not None:
            self.correction.add(x, outputs)
        change.apply(x, outputs, scale)
        return outputs


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
        self,
        tokens: Sequence[int],
        adapter: Adapter | None = None,
        scale: float = 1.0,
        *,
        half: bool = False,
        rounded: bool = False,
    ) -> Doubles:
        """float64 [T, vocab] of a text from position 0 on; half: keys and values are kept in float16.

        rounded: what passes from one product to the next is rounded to float32.
        """
        rules, adapter = self.rules, adapter or self.base()
        kept = _single if rounded else _same
        table = (self.embedding or self.head).dense()
        x = adapter.embedding.read(table, adapter.head.linear, tokens, scale) * rules.embedding_scale
        for own in adapter.layers:
            layer = self.layers[own.base]
            first, second, third, fourth = zip(layer.places, own.places, strict=True)
            norms = [replaced(norm, new) for norm, new in zip(layer.norms, own.norms, strict=True)]
            read = kept(self._normed(x, norms[0]))
            q, k, v = map(kept, first[0].apply(read, first[1], scale))
            attended = kept(self._attention(layer, own.head_norms, q, k, v, half))
            given = second[0].apply(attended, second[1], scale)[0]
            x = kept(x + rules.residual_scale * self._normed(kept(given), norms[1]))
            if not rules.parallel:
                read = kept(self._normed(x, norms[2]))
            outputs = [kept(y) for y in third[0].apply(read, third[1], scale)]
            hidden = kept(activated(rules.activation, outputs[0])) * (outputs[1] if rules.gated else 1)
            given = fourth[0].apply(kept(hidden), fourth[1], scale)[0]
            x = kept(x + rules.residual_scale * self._normed(kept(given), norms[3]))
        x = self._normed(x, replaced(self.norm, adapter.norm))
        logits = adapter.head.apply(self.head, x, adapter.vocab, scale)
        return capped(logits * rules.logit_scale, rules.logit_cap)

    def base(self) -> Adapter:
        """An adapter that changes nothing."""
        layers = [adapters.Layer(base=i, places=[Change()] * 4) for i in range(len(self.layers))]
        return Adapter(vocab=self.head.rows, layers=layers)

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

    def _attention(
        self,
        layer: Layer,
        own: tuple[Floats | None, Floats | None],
        q: Doubles,
        k: Doubles,
        v: Doubles,
        half: bool,
    ) -> Doubles:
        length, norms = len(q), layer.head_norms
        if norms is not None:
            norms = (norms[0] if own[0] is None else own[0], norms[1] if own[1] is None else own[1])
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


def replaced(norm: Norm | None, own: NormPair) -> Norm | None:
    if norm is None:
        return None
    weight, bias = own
    return Norm(weight=norm.weight if weight is None else weight, bias=norm.bias if bias is None else bias)


def _single(x: Doubles) -> Doubles:
    return x.astype(np.float32).astype(np.float64)


def _same(x: Doubles) -> Doubles:
    return x


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
