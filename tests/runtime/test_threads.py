"""Threads of an engine, and threads that use it: they do not get into each other's way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from bedplate.bundle.store import Bundle
from bedplate.errors import RunError
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


TEXT_OF_MANY_STEPS = [(7 * at) % 300 + 5 for at in range(250)]


@pytest.mark.parametrize("call", ["step", "logits", "logprobs"])
def test_a_generation_does_not_wait_for_a_long_text(toy_bundle: Bundle, call: str) -> None:
    def compute(session: Session) -> object:
        found = getattr(session, call)(TEXT_OF_MANY_STEPS)
        return [one.logprob for one in found] if call == "logprobs" else found

    with Engine(toy_bundle, threads=2, cache_bytes=0) as engine:
        alone = compute(engine.session("all8"))
    with Engine(toy_bundle, threads=2, cache_bytes=0, max_step_rows=1) as engine:
        ended = threading.Event()

        def generate() -> None:
            while not ended.is_set():
                engine.session().generate([5], max_tokens=200)

        idle = engine.session().events(
            [5], max_tokens=200
        )  # so there is always one that runs: pieces are short
        next(idle)
        other = threading.Thread(target=generate)
        other.start()
        try:
            while engine.running < 2:
                time.sleep(0.0001)
            before = engine._scheduler.steps
            found = compute(engine.session("all8"))
            beside = engine._scheduler.steps - before
        finally:
            ended.set()
            other.join()
    assert beside > 3, "all of it was one turn"
    np.testing.assert_array_equal(found, alone)


def test_what_changes_a_session_waits_for_a_call_that_does(toy_bundle: Bundle) -> None:
    with Engine(toy_bundle, threads=1, cache_bytes=0, max_step_rows=1) as engine:
        running, session = engine.session().events([5], max_tokens=200), engine.session()
        next(running)  # so the call takes many turns
        reading = threading.Thread(target=session.step, args=(TEXT_OF_MANY_STEPS,))
        reading.start()
        while not session.tokens:
            time.sleep(0.0001)
        other = session.fork()
        assert other.tokens == tuple(TEXT_OF_MANY_STEPS)
        reading.join()


@pytest.mark.parametrize("what", ["generate", "logits", "step", "next"])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another thread"])
def test_a_handler_of_a_signal_cannot_use_other_sessions(toy_bundle: Bundle, what: str, beside: bool) -> None:
    """What it would wait for cannot go on before it returns: steps, or a wait for them, of its own thread."""
    said: list[str] = []
    settings: dict[str, Any] = {"max_tokens": 50, "ignore_eos": True}

    def handle(*_: object) -> None:
        try:
            uses[what]()
        except RunError as error:
            said.append(str(error))

    with Engine(toy_bundle, threads=1, cache_bytes=0) as engine, ThreadPoolExecutor(1) as pool:
        session, other = engine.session(), engine.session()
        events = engine.session().events([9, 8], **{**settings, "max_tokens": 240})
        uses: dict[str, Callable[[], object]] = {
            "generate": lambda: other.generate([5, 6], max_tokens=2),
            "logits": lambda: other.logits([5] * 200),
            "step": lambda: other.step([5]) if len(other.tokens) < 99 else other.reset(),
            "next": lambda: next(events, None),
        }
        alone = session.generate([5, 6, 7], **settings)
        ended = threading.Event()

        def busy() -> None:
            while not ended.is_set():
                engine.session().generate([3, 4], **settings)

        running = pool.submit(busy) if beside else None
        before = signal.signal(signal.SIGALRM, handle)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
            while len(said) < 20:
                assert session.generate([5, 6, 7], **settings) == alone
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            ended.set()
        if running is not None:
            running.result()
        refusals = {
            "a session is used within a step",
            "a session is used within a call that changes it",
        }
        if what == "next":  # the signal came again, while it was handled
            refusals.add("the next event of this generation is waited for elsewhere")
        assert {one.split("\n")[0] for one in said} <= refusals
        assert other.generate([5, 6], max_tokens=2) == engine.session().generate([5, 6], max_tokens=2)


def test_a_handler_of_a_signal_cannot_change_what_a_call_changes(toy_bundle: Bundle) -> None:
    """It runs in the thread of the call, which would wait for itself."""
    said: list[str] = []

    def handle(*_: object) -> None:
        try:
            session.reset()
        except RunError as error:
            said.append(str(error))

    with Engine(toy_bundle, threads=1, cache_bytes=0) as engine:
        session = engine.session()
        text = [5] * 250
        alone = session.step(text)
        session.reset()
        before = signal.signal(signal.SIGALRM, handle)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
            while not said:
                session.reset()
                logits = session.step(text)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert "a session is used within a" in said[0]
        np.testing.assert_array_equal(logits, alone)
