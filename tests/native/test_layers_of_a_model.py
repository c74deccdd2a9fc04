"""Whole models against their formulas, on every instruction set: attention, norms, rotation, the gate, branches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from formula import Model, Place, Rules
from formula_adapters import Adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import EIGHT, FLOAT, FOUR, MIXED, Kind, Random, run

from bedplate import _native

pytestmark = pytest.mark.usefixtures("instruction_set")

LONG = [int(token) for token in np.random.default_rng(0).integers(0, 50, 200)]


def assert_close(got: Any, expected: Any, tolerance: float) -> None:
    """tolerance: of the logits' standard deviation."""
    assert np.isfinite(expected).all() and expected.std() > 0.3
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * expected.std())


def assert_close_but_for_codes(
    model: Model, decoder: _native.Decoder, adapter: Adapter | None = None, scale: float = 1.0
) -> None:
    """Inputs of products are rounded to codes. Where one lies between two, what is computed in float32 may take the
    other, a step of 1/254 of the largest of 32 inputs, which all that follows sees. That is rare: of many short texts
    most are as close as float32 is.
    """
    native = None if adapter is None else adapter.native()
    texts = [LONG[first : first + 5] for first in range(0, len(LONG), 5)]
    expected = np.stack([model.logits(text, adapter, scale) for text in texts])
    got = np.stack([run(decoder, text, adapter=native, scale=scale) for text in texts])
    assert np.isfinite(expected).all() and expected.std() > 0.3
    worst = np.abs(got - expected).max(axis=(1, 2)) / expected.std()
    assert (worst < 2e-5).mean() > 0.7
    assert worst.max() < 0.1


class TestAttention:
    @settings(max_examples=60)
    @given(
        seed=st.integers(0, 1000),
        head_dim=st.one_of(
            st.sampled_from([8, 16, 24, 40, 64, 80, 96, 128]), st.integers(1, 40).map(lambda x: 2 * x)
        ),
        kv_heads=st.integers(1, 4),
        group=st.integers(1, 9),
        length=st.one_of(st.integers(1, 20), st.sampled_from([63, 64, 65, 127, 128, 129, 200])),
        half=st.booleans(),
        threads=st.integers(1, 3),
        sharpness=st.sampled_from([0.0, 1.0, 8.0]),
        chunk=st.sampled_from([1, 7, 64, 200]),
    )
    def test_any_shape(
        self,
        seed: int,
        head_dim: int,
        kv_heads: int,
        group: int,
        length: int,
        half: bool,
        threads: int,
        sharpness: float,
        chunk: int,
    ) -> None:
        model = Random(seed).model(
            dim=24,
            heads=kv_heads * group,
            kv_heads=kv_heads,
            head_dim=head_dim,
            hidden=8,
            layers=1,
            sharpness=sharpness,
        )
        got = run(model.decoder(threads), LONG[:length], half=half, chunk=chunk)
        # float16: a key or value that lies between two of its numbers may become the other, 2^-11 of it. Float32:
        # scores of up to some tens, whose rounding the weights take on.
        tolerance = 2e-3 if half else 2e-5
        assert_close(got, model.logits(LONG[:length], half=half), tolerance * max(1.0, sharpness / 2))

    @pytest.mark.parametrize("half", [False, True])
    def test_scores_that_one_key_wins_by_far(self, half: bool) -> None:
        """The weights of all others vanish, in blocks before and behind the winner's."""
        model = Random(7).model(sharpness=300.0, layers=1)
        got = run(model.decoder(2), LONG, half=half)
        assert np.isfinite(got).all()
        # A score of some thousand is known to some 1e-4 in float32, to 1 with keys in float16: rows with one winner.
        expected = model.logits(LONG, half=half)
        difference = np.abs(got - expected).max(axis=1) / expected.std()
        assert (difference < 0.01).mean() > (0.8 if half else 0.95)

    def test_what_lies_behind_a_position_does_not_matter(self) -> None:
        """Keys and values that are no numbers, of a text that was there before."""
        random = Random(8)
        model = random.model(layers=1)
        assert model.embedding is not None
        model.embedding.values[49] = np.nan
        decoder = model.decoder()
        expected = run(decoder, LONG[:70])
        kv = decoder.kv(half=False)
        decoder.step([(49, position, kv, None, 1.0, False) for position in range(200)])
        for position, token in enumerate(LONG[:70]):
            if token == 49:
                break
            got = decoder.step([(token, position, kv, None, 1.0, True)]).array[0]
            np.testing.assert_array_equal(got, expected[position])
        assert position > 20


