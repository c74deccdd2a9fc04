"""Sums of adapters, each times its factor: against the formulas, and to the bit in any company."""

from __future__ import annotations

import functools
import weakref
from random import Random as Random_
from typing import Any

import numpy as np
import pytest
from company import Member, check
from formula import Model, Rules
from formula_adapters import Adapter, sum_of
from hypothesis import given, settings
from hypothesis import strategies as st
from random_adapters import PARTS, RandomAdapter
from random_models import EIGHT, FLOAT, FOUR, Random, run

from bedplate import _native
from bedplate._native import NativeError

pytestmark = pytest.mark.usefixtures("instruction_set")
TEXT = [int(token) for token in np.random.default_rng(0).integers(0, 50, 70)]
BRANCHES = ("branches", "embedding branch", "head branch")
Parts = list[tuple[Adapter, float]]


def native_sum(parts: Parts) -> _native.Adapter:
    return _native.Adapter.sum([(one.native(), factor) for one, factor in parts])


def random_parts(random: Random, model: Model, ranks: list[int], **kinds: Any) -> Parts:
    factors = random.draw.choice([1.0, 0.5, -0.7, 0.3], len(ranks))
    return [
        (RandomAdapter(random, model, BRANCHES, rank=rank, **kinds).make(), float(factor))
        for rank, factor in zip(ranks, factors, strict=True)
    ]


@settings(max_examples=20)
@given(
    ranks=st.lists(st.sampled_from([1, 5, 18, 40]), min_size=1, max_size=4),
    parallel=st.booleans(),
    tied=st.booleans(),
    scale=st.sampled_from([1.0, -0.5]),
    threads=st.sampled_from([1, 3]),
    chunk=st.sampled_from([1, 9, 64]),
    seed=st.integers(0, 1000),
)
def test_any_sum(
    ranks: list[int], parallel: bool, tied: bool, scale: float, threads: int, chunk: int, seed: int
) -> None:
    random = Random(seed)
    rules = Rules(parallel=parallel, embedding_scale=3.0, residual_scale=0.5, logit_scale=0.5)
    model = random.model(rules=rules, tied=tied, bias=True)
    parts, text = random_parts(random, model, ranks), TEXT[:40]
    expected = model.logits(text, sum_of(parts), scale)
    got = run(model.decoder(threads), text, adapter=native_sum(parts), scale=scale, chunk=chunk)
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-4 * expected.std())


@pytest.mark.parametrize("threads", [1, 3])
def test_of_codes_and_floats(threads: int) -> None:
    """Inputs are rounded to codes too, and few lie between two."""
    random = Random(5)
    model = random.model(kind=FOUR, kinds={"head": EIGHT}, bias=True, correction=3)
    parts = [
        *random_parts(random, model, [5, 20], back=EIGHT, narrow=EIGHT),
        *random_parts(random, model, [7]),
    ]
    texts, native, decoder = (
        [TEXT[i : i + 5] for i in range(0, 70, 5)],
        native_sum(parts),
        model.decoder(threads),
    )
    expected = np.stack([model.logits(text, sum_of(parts)) for text in texts])
    got = np.stack([run(decoder, text, adapter=native) for text in texts])
    worst = np.abs(got - expected).max(axis=(1, 2)) / expected.std()
    assert (worst < 5e-5).mean() > 0.5 and worst.max() < 0.2


# --- One row, one result

MODELS: dict[str, dict[str, Any]] = {
    "direct": {"kind": FOUR, "kinds": {"head": EIGHT}, "correction": 3},
    "aside": {
        "rules": Rules(residual_scale=0.5, logit_cap=2.0),
        "norms": (True, True, True, True),
        "dim": 40,
    },
}


@functools.cache
def model_of(name: str) -> tuple[Model, list[Adapter]]:
    """Adapters of one block of narrow values, of two and of three."""
    random = Random(20)
    model = random.model(**MODELS[name])
    kinds = [FLOAT, EIGHT, FLOAT]
    return model, [
        RandomAdapter(random, model, BRANCHES, rank=rank, narrow=kind, back=kind).make()
        for rank, kind in zip([3, 20, 33], kinds, strict=True)
    ]


@functools.cache
def decoder_of(
    name: str, instruction_set: str, threads: int
) -> tuple[_native.Decoder, list[_native.Adapter | None]]:
    model, adapters = model_of(name)
    _native.use_instruction_set(instruction_set)
    a, b, c = (adapter.native() for adapter in adapters)
    of = _native.Adapter.sum
    sums = [of([(a, 0.7), (b, 0.3)]), of([(b, -1.0), (c, 0.5)]), of([(a, 1.0), (b, 1.0), (c, 1.0), (a, 0.1)])]
    return model.decoder(threads), [None, a, b, c, *sums]


