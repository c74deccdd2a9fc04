"""Adapters that change anything, against the formulas, on every instruction set; and many of them in one step."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from random import Random as Random_
from typing import Any

import numpy as np
import pytest
from company import Member, check
from formula import Model, Rules
from formula_adapters import Adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from random_adapters import PARTS, RandomAdapter
from random_models import EIGHT, FLOAT, FOUR, Random, run

from bedplate import _native

pytestmark = pytest.mark.usefixtures("instruction_set")
TEXT = [int(token) for token in np.random.default_rng(0).integers(0, 50, 70)]
RULES = {
    "llama": Rules(),
    "scaled": Rules(embedding_scale=3.0, residual_scale=0.5, logit_scale=0.5, logit_cap=2.0),
    "layer norm": Rules(layer_norm=True, parallel=True, gated=False, activation="gelu_tanh", logit_cap=1.5),
}


def text_of(adapter: Adapter, length: int) -> list[int]:
    """Tokens of its whole vocabulary."""
    return [token * adapter.vocab // 50 for token in TEXT[:length]]


@settings(max_examples=25)
@given(
    parts=st.one_of(st.sets(st.sampled_from(PARTS)), st.just(set(PARTS))),
    rules=st.sampled_from(list(RULES)),
    norms=st.tuples(st.just(True), st.booleans(), st.just(True), st.booleans()),
    head_norms=st.sampled_from([None, "head", "whole"]),
    tied=st.booleans(),
    correction=st.sampled_from([0, 3]),
    rank=st.sampled_from([1, 5, 18]),
    scale=st.sampled_from([1.0, -0.5]),
    threads=st.sampled_from([1, 3]),
    chunk=st.sampled_from([1, 9, 64]),
    seed=st.integers(0, 1000),
)
def test_any_mixture(
    parts: set[str], rules: str, rank: int, scale: float, threads: int, chunk: int, seed: int, **options: Any
) -> None:
    random = Random(seed)
    model = random.model(rules=RULES[rules], norm_bias=RULES[rules].layer_norm, bias=True, **options)
    for place in itertools.chain(*(layer.places for layer in model.layers)) if options["correction"] else ():
        assert place.correction is not None  # as floats: inputs are not rounded to codes then
        floats = random.branch([x.rows for x in place.linears], place.linears[0].columns, 3)
        object.__setattr__(place, "correction", floats)
    adapter = RandomAdapter(random, model, parts, rank=rank).make()
    text = text_of(adapter, 40)
    expected = model.logits(text, adapter, scale)
    got = run(model.decoder(threads), text, adapter=adapter.native(), scale=scale, chunk=chunk)
    assert got.shape == (len(text), adapter.vocab) and np.isfinite(expected).all()
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-4 * expected.std())


@pytest.mark.parametrize("part", PARTS)
def test_each_part_changes_what_comes_out(part: str) -> None:
    """So no mixture passes because a part is empty, on both sides."""
    random = Random(3)
    model = random.model(head_norms="head")
    parts = {part, "head", "embedding"} if part == "more tokens" else {part}
    adapter = RandomAdapter(random, model, parts).make()
    got = run(model.decoder(), TEXT[:20], adapter=adapter.native())
    assert np.abs(got[:, :50] - run(model.decoder(), TEXT[:20])).max() > 0.01


@pytest.mark.parametrize("kind", [(4, 0), EIGHT, FLOAT])
@pytest.mark.parametrize("threads", [1, 3])
def test_quantized_parts(kind: tuple[int, int], threads: int) -> None:
    """Codes of an embedding, of a head and of branches. Inputs are rounded to codes too, and few lie between two."""
    random = Random(5)
    model = random.model(kind=FOUR, kinds={"head": EIGHT}, bias=True, correction=3)
    adapter = RandomAdapter(random, model, PARTS, back=EIGHT, narrow=EIGHT, kind=kind).make()
    texts = [text_of(adapter, 70)[first : first + 5] for first in range(0, 70, 5)]
    native, decoder = adapter.native(), model.decoder(threads)
    expected = np.stack([model.logits(text, adapter) for text in texts])
    got = np.stack([run(decoder, text, adapter=native) for text in texts])
    worst = np.abs(got - expected).max(axis=(1, 2)) / expected.std()
    assert (worst < 5e-5).mean() > 0.5 and worst.max() < 0.2


# --- One row, one result

SETS: list[set[str]] = [
    set(),
    {"branches"},
    {"branches", "factors", "norms", "head branch", "embedding branch"},
    {"shifts", "head norms", "head rows", "embedding rows", "more tokens"},
    {"head", "embedding", "head affine", "factors", "more tokens", "branches"},
    {"head", "head branch", "head rows", "norms"},
]
MODELS: dict[str, dict[str, Any]] = {
    "direct": {"kind": FOUR, "kinds": {"head": EIGHT}, "correction": 3},
    "scaled": {"rules": RULES["scaled"], "norms": (True, True, True, True), "head_norms": "whole", "dim": 40},
    "parallel": {
        "hidden": 70,
        "head_dim": 10,
        "rules": RULES["layer norm"],
        "norm_bias": True,
        "head_norms": "head",
    },
}


@functools.cache
def adapters_of(name: str) -> tuple[Model, list[Adapter]]:
    random = Random(20)
    model = random.model(**MODELS[name])
    kinds = [FLOAT, EIGHT]
    return model, [
        RandomAdapter(random, model, parts, rank=3 + 7 * at, kind=kinds[at % 2], back=kinds[at % 2]).make()
        for at, parts in enumerate(SETS)
    ]


@functools.cache
def decoder_of(name: str, instruction_set: str, threads: int) -> tuple[Any, list[_native.Adapter | None]]:
    model, adapters = adapters_of(name)
    _native.use_instruction_set(instruction_set)
    return model.decoder(threads), [None, *(adapter.native() for adapter in adapters)]


@functools.cache
def alone(name: str, instruction_set: str, number: int) -> Any:
    """Logits of each position of a text, token by token, on one thread."""
    decoder, natives = decoder_of(name, instruction_set, 1)
    return run(decoder, text_at(name, number), adapter=natives[number], chunk=1)


def text_at(name: str, number: int) -> list[int]:
    return TEXT if number == 0 else text_of(adapters_of(name)[1][number - 1], len(TEXT))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(6))
def test_a_row_is_the_same_bits_in_any_company(name: str, seed: int, instruction_set: str) -> None:
    """Among rows of the base and of other adapters, in any order, pieces and number, wanted or not."""
    random, threads = Random_(seed), 1 + seed % 4
    decoder, natives = decoder_of(name, instruction_set, threads)
    group = random.choices(range(len(natives)), k=random.randint(1, 9))
    check(
        random,
        decoder,
        [Member(text_at(name, one), natives[one], alone(name, instruction_set, one)) for one in group],
    )


def test_an_adapter_that_changes_nothing_is_the_base() -> None:
    model, adapters = adapters_of("direct")
    decoder = model.decoder(2)
    np.testing.assert_array_equal(run(decoder, TEXT, adapter=adapters[0].native()), run(decoder, TEXT))


def test_other_layers_take_a_step_of_their_own() -> None:
    random = Random(6)
    model = random.model(layers=3)
    adapters = [RandomAdapter(random, model, {"branches", "layers"}).make().native() for _ in range(2)]
    decoder = model.decoder(2)
    sessions = [(decoder.kv(half=True, adapter=one), one) for one in (None, *adapters)]
    rows = [(1, 0, kv, adapter, 1.0, True) for kv, adapter in sessions]
    for several in itertools.combinations(rows, 2):
        with pytest.raises(_native.NativeError, match="rows of one step have other layers"):
            decoder.step(list(several))
    for row in rows:
        decoder.step([row])
    with pytest.raises(_native.NativeError, match="another adapter's"):
        decoder.step([(1, 0, sessions[0][0], adapters[0], 1.0, True)])


def test_an_adapter_says_what_it_takes() -> None:
    random = Random(0)
    model = random.model(dim=64, layers=1, head_norms="head")
    plain = RandomAdapter(random, model, set()).make()
    assert plain.native().nbytes == 0
    for part in PARTS[1:]:  # of branches: test_refusals.py
        adapter = RandomAdapter(random, model, {part}, rank=16).make()
        assert 0.8 * size_of(adapter) <= adapter.native().nbytes <= 2 * size_of(adapter), part
    own = dataclasses.replace(plain, norm=(np.ones(64, np.float32), None))
    assert own.native().nbytes == 4 * 64


def size_of(one: Any) -> int:
    """Bytes of all numbers in an adapter. Memory is filled up to blocks; of factor and shift it has both or none."""
    if isinstance(one, np.ndarray):
        return one.nbytes
    if dataclasses.is_dataclass(one):
        return sum(size_of(getattr(one, field.name)) for field in dataclasses.fields(one))
    return sum(map(size_of, one)) if isinstance(one, (list, tuple)) else 0
