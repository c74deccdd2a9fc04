"""Draws of the native sampler against a plain formula in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from sampling_formula import chances, native_sampler
from test_logits import logits_of

from bedplate import _native

SEVERAL_BLOCKS = 300  # weights are summed in blocks of 128
EQUAL = st.sampled_from([-np.inf, -3.0, -0.0, 0.0, 1e-40, 1.0, 1.5])
ANY = st.floats(-30, 30, width=32)
LOGITS = st.one_of(
    arrays.arrays(np.float32, st.integers(2, SEVERAL_BLOCKS), elements=values) for values in (EQUAL, ANY)
)
RULES = st.fixed_dictionaries(
    {"temperature": st.floats(0.05, 5)},
    optional={
        "top_k": st.integers(1, SEVERAL_BLOCKS + 10),
        "top_p": st.floats(0.01, 1),
        "min_p": st.floats(0, 1),
        "repetition": st.floats(0.5, 2),
        "presence": st.floats(-2, 2),
        "frequency": st.floats(-2, 2),
        "bias": st.lists(st.tuples(st.integers(0, 400), st.floats(-100, 100)), max_size=5),
        "banned": st.lists(st.integers(0, 400), max_size=5),
        "ends": st.just([0, 1]),
        "min_tokens": st.integers(0, 5),
        "prompt": st.lists(st.integers(0, SEVERAL_BLOCKS), max_size=20),
    },
)


def words(allowed: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Packed bits, the lowest first, as llguidance and xgrammar give them."""
    padded = np.pad(allowed, (0, -len(allowed) % 32))
    return np.packbits(padded, bitorder="little").view("<i4")


def draws(logits: _native.Logits, count: int, **rules: Any) -> NDArray[np.int64]:
    """The first tokens of `count` generations, each with another seed."""
    chosen = [native_sampler(**rules, seed=seed).choose(logits) for seed in range(count)]
    return np.array(chosen, np.int64)


@settings(max_examples=80)
@given(logits=LOGITS, rules=RULES, data=st.data())
def test_chances_are_the_formula(
    instruction_set: str, logits: NDArray[np.float32], rules: dict[str, Any], data: st.DataObject
) -> None:
    given_logits = logits_of(logits, [0])
    row = given_logits.array[0]
    sampler, generated = native_sampler(**rules), []
    for _ in range(data.draw(st.integers(0, 3))):
        if (token := sampler.choose(given_logits)) is None:
            break
        generated.append(token)
    mask = data.draw(st.one_of(st.none(), arrays.arrays(bool, st.integers(0, len(row) + 40))))
    bits = None if mask is None else words(mask)
    got = np.array(sampler.chances(given_logits, 0, bits))
    # Weights are float32: a token whose sum is p within rounding may be kept or left out.
    fewest = chances(row, generated, mask, slack=-3e-6, **rules) > 0
    most = chances(row, generated, mask, slack=3e-6, **rules) > 0
    assert (got[fewest] > 0).all() and (got[~most] == 0).all()
    if (fewest == most).all():
        np.testing.assert_allclose(got, chances(row, generated, mask, **rules), rtol=2e-5, atol=1e-30)
    token = sampler.choose(given_logits, 0, bits)
    assert got[token] > 0 if got.any() else token is None


