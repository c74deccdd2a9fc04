"""Codes, scales and offsets of groups: against the same formula in numpy, bit for bit, on each instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bedplate import _native

Array = NDArray[np.float32]
SHARES = np.array([1.0, 0.94, 0.88, 0.82, 0.76], np.float32)


def as_bfloat16(x: Array) -> Array:
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def added_up(values: Array) -> Array:
    """Over the last axis, from the first to the last, in float32."""
    total = np.zeros(values.shape[:-1], np.float32)
    for i in range(values.shape[-1]):
        total = total + values[..., i]
    return total


def formula(values: Array, group: int, importance: Array) -> tuple[NDArray[np.int8], Array, Array]:
    groups = values.reshape(len(values), -1, 1, group)
    weights = importance.reshape(-1, 1, group)
    low, high = (groups.min(-1) * np.float32(0.5)), (groups.max(-1) * np.float32(0.5))
    least = np.float32(2.0**-126 * 16)
    scale = as_bfloat16(np.maximum((high - low) * SHARES / np.float32(7.5), least))[..., None]
    start = (high + low)[..., None] + scale * np.float32(0.5)
    codes = np.clip((groups - start) * (np.float32(1) / scale), -8, 7).round()
    left = (groups - start) - codes * scale
    shift = (added_up(left * weights) / added_up(weights))[..., None]
    with np.errstate(over="ignore"):
        error = added_up((left - shift) * (left - shift) * weights)
    best = error.argmin(-1)[..., None, None]

    def of_best(each: Array) -> Array:
        return np.take_along_axis(each, best, axis=2)

    flat = (len(values), -1)
    offset = of_best(start) + of_best(shift)
    return of_best(codes).reshape(flat).astype(np.int8), of_best(scale).reshape(flat), offset.reshape(flat)


def quantized(values: Array, group: int, importance: Array | None) -> tuple[NDArray[np.int8], Array, Array]:
    codes = np.empty(values.shape, np.int8)
    scales, offsets = (np.empty((len(values), values.shape[1] // group), np.float32) for _ in range(2))
    _native.quantize_with_offsets(
        values=values, group=group, importance=importance, codes=codes, scales=scales, offsets=offsets
    )
    return codes, scales, offsets


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 40),
    groups=st.integers(1, 3),
    group=st.sampled_from([1, 7, 16, 32, 80]),
    size=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    weighted=st.booleans(),
)
def test_the_bits_of_the_formula(
    instruction_set: str, seed: int, rows: int, groups: int, group: int, size: float, weighted: bool
) -> None:
    generator = np.random.default_rng(seed)
    values = (generator.standard_t(4, (rows, groups * group)) * size).astype(np.float32)
    values[generator.random(values.shape) < 0.05] = 0.0
    importance = generator.random(values.shape[1], np.float32) + np.float32(1e-3) if weighted else None
    wanted = formula(
        values, group, np.ones(values.shape[1], np.float32) if importance is None else importance
    )
    for found, expected in zip(quantized(values, group, importance), wanted, strict=True):
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("value", [0.0, 0.375, -3e38, 1e-37])
def test_groups_of_one_value(instruction_set: str, value: float) -> None:
    codes, scales, offsets = quantized(np.full((3, 64), value, np.float32), 32, None)
    assert np.isfinite(offsets).all()
    assert np.array_equal(
        codes * scales.repeat(32, axis=1) + offsets.repeat(32, axis=1), np.full((3, 64), value, "f")
    )


def test_a_range_beyond_float32(instruction_set: str) -> None:
    values = np.tile(np.array([-3e38, 3e38], np.float32), (2, 16))
    codes, scales, offsets = quantized(values, 32, None)
    found = codes.astype(np.float64) * scales.repeat(32, axis=1) + offsets.repeat(32, axis=1)
    # A bfloat16 scale is off by at most 2^-8 of itself.
    assert np.abs(found / values - 1).max() < 2**-7


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 5), columns=st.integers(1, 100))
def test_squares_of_rows(instruction_set: str, seed: int, rows: int, columns: int) -> None:
    values = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    found = np.empty(rows, np.float32)
    _native.squares(values, found)
    # float32 rounds once; the sums in float64 lose less than a hundredth of that.
    np.testing.assert_allclose(found, np.square(values.astype(np.float64)).sum(1), rtol=0.51 * 2**-23)


def test_what_does_not_fit_is_refused() -> None:
    values = np.zeros((2, 64), np.float32)
    good = {
        "values": values,
        "group": 32,
        "codes": np.empty((2, 64), np.int8),
        "scales": np.empty((2, 2), np.float32),
        "offsets": np.empty((2, 2), np.float32),
    }
    _native.quantize_with_offsets(**good)
    for wrong in (
        {"group": 0},
        {"group": -32},
        {"group": 48},
        {"importance": np.ones(63, np.float32)},
        {"codes": np.empty((64, 2), np.int8)},
        {"scales": np.empty((2, 1), np.float32)},
        {"offsets": np.empty((1, 2), np.float32)},
    ):
        with pytest.raises(_native.NativeError):
            _native.quantize_with_offsets(**{**good, **wrong})
    with pytest.raises(_native.NativeError):
        _native.squares(values, np.empty(3, np.float32))
