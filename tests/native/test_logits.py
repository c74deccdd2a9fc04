"""The likeliest token, found without numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from bedplate import _native

# A few values, so that equal ones meet; up to some times what is compared at once.
VALUES = st.sampled_from([-np.inf, -2.5, -0.0, 0.0, 1e-40, 1.0, 1.5, np.inf])
ROWS = arrays.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 150)), elements=VALUES)


@given(values=ROWS)
def test_the_highest_of_the_last_row_the_first_of_equal_ones(values: np.ndarray) -> None:
    logits = _native.Logits(values)
    assert logits.likeliest() == values[-1].argmax()
    np.testing.assert_array_equal(logits.array, values)


@given(values=ROWS, data=st.data())
def test_none_if_one_is_not_a_number(values: np.ndarray, data: st.DataObject) -> None:
    values[-1, data.draw(st.integers(0, values.shape[1] - 1))] = np.nan
    assert _native.Logits(values).likeliest() is None


def test_the_array_outlives_what_gave_it() -> None:
    array = _native.Logits(np.full((1, 50_000), 7, np.float32)).array
    assert (array == 7).all()


def test_another_shape_is_refused() -> None:
    with pytest.raises(TypeError):
        _native.Logits(np.zeros(3, np.float32))