@given(logits=LOGITS, rules=RULES)
@settings(max_examples=40)
def test_every_instruction_set_gives_the_same(logits: NDArray[np.float32], rules: dict[str, Any]) -> None:
    given_logits, best = logits_of(logits, [0]), _native.instruction_set()
    found = []
    for name in _native.instruction_sets():
        _native.use_instruction_set(name)
        sampler = native_sampler(**rules)
        tokens = [sampler.choose(given_logits) for _ in range(5)]
        logprobs = given_logits.log_probabilities(0, 1, 3)
        found.append(repr((tokens, sampler.chances(given_logits), logprobs)))  # NaN equals NaN
    _native.use_instruction_set(best)
    assert len(set(found)) == 1


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.5, "top_p": 0.2},
        {"temperature": 1.5, "top_k": 5},
        {"top_k": 150, "top_p": 0.6, "min_p": 0.02},
        {"bias": [(200, 2.0)], "banned": [0], "min_p": 0.1},
    ],
)
def test_draws_follow_the_chances(rules: dict[str, Any]) -> None:
    logits = logits_of(np.random.default_rng(1).normal(size=260).astype(np.float32) * 2, [0])
    count = 20_000
    expected = chances(logits.array[0], **{"temperature": 1.0, **rules}) * count
    found = np.bincount(draws(logits, count, **rules), minlength=len(expected))
    assert not found[expected == 0].any()
    often, rare = expected >= 10, (expected > 0) & (expected < 10)  # chi-square takes the rare ones together
    expected = np.append(expected[often], max(expected[rare].sum(), 1e-9))
    found = np.append(found[often], found[rare].sum())
    square, freedom = ((found - expected) ** 2 / expected).sum(), often.sum()
    assert square < freedom + 4 * np.sqrt(2 * freedom)


@given(seed=st.integers(0, 2**64 - 1))
@settings(max_examples=20)
def test_random_numbers_are_those_of_philox(seed: int) -> None:
    """Of 512 tokens that are equally likely, a number from 0 to 1 chooses one by its first bits."""
    logits = logits_of(np.ones(512, np.float32), [0])
    sampler = native_sampler(seed=seed)
    for place in range(5):
        theirs = np.random.Philox(key=seed, counter=(place - 1) % 2**256).random_raw()
        assert sampler.choose(logits) == theirs >> 55


def test_a_draw_depends_on_its_seed_and_its_place_alone() -> None:
    logits = [logits_of(np.random.default_rng(i).normal(size=400).astype(np.float32), [0]) for i in range(6)]
    alone = native_sampler(seed=3)
    expected = [alone.choose(one) for one in logits]
    among, other = native_sampler(seed=3), native_sampler(seed=4)
    found, others = [], []
    for one in logits:
        found.append(among.choose(one))
        others.append(other.choose(one))
    assert found == expected != others


def test_of_equal_logits_the_lower_ids_are_kept() -> None:
    logits = logits_of(np.repeat(np.float32([1, 2]), 200), [0])
    kept = np.flatnonzero(native_sampler(top_k=130).chances(logits))
    np.testing.assert_array_equal(kept, np.arange(200, 330))
    kept = np.flatnonzero(native_sampler(top_k=201).chances(logits))
    np.testing.assert_array_equal(kept, [0, *range(200, 400)])
    halves = logits_of(np.zeros(256, np.float32), [0])
    np.testing.assert_array_equal(np.flatnonzero(native_sampler(top_p=0.5).chances(halves)), np.arange(128))
    np.testing.assert_array_equal(np.flatnonzero(native_sampler(top_p=0.501).chances(halves)), np.arange(129))


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-30, 1.0, 1e300])
def test_one_token_alone(temperature: float) -> None:
    values = np.full(300, -np.inf, np.float32)
    values[170] = -5
    logits = logits_of(values, [0])
    for rules in ({}, {"top_p": 0.1}, {"top_k": 7}, {"min_p": 1.0}):
        assert native_sampler(temperature=temperature, **rules).choose(logits) == 170


