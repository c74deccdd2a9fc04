"""Products with matrices of every kind against their formula, on every instruction set.

The head of a model whose layers add nothing is such a product: of the normed rows of the embedding. Those hold
integers, and in each 32 columns one of ±127, so each is its own code, and all that is left between the two sides is
the rounding of float32 sums: half a unit in the last place, 2^-24, of the sum of absolute values for each addition
that a term goes through.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from formula import Model, Norm, Rules
from formula_linears import GROUP, Linear, Offsets
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import EIGHT, FLOAT, KINDS, Kind, Random

from bedplate import _native

pytestmark = pytest.mark.usefixtures("instruction_set")

ROUNDING = 2.0**-24
RUN = 64  # products of floats that are summed as one
MOST_INPUTS = 19  # rows of inputs of one step: more than any tile has, and not a multiple of one


def zeros(rows: int, columns: int) -> Linear:
    return Linear(bits=32, values=np.zeros((rows, columns), np.float32))


def product_model(head: Linear, inputs: np.ndarray) -> Model:
    """Its logits are the products of `head` with the rows of `inputs`, divided by their root mean square."""
    dim = head.columns
    layer = Random(0).model(dim=dim, heads=1, kv_heads=1, head_dim=2, hidden=1, vocab=1, layers=1).layers[0]
    for place in layer.places:
        place.linears[:] = [zeros(one.rows, one.columns) for one in place.linears]  # type: ignore[index]
    table = np.zeros((head.rows, dim), np.float32)
    table[: len(inputs)] = inputs[: head.rows]
    return Model(
        heads=1,
        kv_heads=1,
        head_dim=2,
        embedding=Linear(bits=32, values=table),
        head=head,
        norm=Norm(weight=np.ones(dim, np.float32)),
        layers=[layer],
        rules=Rules(norm_eps=1e-12),
    )


def integers(draw: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    inputs = draw.integers(-127, 128, (rows, columns)).astype(np.float32)
    for first in range(0, columns, GROUP):
        inputs[:, first] = draw.choice([-127, 127], rows)
    return inputs


def assert_product(head: Linear, inputs: np.ndarray, decoder: _native.Decoder | None = None) -> None:
    """Of all rows in one step, and of each alone to the same bits."""
    model = product_model(head, inputs)
    decoder = decoder or model.decoder()
    tokens = list(range(min(len(inputs), head.rows)))
    step = [(token, 0, decoder.kv(half=False), None, 1.0, True) for token in tokens]
    got = decoder.step(step).array
    x = inputs[tokens].astype(np.float64)
    x /= np.sqrt((x**2).mean(axis=1, keepdims=True) + model.rules.norm_eps)
    expected = head.apply(x)
    if head.bits == 32:
        additions = min(head.columns, RUN) + -(-head.columns // RUN)
    else:
        additions = -(-head.columns // GROUP) * (1 if head.offsets is None else 2)
    size = np.abs(x) @ np.abs(head.dense()).T + (0 if head.bias is None else np.abs(head.bias))
    if head.offsets is not None:  # which may cancel what they are added to
        size += np.abs(x) @ np.abs(head.offsets.dense(head.columns)).T * 2
    # 16 more: what the norm, the scales and the bias round.
    np.testing.assert_array_less(np.abs(got - expected), (additions + 16) * ROUNDING * size + 1e-30)
    for row, one in zip(step, got, strict=True):
        np.testing.assert_array_equal(decoder.step([row]).array[0], one)


def fitting_columns(kind: Kind, draw: Any) -> int:
    bits, group = kind
    if group:
        return int(group * draw(st.integers(1, 5)))
    return int(draw(st.integers(1, 150)) * (2 if bits == 4 else 1))


@settings(max_examples=60)
@given(data=st.data(), kind=st.sampled_from(KINDS), rows=st.integers(1, 70), seed=st.integers(0, 1000))
def test_any_shape(data: st.DataObject, kind: Kind, rows: int, seed: int) -> None:
    random, columns = Random(seed), fitting_columns(kind, data.draw)
    head = random.linear(rows, columns, kind, bias=data.draw(st.booleans(), "bias"))
    assert_product(head, integers(random.draw, MOST_INPUTS, columns))


@pytest.mark.parametrize("columns", [1024, 4095])
def test_the_error_of_a_sum_of_floats_hardly_grows_with_its_terms(columns: int) -> None:
    """In one sum of 4,095 it would be 20 units: each term is added to all those before it."""
    random = Random(columns)
    head, inputs = random.linear(64, columns), integers(random.draw, MOST_INPUTS, columns)
    model = product_model(head, inputs)
    decoder = model.decoder()
    got = decoder.step([(t, 0, decoder.kv(half=False), None, 1.0, True) for t in range(MOST_INPUTS)]).array
    x = inputs.astype(np.float64)
    expected = head.apply(x / np.sqrt((x**2).mean(axis=1, keepdims=True)))
    assert np.sqrt(((got - expected) ** 2).mean()) < 5 * ROUNDING * expected.std()
    assert_product(head, inputs, decoder)


@settings(max_examples=40)
@given(data=st.data(), rows=st.integers(1, 70), seed=st.integers(0, 1000))
def test_offsets_of_groups(data: st.DataObject, rows: int, seed: int) -> None:
    random = Random(seed)
    group, group_of_offsets = (data.draw(st.sampled_from([32, 64, 128])) for _ in range(2))
    columns = max(group, group_of_offsets) * data.draw(st.integers(1, 4))
    found = random.linear(rows, columns, (4, group), bias=data.draw(st.booleans(), "bias"))
    offsets = random.offsets(rows, columns, group_of_offsets, beyond=data.draw(st.integers(0, 3)))
    head = Linear(**{**vars(found), "offsets": offsets})
    assert_product(head, integers(random.draw, MOST_INPUTS, columns))


@pytest.mark.parametrize("kind", [*KINDS, "offsets"])
def test_the_largest_codes_do_not_overflow(kind: Kind | str) -> None:
    """All codes and all inputs at either end of their ranges: the sums of integers are the largest that there are."""
    bits, group = (4, 32) if isinstance(kind, str) else kind
    rows, columns = 32, 256
    ends = np.array([-(1 << (bits - 1)), (1 << (bits - 1)) - 1])
    signs = np.random.default_rng(0).integers(0, 2, (rows, columns))
    signs[:4] = [[0], [1], [0], [1]]
    signs[2:4, 1::2] ^= 1
    if bits == 32:
        head = Linear(bits=32, values=(signs * 2 - 1).astype(np.float32))
    else:
        scales = np.ones((rows, columns // group if group else 1), np.float32)
        head = Linear(bits=bits, values=ends[signs].astype(np.int8), scales=scales, group=group)
    if isinstance(kind, str):
        codes = np.full((rows, columns // 32), -128, np.int8)
        offsets = Offsets(group=32, unit=1.0, codes=codes, scales=np.full(rows, 0.1, np.float32))
        head = Linear(**{**vars(head), "offsets": offsets})
    inputs = np.where(np.random.default_rng(1).integers(0, 2, (MOST_INPUTS, columns)), 127, -127).astype(
        np.float32
    )
    inputs[0], inputs[1] = 127, -127
    inputs[2:4, 1::2] *= -1
    assert_product(head, inputs)


@pytest.mark.parametrize("kind", [EIGHT, FLOAT])
def test_a_head_that_serves_as_embedding(kind: Kind) -> None:
    head = Random(1).linear(37, 70, kind)
    tied = Model(**{**vars(product_model(head, np.zeros((1, 70)))), "embedding": None})
    apart = Model(**{**vars(tied), "embedding": Linear(bits=32, values=head.dense().astype(np.float32))})
    for token in range(37):
        logits = []
        for decoder in (tied.decoder(), apart.decoder()):
            logits.append(decoder.step([(token, 0, decoder.kv(half=False), None, 1.0, True)]).array)
        np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("kind", [(4, 32), (4, 64), (4, 0), EIGHT, FLOAT])
def test_rows_of_an_embedding(kind: Kind) -> None:
    """A float head of ones on the diagonal shows the normed row."""
    dim, vocab = 64, 64
    table = Random(2).linear(vocab, dim, kind, size=np.sqrt(dim))
    if kind == (4, 32):  # an embedding's scales need not be bfloat16
        assert table.scales is not None
        table = Linear(**{**vars(table), "scales": table.scales * np.float32(1.001)})
    model = product_model(Linear(bits=32, values=np.eye(dim, dtype=np.float32)), np.zeros((1, dim)))
    model = Model(**{**vars(model), "embedding": table})
    decoder = model.decoder()
    got = decoder.step([(t, 0, decoder.kv(half=False), None, 1.0, True) for t in range(vocab)]).array
    x = table.dense()
    np.testing.assert_allclose(got, x / np.sqrt((x**2).mean(axis=1, keepdims=True)), rtol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [(16, 32), (1, 5, 30)])
def test_parts_below_each_other_are_one_matrix(kind: Kind, cuts: tuple[int, ...]) -> None:
    whole = Random(3).linear(47, 128, kind)
    inputs = integers(np.random.default_rng(3), 5, 128)
    model = product_model(whole, inputs)
    parts = []
    for first, last in zip((0, *cuts), (*cuts, 47), strict=True):
        scales = None if whole.scales is None else whole.scales[first:last]
        parts.append(Linear(**{**vars(whole), "values": whole.values[first:last], "scales": scales}).part())
    decoder, joined = model.decoder(), model.decoder(head=_native.Matrix(parts))
    for token in range(5):
        row = (token, 0, decoder.kv(half=False), None, 1.0, True)
        np.testing.assert_array_equal(decoder.step([row]).array, joined.step([row]).array)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [(4, 32), (4, 0), EIGHT])
def test_a_scale_that_is_no_number_stays_in_its_row(kind: Kind, value: float) -> None:
    random = Random(4)
    head, inputs = random.linear(40, 64, kind), integers(random.draw, 5, 64)
    assert head.scales is not None
    wrong = head.scales.copy()
    wrong[17, 0] = value
    logits = []
    for scales in (head.scales, wrong):
        decoder = product_model(Linear(**{**vars(head), "scales": scales}), inputs).decoder()
        rows = [(t, 0, decoder.kv(half=False), None, 1.0, True) for t in range(5)]
        logits.append(decoder.step(rows).array)
    others = np.arange(40) != 17
    np.testing.assert_array_equal(logits[0][:, others], logits[1][:, others])
    assert not np.isfinite(logits[1][:, 17]).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", [0, 31, 32, 69])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_input_that_is_no_number_is_no_zero(kind: Kind, column: int, value: float) -> None:
    """It comes from where a norm does not spread it over all columns: here from the outputs of v, by way of o."""
    random = Random(5)
    dim = 128
    model = random.model(dim=dim, heads=4, kv_heads=4, head_dim=32, layers=1, kinds={"o": kind})
    v = model.layers[0].places[0].linears[2]
    v.values[column] = value
    decoder = model.decoder()
    logits = decoder.step([(1, 0, decoder.kv(half=False), None, 1.0, True)])
    assert np.isnan(logits.array).all()
