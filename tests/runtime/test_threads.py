"""Threads of an engine, and threads that use it: they do not get into each other's way."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence

import pytest

from bedplate.bundle.store import Bundle
from bedplate.runtime.engine import Engine
from bedplate.runtime.session import Session

TEXT = list(range(20, 30))
MANY = 4 * len(os.sched_getaffinity(0))


def step_seconds(sessions: Sequence[Session], enough: float = 0.0) -> float:
    """Of one step of each, in turns. What else the machine does only takes away, so the best of several counts.

    enough: tries for some seconds to be as fast as this.
    """
    times: list[float] = []
    while len(times) < 12 or (min(times) > enough > 0 and len(times) < 1000):
        for session in sessions:
            session.reset()
            session.step(TEXT)
        begin = time.perf_counter()
        for token in TEXT:
            for session in sessions:
                session.step([token])
        times.append((time.perf_counter() - begin) / len(TEXT))
    return min(times)


def test_an_engine_without_work_sleeps(toy_bundle: Bundle) -> None:
    with Engine(toy_bundle, threads=2) as one, Engine(toy_bundle, threads=MANY) as two:
        for engine in (one, two):
            engine.session().generate("the quick", max_tokens=5)
        time.sleep(0.05)
        begin = time.process_time()
        time.sleep(0.4)
        assert time.process_time() - begin < 0.1


def test_more_threads_than_cores(toy_bundle: Bundle) -> None:
    """They wait for each other a hundred times a step. If those that wait kept the cores, a step would take a hundred
    times as long.
    """
    with Engine(toy_bundle, threads=2) as few, Engine(toy_bundle, threads=MANY) as many:
        limit = 12 * step_seconds([few.session()])
        assert step_seconds([many.session()], limit) < limit


@pytest.mark.parametrize("threads", [2, MANY])
def test_two_engines_in_turns(toy_bundle: Bundle, threads: int) -> None:
    with Engine(toy_bundle, threads=2) as one, Engine(toy_bundle, threads=threads) as two:
        limit = 3 * sum(step_seconds([engine.session()]) for engine in (one, two))
        assert step_seconds([one.session(), two.session()], limit) < limit


def test_memory_may_be_asked_for_at_any_time(toy_bundle: Bundle) -> None:
    """While other threads load, compute and forget."""
    ended, failed = threading.Event(), []

    def work(number: int) -> None:
        try:
            while not ended.is_set():
                session = engine.session("all" if number % 2 else "all2")
                session.generate([number, *TEXT], max_tokens=3)
                session.fork().use("all8")
                engine.load("all8")
                engine.unload(None if number == 0 else "all8")
        except Exception as error:
            failed.append(error)

    with Engine(toy_bundle, threads=2, cache_bytes=1 << 20, memory_bytes=1 << 22) as engine:
        workers = [threading.Thread(target=work, args=[number]) for number in range(4)]
        for worker in workers:
            worker.start()
        longest = 0.0
        for _ in range(1000):
            begin = time.perf_counter()
            memory = engine.memory()
            longest = max(longest, time.perf_counter() - begin)
            assert min(memory.foundation, memory.kv, memory.cache, *memory.adapters.values(), 0) == 0
        ended.set()
        for worker in workers:
            worker.join()
    assert not failed
    assert longest < 1


def test_memory_waits_for_no_load(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    loading, asked = threading.Event(), threading.Event()

    def load(*_: object, **__: object) -> None:
        loading.set()
        assert asked.wait(10)
        raise MemoryError

    monkeypatch.setattr("bedplate.runtime.loaded.load_foundation", load)

    def refused() -> None:
        with pytest.raises(MemoryError):
            engine.load()

    with Engine(toy_bundle) as engine:
        thread = threading.Thread(target=refused)
        thread.start()
        loading.wait()
        assert engine.memory().foundation == 0
        asked.set()
        thread.join()
