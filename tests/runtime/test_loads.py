"""While an adapter is read, only those wait who want that adapter."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from bedplate.bundle.store import Bundle
from bedplate.errors import MemoryFullError
from bedplate.runtime.engine import Engine
from bedplate.runtime.loading import load_adapter
from bedplate.runtime.session import Session

TEXT = list(range(20, 30))
SETTINGS: dict[str, Any] = {"max_tokens": 5, "temperature": 50.0, "seed": 1}


class Slow:
    """Reads of the adapter `all2` wait until they may."""

    def __init__(self) -> None:
        self.names: list[str] = []  # that were read
        self.waits, self.may = threading.Event(), threading.Event()

    def __call__(self, base: Any, bundle: Bundle, name: str, spec: Any) -> Any:
        self.names.append(name)
        if name == "all2":
            self.waits.set()
            assert self.may.wait(60)
        return load_adapter(base, bundle, name, spec)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    slow = Slow()
    monkeypatch.setattr("bedplate.runtime.loaded.load_adapter", slow)
    yield slow
    slow.may.set()


@pytest.fixture(scope="module")
def expected(toy_bundle: Bundle) -> dict[str | None, str]:
    with Engine(toy_bundle) as engine:
        names = (None, "all", "all2")
        return {name: engine.session(name).generate(TEXT, **SETTINGS) for name in names}


def generated(engine: Engine, name: str | None) -> str:
    return engine.session(name).generate(TEXT, **SETTINGS)


USES: dict[str, Callable[[Engine, Session], object]] = {
    "generation": lambda engine, _: generated(engine, "all"),
    "generation of the base": lambda engine, _: generated(engine, None),
    "step": lambda _, session: session.step([3]),
    "use": lambda _, session: session.use("all", scale=0.5),
    "fork": lambda _, session: session.fork().generate([3], **SETTINGS),
    "text": lambda engine, _: engine.tokenizer_of("all").encode("the quick"),
    "load": lambda engine, _: engine.load("all"),
    "unload": lambda engine, _: engine.unload("all"),
    "load of another": lambda engine, _: generated(engine, "all8"),
    "memory": lambda engine, _: engine.memory(),
}


@pytest.mark.parametrize("memory_bytes", [None, 100_000_000])
@pytest.mark.parametrize("use", USES)
def test_who_wants_others_does_not_wait(
    toy_bundle: Bundle, slow: Slow, expected: dict[str | None, str], use: str, memory_bytes: int | None
) -> None:
    with Engine(toy_bundle, memory_bytes=memory_bytes) as engine, ThreadPoolExecutor(2) as pool:
        session = engine.session("all")
        session.step(TEXT)
        other = pool.submit(generated, engine, "all2")
        assert slow.waits.wait(60)
        pool.submit(USES[use], engine, session).result(60)
        assert not other.done()
        assert generated(engine, "all") == expected["all"]
        slow.may.set()
        assert other.result(60) == expected["all2"]


def test_it_is_read_once_for_all_who_want_it(
    toy_bundle: Bundle, slow: Slow, expected: dict[str | None, str]
) -> None:
    with Engine(toy_bundle) as engine, ThreadPoolExecutor(4) as pool:
        answers: list[Future[str]] = [pool.submit(generated, engine, "all2") for _ in range(4)]
        assert slow.waits.wait(60)
        slow.may.set()
        assert [answer.result(60) for answer in answers] == [expected["all2"]] * 4
    assert slow.names == ["all2"]


@pytest.mark.parametrize("what", ["all2", None])
def test_it_is_unloaded_meanwhile(
    toy_bundle: Bundle, slow: Slow, expected: dict[str | None, str], what: str | None
) -> None:
    """Who waited for it has it, and nobody else."""
    with Engine(toy_bundle) as engine, ThreadPoolExecutor(1) as pool:
        session = engine.session("all2")
        stepped = pool.submit(session.step, TEXT)
        assert slow.waits.wait(60)
        engine.unload(what)
        slow.may.set()
        logits = stepped.result(60)
        assert engine.memory().adapters == {}
        assert generated(engine, "all2") == expected["all2"]
        assert slow.names == ["all2", "all2"]
        np.testing.assert_array_equal(logits, engine.session("all2").step(TEXT))


def test_its_memory_is_kept_for_it(toy_bundle: Bundle, slow: Slow) -> None:
    with Engine(toy_bundle) as engine:
        nbytes = engine.load("all").nbytes
    with Engine(toy_bundle, memory_bytes=nbytes * 3 // 2) as engine, ThreadPoolExecutor(1) as pool:
        other = pool.submit(engine.load, "all2")
        assert slow.waits.wait(60)
        with pytest.raises(MemoryFullError):
            engine.load("all")
        slow.may.set()
        other.result(60)
        del other  # it holds the weights
        assert list(engine.memory().adapters) == ["all2"]
        engine.load("all")  # takes the place of the other one
        assert list(engine.memory().adapters) == ["all"]


def test_a_failed_read_gives_its_memory_back(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    with Engine(toy_bundle) as engine:
        nbytes = engine.load("all").nbytes
    with Engine(toy_bundle, memory_bytes=nbytes * 3 // 2) as engine:
        with monkeypatch.context() as patch:
            patch.setattr("bedplate.runtime.loaded.load_adapter", fail)
            for _ in range(2):
                with pytest.raises(MemoryError):
                    engine.load("all")
        engine.load("all")
