"""Products of the native layer in numpy and float64: the formulas of native/kernels.h, written down once more.

Weights here are numbers as files hold them, from which both `dense` matrices and the native layer's own objects are
made.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
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
