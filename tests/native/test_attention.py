"""Our attention kernel, called as a program calls it, against the definition in float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bedplate import _native

Array = NDArray[np.float32]


def reference(q: Array, k: Array, v: Array, start_pos: int) -> NDArray[np.float64]:
    """softmax(q kᵀ / √head_dim) v over the keys up to each position, head h with kv head h // group."""
    _, positions, heads, head_dim = q.shape
    group = heads // k.shape[2]
    keys, values = (np.repeat(x[0].astype(np.float64), group, axis=1) for x in (k, v))
    scores = np.einsum("shd,thd->hst", q[0].astype(np.float64), keys) / np.sqrt(head_dim)
    visible = np.arange(k.shape[1]) <= start_pos + np.arange(positions)[:, None]
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hst,thd->shd", weights, values)[None]


def tensors(
    seed: int, positions: int, kv_heads: int, group: int, head_dim: int, context: int, scale: float = 1.0
) -> tuple[Array, Array, Array]:
    random = np.random.default_rng(seed)
    shapes = [(positions, kv_heads * group), (context, kv_heads), (context, kv_heads)]
    q, k, v = (random.standard_normal((1, *s, head_dim), dtype=np.float32) for s in shapes)
    return q * np.float32(scale), k, v


@pytest.fixture(params=_native.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    best = _native.instruction_set()
    _native.use_instruction_set(request.param)
    yield
    _native.use_instruction_set(best)


@pytest.mark.usefixtures("instruction_set")
class TestAgainstReference:
    @settings(max_examples=150, deadline=None)
    @given(
        seed=st.integers(0, 1000),
        positions=st.one_of(st.integers(1, 5), st.integers(1, 90)),
        start_pos=st.one_of(st.just(0), st.integers(0, 600)),
        kv_heads=st.one_of(st.integers(1, 4), st.integers(1, 40)),
        group=st.integers(1, 9),
        head_dim=st.one_of(st.sampled_from([16, 64, 80, 128]), st.integers(1, 40)),
        unused=st.integers(0, 3),
        scale=st.sampled_from([0.0, 1.0, 30.0]),
    )
    def test_any_shape(
        self,
        seed: int,
        positions: int,
        start_pos: int,
        kv_heads: int,
        group: int,
        head_dim: int,
        unused: int,
        scale: float,
    ) -> None:
        context = start_pos + positions + unused
        q, k, v = tensors(seed, positions, kv_heads, group, head_dim, context, scale)
        got = _native.attention(q, k, v, start_pos)
        # Scores of up to some hundreds in float32: what their rounding does to a weight grows with them.
        np.testing.assert_allclose(got, reference(q, k, v, start_pos), rtol=0, atol=2e-5 * max(1.0, scale))

    def test_what_lies_beyond_the_last_position_does_not_matter(self) -> None:
        q, k, v = tensors(0, 7, 2, 3, 64, 400)
        expected = _native.attention(q, k, v, 300)
        k[:, 307:], v[:, 307:] = np.nan, np.inf
        np.testing.assert_array_equal(_native.attention(q, k, v, 300), expected)

    @pytest.mark.parametrize(("positions", "start_pos"), [(1, 700), (60, 0)])
    def test_threads_do_not_change_a_bit(self, positions: int, start_pos: int) -> None:
        q, k, v = tensors(1, positions, 3, 3, 64, positions + start_pos)
        threads = _native.threads()
        try:
            results = []
            for count in range(1, max(2, threads) + 1):
                _native.set_threads(count)
                results.append(_native.attention(q, k, v, start_pos))
        finally:
            _native.set_threads(threads)
        for result in results[1:]:
            np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize(
    ("q_shape", "kv_shape", "start_pos", "complaint"),
    [
        ((1, 4, 6, 8), (1, 10, 2, 8), 7, r"positions 7 \+ 4 exceed the context of 10"),
        ((1, 4, 6, 8), (1, 10, 2, 8), -1, r"positions -1 \+ 4 exceed"),
        ((1, 4, 5, 8), (1, 10, 2, 8), 0, "5 query heads cannot share 2 kv heads"),
        ((1, 4, 6, 8), (1, 10, 2, 4), 0, "the head_dim 8 of q"),
        ((2, 4, 6, 8), (1, 10, 2, 8), 0, "must be contiguous float32 tensors"),
    ],
)
def test_what_does_not_fit_is_refused(
    q_shape: tuple[int, ...], kv_shape: tuple[int, ...], start_pos: int, complaint: str
) -> None:
    q, kv = np.zeros(q_shape, np.float32), np.zeros(kv_shape, np.float32)
    with pytest.raises(_native.NativeError, match=complaint) as caught:
        _native.attention(q, kv, kv, start_pos)
    assert caught.value.args[0] == "InvalidArgument"


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="'mmx'"):
        _native.use_instruction_set("mmx")