@pytest.mark.parametrize("dim", [2, 31, 33, 64, 70])
@pytest.mark.parametrize("hidden", [1, 15, 33, 96])
def test_odd_widths(dim: int, hidden: int) -> None:
    model = Random(dim * hidden).model(dim=dim, hidden=hidden, heads=3, kv_heads=1, head_dim=6, vocab=51)
    assert_close(run(model.decoder(2), LONG[:20]), model.logits(LONG[:20]), 2e-5)


@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0, 1e30])
def test_the_gate_of_numbers_of_any_size(size: float) -> None:
    """Those far below zero give nothing, those far above themselves."""
    random = Random(9)
    model = random.model(layers=1)
    gate, up = model.layers[0].places[2].linears
    gate.values[...] *= np.float32(size)
    up.values[...] /= np.float32(size)
    with np.errstate(over="ignore"):
        assert_close(run(model.decoder(), LONG[:20]), model.logits(LONG[:20]), 2e-5 if size < 100 else 2e-4)


def test_a_cap_keeps_what_is_far_below_it() -> None:
    """Capped scores and logits are mostly small: each is as exact as a float is."""
    random = Random(20)
    model = random.model(layers=1)
    model.head.values[...] *= np.float32(10) ** random.draw.integers(-8, 3, (model.head.rows, 1))
    free, capped = (
        run(replace(model, rules=Rules(logit_cap=cap)).decoder(), LONG[:20]).astype(np.float64)
        for cap in (0.0, 50.0)
    )
    assert np.abs(free).min() < 1e-8 and np.abs(free).max() > 300
    np.testing.assert_allclose(capped, 50 * np.tanh(free / 50), rtol=4e-7)


def test_a_cap_does_not_hide_what_is_no_number() -> None:
    model = Random(21).model(layers=1, rules=Rules(logit_cap=50.0))
    model.head.values[7] = np.nan
    got = run(model.decoder(), LONG[:5])
    assert np.isnan(got[:, 7]).all() and np.isnan(got).sum() == len(got)


FREQUENCIES = [1.0, 0.3, 0.01, 0.0, 2.5, 0.125, 1e-6, 0.7]
# At position 199 an angle of 2.5 a step is known to 2e-5 in float32.
TURNED = 1e-4


def test_rotary_embeddings_by_layer() -> None:
    """Of any frequencies and scale, one for each layer, or none."""
    ropes = [(FREQUENCIES, (), 1.25), ([0.5] * 8, (), 1.0)]
    model = Random(10).model(ropes=ropes, rope=(0, None, 1), layers=3, sharpness=3.0)
    assert_close(run(model.decoder(), LONG), model.logits(LONG), TURNED)


@pytest.mark.parametrize("long_first", [True, False])
def test_long_texts_turn_by_other_frequencies(long_first: bool) -> None:
    """Where a rotary embedding has some. Long texts and others in one step, one of them further than the other."""
    others = [0.2, 1.5, *FREQUENCIES[2:]]
    ropes = [(FREQUENCIES, others, 1.25), ([0.5] * 8, (), 1.0)]
    model = Random(10).model(ropes=ropes, rope=(0, 1), layers=2, sharpness=3.0)
    both, only = model.decoder(), replace(model, ropes=[(others, (), 1.25), ropes[1]]).decoder()
    expected = {True: run(only, LONG), False: run(both, LONG)}
    kvs = {of_long: both.kv(half=False, of_long=of_long) for of_long in (long_first, not long_first)}
    lengths = {long_first: len(LONG), (not long_first): 9}
    for of_long, count in lengths.items():
        both.step([(token, at, kvs[of_long], None, 1.0, False) for at, token in enumerate(LONG[: count - 1])])
    last = [(LONG[count - 1], count - 1, kvs[of_long], None, 1.0, True) for of_long, count in lengths.items()]
    for got, (of_long, count) in zip(both.step(last).array, lengths.items(), strict=True):
        np.testing.assert_array_equal(got, expected[of_long][count - 1])
    assert not np.allclose(expected[True][8], expected[False][8], atol=1e-2)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 130])
def test_windows(window: int, kv_heads: int, threads: int) -> None:
    """By layer; a text of more than three blocks of positions, in steps of several rows and of one."""
    model = Random(window).model(window=(window, 0), kv_heads=kv_heads, sharpness=3.0)
    expected = model.logits(LONG)
    for chunk in (64, 1):
        assert_close(run(model.decoder(threads), LONG, chunk=chunk), expected, 5e-5)