def test_next_to_temperature_0_the_likeliest_is_drawn() -> None:
    logits = logits_of(np.float32([0, 50, 49.9]), [0])
    assert native_sampler(temperature=5e-324).chances(logits) == [0, 1, 0]
    even = native_sampler(temperature=1e300).chances(logits)
    np.testing.assert_allclose(even, [1 / 3] * 3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
class TestAllowed:
    def test_none(self, temperature: float) -> None:
        logits = logits_of(np.ones(40, np.float32), [0])
        nothing = np.zeros(2, np.int32)
        assert native_sampler(temperature=temperature).choose(logits, 0, nothing) is None
        assert native_sampler(temperature=temperature).choose(logits, 0, nothing[:0]) is None
        banned = native_sampler(temperature=temperature, banned=list(range(40)))
        assert banned.choose(logits) is None and not any(banned.chances(logits))

    def test_what_a_mask_does_not_reach_is_not(self, temperature: float) -> None:
        logits = logits_of(np.arange(70, dtype=np.float32), [0])
        sampler = native_sampler(temperature=temperature)
        assert sampler.choose(logits, 0, words(np.arange(32) == 3)) == 3
        assert sampler.choose(logits, 0, words(np.arange(96) == 69)) == 69

    def test_ends_come_after_min_tokens(self, temperature: float) -> None:
        logits = logits_of(np.float32([50, 1, 50, 0]), [0])
        sampler = native_sampler(temperature=temperature, ends=[0, 2], min_tokens=3)
        tokens = [sampler.choose(logits) for _ in range(4)]
        assert {0, 2}.isdisjoint(tokens[:3]) and tokens[3] in (0, 2)

    @pytest.mark.parametrize("wrong", [np.nan, np.inf])
    def test_what_is_no_number(self, temperature: float, wrong: float) -> None:
        values = np.ones(300, np.float32)
        values[201] = wrong
        with pytest.raises(_native.NativeError, match="not numbers"):
            native_sampler(temperature=temperature, top_k=5).choose(logits_of(values, [0]))


def test_penalties_count_what_was_chosen() -> None:
    logits = logits_of(np.float32([4, 3, 2, 0]), [0])
    sampler = native_sampler(temperature=0.0, presence=0.5, frequency=1.0, repetition=1.0)
    # 4, then 4 - 1.5; 3, then 3 - 1.5; 2.5 again, then 4 - 2.5; 2, then 0.5; 1.5 of 0 and of 1
    assert [sampler.choose(logits) for _ in range(5)] == [0, 1, 0, 2, 0]


def test_huge_changes_stay_numbers() -> None:
    logits = logits_of(np.float32([3e38, -3e38, 1]), [0])
    sampler = native_sampler(temperature=1.0, repetition=1e-300, prompt=[0])
    assert sampler.choose(logits) == 0
    sampler = native_sampler(temperature=0.0, repetition=1e300, prompt=[0, 1])
    assert sampler.choose(logits) == 2


@settings(max_examples=40)
@given(logits=LOGITS, top=st.integers(0, 400), data=st.data())
def test_log_probabilities(logits: NDArray[np.float32], top: int, data: st.DataObject) -> None:
    given_logits = logits_of(logits, [1, 0])
    row = given_logits.array[1].astype(np.float64)
    if not np.isfinite(row).any():
        return
    chosen = data.draw(st.integers(0, len(row) - 1))
    expected = row - row.max() - np.log(np.exp(row - row.max()).sum())
    of_chosen, likeliest = given_logits.log_probabilities(1, chosen, top)
    np.testing.assert_allclose(of_chosen, expected[chosen], atol=2e-6)
    order = np.argsort(-row, kind="stable")[:top]
    assert [token for token, _ in likeliest] == order.tolist()
    np.testing.assert_allclose([value for _, value in likeliest], expected[order], atol=2e-6)


def test_rows_and_tokens_out_of_bounds() -> None:
    logits = logits_of(np.ones(4, np.float32), [0])
    with pytest.raises(_native.NativeError, match="no such row"):
        native_sampler().choose(logits, 1)
    for chosen, top in ((4, 0), (-1, 0), (0, -1)):
        with pytest.raises(_native.NativeError, match="out of bounds"):
            logits.log_probabilities(0, chosen, top)
    assert native_sampler(bias=[(9, 5.0)], banned=[4, -1]).choose(logits) in range(4)
