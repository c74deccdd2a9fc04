"""One row, one result: what a row comes to depends on its text, its adapter and its scale, on nothing else."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from formula import Model, Rules
from formula_adapters import Adapter, Change
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import EIGHT, FOUR, MIXED, Random, run

from bedplate import _native

# Positions of three blocks of keys and values, in texts that begin alike: reuse of keys and values counts on it.
TEXT = [int(token) for token in np.random.default_rng(0).integers(0, 50, 140)]
MODELS: dict[str, dict[str, Any]] = {
    "float": {"bias": True, "dim": 40, "hidden": 70, "head_dim": 10},
    "offsets": {"kind": FOUR, "offsets": True, "correction": 3, "kinds": {"head": EIGHT}},
    # Norms after, of heads and of all heads, windows, caps: what no Llama has.
    "sandwich": {
        "kind": FOUR,
        "kinds": {"head": EIGHT},
        "norms": (True, True, True, True),
        "head_norms": "whole",
        "window": (3, 70),
        "rope": (0, None),
        "rules": Rules(
            activation="gelu_tanh", embedding_scale=8.0, residual_scale=0.5, score_cap=5.0, logit_cap=3.0
        ),
    },
    "parallel": {
        "norms": (True, False, False, False),
        "norm_bias": True,
        "head_norms": "head",
        "window": (66, 0),
        "rules": Rules(layer_norm=True, parallel=True, gated=False, activation="relu2", query_growth=0.5),
    },
    "mixed": {
        "kinds": MIXED,
        "heads": 6,
        "kv_heads": 1,
        "head_dim": 32,
        "correction": 20,
    },
}
# Ranks of one and of two blocks, in one step: each row's narrow values have their place.
ADAPTERS: list[dict[str, Any]] = [
    {"rank": 4, "of": "q k v o gate up down"},
    {"rank": 20, "of": "q v o", "narrow": EIGHT, "back": EIGHT},
    {"rank": 33, "of": "v gate down", "back": EIGHT},
]
SCALES = [1.0, 0.5, -2.0]


@functools.cache
def model_of(name: str) -> tuple[Model, list[Adapter]]:
    random = Random(20)
    model = random.model(**MODELS[name])
    return model, [random.adapter(model, **options) for options in ADAPTERS]


@functools.cache
def decoder_of(
    name: str, instruction_set: str, threads: int
) -> tuple[_native.Decoder, list[_native.Adapter | None]]:
    model, adapters = model_of(name)
    _native.use_instruction_set(instruction_set)
    return model.decoder(threads), [None, *(adapter.native() for adapter in adapters)]


@functools.cache
def alone(name: str, instruction_set: str, adapter: int, scale: float, half: bool) -> Any:
    """Logits of each position of TEXT: token by token, on one thread."""
    decoder, adapters = decoder_of(name, instruction_set, 1)
    return run(decoder, TEXT, adapter=adapters[adapter], scale=scale, half=half, chunk=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """TEXT in a session of its own. cuts: where its steps end.  back: how far it goes back once, to read on from."""

    adapter: int
    scale: float
    half: bool
    cuts: tuple[int, ...]
    back: int


texts = st.builds(
    Text,
    adapter=st.integers(0, len(ADAPTERS)),
    scale=st.sampled_from(SCALES),
    half=st.booleans(),
    cuts=st.lists(st.integers(1, len(TEXT)), min_size=1, max_size=8).map(lambda x: tuple(sorted(set(x)))),
    back=st.integers(0, len(TEXT)),
)


def pieces_of(text: Text) -> list[list[int]]:
    """The positions of each step."""
    ends = [0, *text.cuts]
    pieces = [list(range(a, b)) for a, b in itertools.pairwise(ends)]
    return [*pieces, list(range(min(text.back, text.cuts[-1]), text.cuts[-1]))]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=25)
@given(
    group=st.lists(texts, min_size=1, max_size=6),
    threads=st.integers(1, 4),
    random=st.randoms(use_true_random=False),
    half_wanted=st.booleans(),
)
def test_a_row_is_the_same_bits_in_any_company(
    name: str, group: list[Text], threads: int, random: Any, half_wanted: bool, instruction_set: str
) -> None:
    """Alone, among rows of other sessions, adapters and scales, in any order and any pieces, on any threads."""
    decoder, adapters = decoder_of(name, instruction_set, threads)
    sessions = [decoder.kv(half=text.half) for text in group]
    waiting = [pieces_of(text) for text in group]
    while any(waiting):
        rows = []
        for at, text in enumerate(group):
            if waiting[at] and random.random() < 0.8:
                for position in waiting[at].pop(0):
                    wanted = not half_wanted or random.random() < 0.5
                    row = (TEXT[position], position, sessions[at], adapters[text.adapter], text.scale, wanted)
                    rows.append(
                        (row, alone(name, instruction_set, text.adapter, text.scale, text.half)[position])
                    )
        random.shuffle(rows)
        if not rows:
            continue
        got = decoder.step([row for row, _ in rows]).array
        expected = [logits for row, logits in rows if row[-1]]
        assert got.shape == (len(expected), 50)
        for one, other in zip(got, expected, strict=True):
            assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("threads", [2, 4])
def test_many_rows_on_many_threads(name: str, threads: int, instruction_set: str) -> None:
    """Often enough that threads meet in every order."""
    decoder, adapters = decoder_of(name, instruction_set, threads)
    for _ in range(10):
        sessions = [decoder.kv(half=False) for _ in adapters]
        rows = [
            (token, position, kv, adapter, 1.0, True)
            for position, token in enumerate(TEXT[:24])
            for kv, adapter in zip(sessions, adapters, strict=True)
        ]
        got = decoder.step(rows).array.reshape(24, len(adapters), -1)
        for at in range(len(adapters)):
            expected = alone(name, instruction_set, at, 1.0, False)[:24]
            assert got[:, at].tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("adapter", range(1, len(ADAPTERS) + 1))
class TestScales:
    def test_none_of_an_adapter_is_the_base(self, name: str, adapter: int, instruction_set: str) -> None:
        base = alone(name, instruction_set, 0, 1.0, False)
        none = alone(name, instruction_set, adapter, 0.0, False)
        np.testing.assert_array_equal(none, base)
        assert not np.array_equal(alone(name, instruction_set, adapter, 1.0, False), base)

    @pytest.mark.parametrize("scale", [0.5, -2.0, 0.3])
    def test_a_scale_is_as_if_it_stood_in_b(
        self, name: str, adapter: int, scale: float, instruction_set: str
    ) -> None:
        """Up to the rounding of floats; by powers of two, to the bit."""
        decoder, _ = decoder_of(name, instruction_set, 1)
        adapters = model_of(name)[1]
        folded = with_b_times(adapters[adapter - 1], scale).native()
        got = alone(name, instruction_set, adapter, scale, False)
        expected = run(decoder, TEXT, adapter=folded)
        if scale != 0.3:
            np.testing.assert_array_equal(got, expected)
        elif (
            name == "float" and adapter == 1
        ):  # elsewhere inputs are rounded to codes, see test_layers_of_a_model
            np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * expected.std())
        else:
            assert np.median(np.abs(got - expected)) < 0.02 * expected.std()


def with_b_times(adapter: Adapter, scale: float) -> Adapter:
    def scaled(linear: Any) -> Any:
        if linear.bits == 32:
            return dataclasses.replace(linear, values=linear.values * np.float32(scale))
        return dataclasses.replace(linear, scales=linear.scales * np.float32(scale))

    def of_place(change: Change) -> Change:
        if change.branch is None:
            return change
        backs = [dataclasses.replace(back, whole=scaled(back.whole)) for back in change.branch.backs]
        return dataclasses.replace(change, branch=dataclasses.replace(change.branch, backs=backs))

    layers = [
        dataclasses.replace(layer, places=[of_place(change) for change in layer.places])
        for layer in adapter.layers
    ]
    return dataclasses.replace(adapter, layers=layers)


def test_steps_of_several_threads_take_turns(instruction_set: str) -> None:
    """Callers of one decoder at once, each with a session of its own."""
    decoder, adapters = decoder_of("mixed", instruction_set, 2)
    expected = [alone("mixed", instruction_set, at, 1.0, True)[:70] for at in range(len(adapters))]
    with ThreadPoolExecutor(4) as pool:
        chunks = [1, 3, 8, 64] * 2
        got = [
            (
                at % len(adapters),
                pool.submit(
                    run, decoder, TEXT[:70], adapter=adapters[at % len(adapters)], half=True, chunk=chunk
                ),
            )
            for at, chunk in enumerate(chunks)
        ]
        for at, result in got:
            assert result.result().tobytes() == expected[at].tobytes()
