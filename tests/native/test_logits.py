"""The likeliest token, found without numpy. Here logits are the numbers of a head's only column that counts."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from formula_linears import Linear
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from test_products import product_model

from bedplate import _native

# A few values, so that equal ones meet; up to some times what is compared at once.
VALUES = st.sampled_from([-np.inf, -2.5, -0.0, 0.0, 1e-40, 1.0, 1.5, np.inf])
LOGITS = arrays.arrays(np.float32, st.integers(2, 150), elements=VALUES)


def logits_of(values: np.ndarray, tokens: list[int], wanted: bool = True) -> _native.Logits:
    """Token 0 gives `values`, token 1 their opposites."""
    head = np.zeros((len(values), 2), np.float32)
    head[:, 0] = values
    decoder = product_model(Linear(bits=32, values=head), np.array([[1, 1], [-1, 1]], np.float32)).decoder()
    kv = decoder.kv(half=True)
    return decoder.step([(token, at, kv, None, 1.0, wanted) for at, token in enumerate(tokens)])


@settings(max_examples=40)
@given(values=LOGITS, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=3))
def test_the_highest_of_the_last_row_the_first_of_equal_ones(values: np.ndarray, tokens: list[int]) -> None:
    logits = logits_of(values, tokens)
    np.testing.assert_allclose(logits.array, [-values if token else values for token in tokens], rtol=1e-6)
    assert logits.likeliest() == logits.array[-1].argmax()


@settings(max_examples=40)
@given(values=LOGITS, data=st.data())
def test_none_if_one_is_not_a_number(values: np.ndarray, data: st.DataObject) -> None:
    values[data.draw(st.integers(0, len(values) - 1))] = np.nan
    assert logits_of(values, [0]).likeliest() is None


def test_none_if_no_row_was_wanted() -> None:
    logits = logits_of(np.ones(5, np.float32), [0, 1], wanted=False)
    assert logits.array.shape == (0, 5)
    assert logits.likeliest() is None


def test_the_array_outlives_what_gave_it() -> None:
    array = logits_of(np.full(50_000, 7, np.float32), [0]).array
    gc.collect()
    assert (array > 6.99).all() and (array < 7.01).all()


def test_memory_is_used_again_when_nobody_holds_it() -> None:
    head = np.zeros((5, 2), np.float32)
    head[:, 0] = range(1, 6)
    decoder = product_model(Linear(bits=32, values=head), np.array([[1, 1], [-1, 1]], np.float32)).decoder()

    def step(count: int) -> np.ndarray:
        kv = decoder.kv(half=True)
        return decoder.step([(0, at, kv, None, 1.0, True) for at in range(count)]).array

    held = [step(1), step(1), step(2)]
    assert len({array.ctypes.data for array in held}) == 3
    for array in held:
        np.testing.assert_allclose(array, [head[:, 0]] * len(array), rtol=1e-6)
    place = held[0].ctypes.data
    del held[0]
    again = step(1)
    assert again.ctypes.data == place
    np.testing.assert_array_equal(again, held[0])


def test_logits_come_of_steps_alone() -> None:
    with pytest.raises(TypeError):
        _native.Logits()