@functools.cache
def alone(name: str, instruction_set: str, number: int) -> Any:
    decoder, natives = decoder_of(name, instruction_set, 1)
    return run(decoder, TEXT, adapter=natives[number], chunk=1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(6))
def test_a_row_is_the_same_bits_in_any_company(name: str, seed: int, instruction_set: str) -> None:
    """Among rows of the base, of other sums and of their parts, in any order, pieces and number."""
    random, threads = Random_(seed), 1 + seed % 4
    decoder, natives = decoder_of(name, instruction_set, threads)
    group = random.choices(range(len(natives)), k=random.randint(2, 9))
    check(random, decoder, [Member(TEXT, natives[one], alone(name, instruction_set, one)) for one in group])


@pytest.mark.parametrize("name", MODELS)
def test_of_one_adapter_is_the_adapter(name: str, instruction_set: str) -> None:
    decoder, natives = decoder_of(name, instruction_set, 2)
    for at in (1, 2, 3):
        adapter = natives[at]
        assert adapter is not None
        for factor in (1.0, 0.3, -2.0):
            one = _native.Adapter.sum([(adapter, factor)])
            np.testing.assert_array_equal(
                run(decoder, TEXT, adapter=one), run(decoder, TEXT, adapter=adapter, scale=factor)
            )
            twice = _native.Adapter.sum([(_native.Adapter.sum([(adapter, 2.0)]), factor / 2)])
            np.testing.assert_array_equal(run(decoder, TEXT, adapter=twice), run(decoder, TEXT, adapter=one))
        nothing = _native.Adapter.sum([(adapter, 0.0), (adapter, 0.0)])
        np.testing.assert_array_equal(run(decoder, TEXT, adapter=nothing), alone(name, instruction_set, 0))


def test_lives_on_what_nobody_else_holds() -> None:
    random = Random(1)
    model = random.model()
    parts = random_parts(random, model, [4, 20])
    expected = run(model.decoder(), TEXT, adapter=native_sum(parts))
    natives = [(one.native(), factor) for one, factor in parts]
    sizes, watched = [one.nbytes for one, _ in natives], [weakref.ref(one) for one, _ in natives]
    whole = _native.Adapter.sum(natives)
    assert whole.nbytes == sum(sizes)
    assert _native.Adapter.sum([natives[0], natives[0]]).nbytes == sizes[0]
    del natives
    assert all(one() is not None for one in watched)
    np.testing.assert_array_equal(run(model.decoder(), TEXT, adapter=whole), expected)
    outer = _native.Adapter.sum([(whole, 1.0)])
    del whole
    np.testing.assert_array_equal(run(model.decoder(), TEXT, adapter=outer), expected)
    del outer
    assert all(one() is None for one in watched)


@pytest.mark.parametrize("part", [part for part in PARTS if part not in BRANCHES])
def test_what_has_more_than_branches(part: str) -> None:
    random = Random(3)
    model = random.model(head_norms="head")
    parts = {part, "head", "embedding"} if part == "more tokens" else {part}
    other = RandomAdapter(random, model, parts).make().native()
    plain = RandomAdapter(random, model, BRANCHES).make().native()
    for both in ([(plain, 1.0), (other, 1.0)], [(other, 1.0), (plain, 1.0)]):
        with pytest.raises(NativeError, match=r"more than branches|other tokens or other layers"):
            _native.Adapter.sum(both)


def test_what_is_no_sum() -> None:
    random = Random(3)
    model, longer = random.model(), random.model(layers=3)
    plain = RandomAdapter(random, model, BRANCHES).make().native()
    other = RandomAdapter(random, longer, BRANCHES).make().native()
    wider = RandomAdapter(random, random.model(dim=96), BRANCHES).make().native()
    for wrong, complaint in (
        ([], "a sum of no adapters"),
        ([(None, 1.0)], "an adapter that is none"),
        ([(plain, float("nan"))], "a factor of an adapter is no number"),
        ([(plain, 1e39)], "a factor of an adapter is no number"),
        ([(plain, 1.0), (other, 1.0)], "other tokens or other layers"),
    ):
        with pytest.raises((NativeError, TypeError), match=f"{complaint}|incompatible"):
            _native.Adapter.sum(wrong)  # type: ignore[arg-type]
    decoder = model.decoder()
    for unfitting in (_native.Adapter.sum([(plain, 1.0), (wider, 1.0)]), _native.Adapter.sum([(other, 1.0)])):
        with pytest.raises(NativeError):
            decoder.check(unfitting)
        with pytest.raises(NativeError):
            decoder.step([(1, 0, decoder.kv(half=True), unfitting, 1.0, True)])