@settings(max_examples=15)
@given(
    rules=st.builds(
        Rules,
        layer_norm=st.booleans(),
        norm_eps=st.sampled_from([1e-6, 1e-2]),
        parallel=st.booleans(),
        activation=st.sampled_from(["silu", "gelu_tanh", "relu2"]),
        gated=st.booleans(),
        embedding_scale=st.sampled_from([1.0, 3.0]),
        residual_scale=st.sampled_from([1.0, 0.25]),
        attention_scale=st.sampled_from([None, 0.5]),
        logit_scale=st.sampled_from([1.0, 0.0625]),
        score_cap=st.sampled_from([0.0, 2.0]),
        logit_cap=st.sampled_from([0.0, 1.5]),
        query_growth=st.sampled_from([0.0, 0.5]),
        growth_positions=st.sampled_from([1, 7]),
    ),
    norms=st.tuples(*[st.booleans()] * 4),
    bias=st.booleans(),
    head_norms=st.sampled_from([None, "head", "whole"]),
    window=st.sampled_from([(0,), (5, 0)]),
    threads=st.sampled_from([1, 3]),
    chunk=st.sampled_from([1, 9, 64]),
    seed=st.integers(0, 1000),
)
def test_any_rules(
    rules: Rules,
    norms: tuple[bool, bool, bool, bool],
    bias: bool,
    threads: int,
    chunk: int,
    seed: int,
    **options: Any,
) -> None:
    """All that a description may say, in any mixture."""
    model = Random(seed).model(
        rules=rules, norms=norms, norm_bias=bias and rules.layer_norm, bias=bias, **options
    )
    text = LONG[:80]
    expected = model.logits(text)
    # Without norms a residual grows, and relu² squares it: then the terms of a sum are larger than it, and rounding
    # what passes between the products alone loses as much. The sums within them are rounded too.
    lost = np.abs(model.logits(text, rounded=True) - expected).max()
    tolerance = 2e-4 * expected.std() + 8 * lost
    np.testing.assert_allclose(
        run(model.decoder(threads), text, chunk=chunk), expected, rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("threads", [1, 3])
class TestBranches:
    @pytest.mark.parametrize("of", ["q", "v gate", "o down", "k up", "q k v o gate up down"])
    @pytest.mark.parametrize("rank", [1, 4, 17, 40])
    @pytest.mark.parametrize("back", [FLOAT, EIGHT])
    def test_an_adapter_beside_floats(self, of: str, rank: int, back: Kind, threads: int) -> None:
        random = Random(rank)
        model = random.model(dim=48, hidden=70)
        adapter = random.adapter(model, rank, of, back=back)
        got = run(model.decoder(threads), LONG[:9], adapter=adapter.native(), scale=0.75)
        expected = model.logits(LONG[:9], adapter, 0.75)
        assert_close(got, expected, 2e-5)
        assert np.abs(expected - model.logits(LONG[:9])).max() > 0.05 * expected.std()

    def test_a_narrow_half_of_8_bits(self, threads: int) -> None:
        random = Random(11)
        model = random.model()
        adapter = random.adapter(model, 8, narrow=EIGHT, back=EIGHT)
        assert_close_but_for_codes(model, model.decoder(threads), adapter, 1.5)

    @pytest.mark.parametrize("rank", [3, 20])
    def test_corrections(self, rank: int, threads: int) -> None:
        random = Random(12)
        model = random.model(correction=rank)
        adapter = random.adapter(model, 5)
        assert_close_but_for_codes(model, model.decoder(threads), adapter)
        corrected = model.logits(LONG[:9])
        for layer in model.layers:
            layer.places[:] = [Place(linears=place.linears) for place in layer.places]  # type: ignore[index]
        assert np.abs(model.logits(LONG[:9]) - corrected).max() > 0.1


WITH_HEAD = MIXED | {"head": EIGHT}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"kind": FOUR},
        {"kind": FOUR, "offsets": True},
        {"kind": FOUR, "offsets": True, "correction": 4, "bias": True},
        {"kind": (4, 0)},
        {"kind": EIGHT, "bias": True},
        {"kind": EIGHT, "tied": True},
        {"kinds": WITH_HEAD, "bias": True},
        {"kinds": WITH_HEAD | {"embedding": FOUR}, "correction": 2},
        {"kinds": WITH_HEAD | {"embedding": EIGHT}, "head_dim": 32, "kv_heads": 1},
    ],
    ids=str,
)
def test_quantized_models(options: dict[str, Any], threads: int) -> None:
    model = Random(13).model(**options)
    assert_close_but_for_codes(model, model.decoder(threads))
