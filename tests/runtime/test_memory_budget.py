"""One budget for adapters, keys and values, and the cache: what is needed least goes first, then calls are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bedplate.bundle.store import Bundle
from bedplate.errors import RunError
from bedplate.runtime.engine import Engine

TEXT = [int(token) for token in np.random.default_rng(5).integers(2, 320, 150)]
FULL = r"the engine's memory is full: .* memory_bytes, [\d,]+\nhint: reset sessions"
BLOCK = 49_152


@pytest.fixture(scope="module")
def free(toy_bundle: Bundle) -> Iterator[Engine]:
    with Engine(toy_bundle, cache_bytes=0) as engine:
        yield engine


@pytest.fixture(scope="module")
def adapter_bytes(free: Engine) -> int:
    assert free.load().new_kv(False).block_nbytes == BLOCK
    sizes = [free.load(name).nbytes for name in ("all", "all2")]
    assert sizes[0] == sizes[1]
    return sizes[0]


def test_a_session_that_does_not_fit_is_refused_and_stays_as_it_was(toy_bundle: Bundle, free: Engine) -> None:
    with Engine(toy_bundle, memory_bytes=2 * BLOCK) as engine:
        session = engine.session()
        session.step(TEXT[:100])
        for call in (
            lambda: session.step(TEXT[:100]),
            lambda: session.logits(TEXT),
            lambda: session.generate(engine.tokenizer.decode(TEXT), max_tokens=1),
            lambda: engine.step([(session, [1]), (engine.session(), [1])]),
        ):
            with pytest.raises(RunError, match=FULL):
                call()
            assert session.tokens == tuple(TEXT[:100])
        np.testing.assert_array_equal(session.step([3]), free.session().step([*TEXT[:100], 3]))
        session.reset()
        np.testing.assert_array_equal(engine.session().step(TEXT[:128]), free.session().step(TEXT[:128]))


def test_tokens_that_are_only_proposed_need_no_memory(toy_bundle: Bundle) -> None:
    """The text ends with its block, and lookup proposes what would come after it."""
    settings: dict[str, Any] = {"max_tokens": 100, "logit_bias": {5: 100.0}}
    texts = []
    for lookup in (True, False):
        with Engine(toy_bundle, cache_bytes=0, memory_bytes=BLOCK, lookup=lookup) as engine:
            session, stop = engine.session(), engine.tokenizer.decode([5, 5])
            texts.append(session.generate([5] * 62, stop=[stop], **settings))
            assert session.last is not None and session.last.finish_reason == "stop"
    assert texts[0] == texts[1]


def test_a_generation_beside_a_call_that_is_refused_goes_on(toy_bundle: Bundle, free: Engine) -> None:
    settings = {"max_tokens": 20, "temperature": 50.0, "seed": 2}
    with Engine(toy_bundle, memory_bytes=BLOCK) as engine:
        session = engine.session()
        pieces = session.generate("ab", **settings, stream=True)
        text = next(pieces)
        for call in (lambda: session.step(TEXT[:100]), lambda: session.logits(TEXT[:100])):
            with pytest.raises(RunError, match=FULL):
                call()
        with pytest.raises(RunError, match=FULL):
            session.generate(engine.tokenizer.decode(TEXT), max_tokens=1)
        assert text + "".join(pieces) == free.session().generate("ab", **settings)


def test_a_generation_that_fills_it_ends_in_words(toy_bundle: Bundle, free: Engine) -> None:
    settings = {"max_tokens": 100, "temperature": 50.0, "seed": 1}
    with Engine(toy_bundle, memory_bytes=BLOCK) as engine:
        session, text = engine.session(), ""
        with pytest.raises(RunError, match=FULL):
            for piece in session.generate("ab", **settings, stream=True):
                text += piece
        assert free.session().generate("ab", **settings).startswith(text) and text
        assert len(session.tokens) == 64
        assert session.last is not None and session.last.finish_reason == "cancelled"


def test_the_cache_goes_first(toy_bundle: Bundle, free: Engine, adapter_bytes: int) -> None:
    with Engine(toy_bundle, memory_bytes=5 * BLOCK + adapter_bytes) as engine:
        engine.load("all")
        for token in (1, 2):
            engine.session().step([token, *TEXT[:127]])
        assert (engine.memory().kv, engine.memory().cache) == (0, 4 * BLOCK)
        session = engine.session()
        np.testing.assert_array_equal(session.step(TEXT), free.session().step(TEXT))
        assert (engine.memory().kv, engine.memory().cache) == (3 * BLOCK, 2 * BLOCK)
        assert set(engine.memory().adapters) == {"all"}


def test_then_adapters_that_no_session_uses(toy_bundle: Bundle, free: Engine, adapter_bytes: int) -> None:
    limit = adapter_bytes + free.load("all8").nbytes + 2 * BLOCK
    with Engine(toy_bundle, memory_bytes=limit) as engine:
        user = engine.session("all8")
        user.step([1])
        engine.load("all")
        first = engine.load("all8")
        assert set(engine.memory().adapters) == {"all", "all8"}
        assert engine.load("all2").nbytes == adapter_bytes
        assert set(engine.memory().adapters) == {"all8", "all2"}, "all was used least recently"
        assert engine.load("all8") is first
        size = engine.memory()
        assert sum(size.adapters.values()) + size.kv + size.cache <= limit
        expected = free.session("all").step(TEXT[:64])
        np.testing.assert_array_equal(engine.session("all").step(TEXT[:64]), expected)


def test_an_adapter_that_does_not_fit(toy_bundle: Bundle, adapter_bytes: int) -> None:
    with Engine(toy_bundle, memory_bytes=adapter_bytes + BLOCK) as engine:
        session = engine.session("all")
        session.step(TEXT[:64])
        other = engine.session("all2")
        with pytest.raises(RunError, match=FULL):
            other.step([1])
        assert (set(engine.memory().adapters), session.tokens) == ({"all"}, tuple(TEXT[:64]))
        assert other.tokens == ()
        del other
        with pytest.raises(RunError, match=FULL):
            engine.session("all2").step([1])
        session.use(None)
        engine.session("all2").step([1])
        assert set(engine.memory().adapters) == {"all2"}


def test_a_fork_and_a_file_need_room_too(toy_bundle: Bundle, tmp_path: Path, free: Engine) -> None:
    path = tmp_path / "saved"
    saved = free.session()
    saved.step(TEXT)
    saved.save(path)
    with Engine(toy_bundle, memory_bytes=4 * BLOCK) as engine:
        session = engine.load_session(path)
        assert engine.memory().kv == 3 * BLOCK
        with pytest.raises(RunError, match=FULL):
            engine.load_session(path)
        forks = [session.fork(), session.fork()]
        np.testing.assert_array_equal(forks[0].step([3]), free.session().step([*TEXT, 3]))
        with pytest.raises(RunError, match=FULL):
            forks[1].step([3])
        assert forks[1].tokens == tuple(TEXT)
        forks[0].reset()
        np.testing.assert_array_equal(forks[1].step([4]), free.session().step([*TEXT, 4]))


def test_of_nothing_computes_nothing(toy_bundle: Bundle) -> None:
    with Engine(toy_bundle, memory_bytes=0) as engine, pytest.raises(RunError, match=FULL):
        engine.session().step([1])
