"""What is unloaded, closed or reset holds nothing: no memory, no thread."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from os_threads import os_threads

from bedplate.bundle.store import Bundle
from bedplate.runtime.engine import Engine

TEXT = [5, 9, 13, 2, 7]


def holders(one: object) -> int:
    """How many references there are to an object of the native layer but for one that the caller has."""
    gc.collect()
    return sys.getrefcount(one) - 3


class TestThreads:
    def test_come_with_the_weights_and_end_with_them(self, toy_bundle: Bundle) -> None:
        before = os_threads()
        with Engine(toy_bundle, threads=4) as engine:
            assert os_threads(before) == before
            engine.session().step(TEXT)
            assert os_threads(before + 3) == before + 3
            engine.unload()
            assert os_threads(before) == before
            engine.session().step(TEXT)
            assert os_threads(before + 3) == before + 3
        assert os_threads(before) == before

    def test_end_with_the_last_generation_that_uses_them(self, toy_bundle: Bundle) -> None:
        before = os_threads()
        with Engine(toy_bundle, threads=4) as engine:
            pieces = engine.session().generate("ab", max_tokens=20, temperature=50.0, seed=2, stream=True)
            next(pieces)
            engine.unload()
            assert os_threads(before + 3) == before + 3
            list(pieces)
            assert os_threads(before) == before

    @pytest.mark.parametrize("end", ["close", "cancel", "forget"])
    def test_a_generation_that_nobody_reads_to_its_end_holds_none(self, toy_bundle: Bundle, end: str) -> None:
        before = os_threads()
        with Engine(toy_bundle, threads=2) as engine:
            session = engine.session()
            pieces = session.generate("ab", max_tokens=20, temperature=50.0, seed=2, stream=True)
            next(pieces)
            engine.unload()
            if end == "close":
                pieces.close()  # type: ignore[attr-defined]
            elif end == "cancel":
                session.cancel()
                list(pieces)
            else:
                del pieces
            assert os_threads(before) == before

    def test_of_two_engines_are_two(self, toy_bundle: Bundle) -> None:
        before = os_threads()
        with Engine(toy_bundle, threads=2) as one, Engine(toy_bundle, threads=3) as two:
            one.load()
            two.load()
            assert os_threads(before + 3) == before + 3
            one.close()
            assert os_threads(before + 2) == before + 2


class TestUnload:
    def test_what_is_used_again_is_loaded_again(self, toy_bundle: Bundle) -> None:
        with Engine(toy_bundle) as engine:
            session = engine.session()
            expected = session.step(TEXT)
            engine.unload()
            assert engine.memory().foundation == 0
            session.reset()
            np.testing.assert_array_equal(session.step(TEXT), expected)

    def test_keys_and_values_of_the_former_load_are_not_used(self, toy_bundle: Bundle) -> None:
        with Engine(toy_bundle) as engine:
            session, other = engine.session(), engine.session()
            session.step(TEXT[:3])
            other.generate("abcd", max_tokens=1)
            engine.unload()
            np.testing.assert_array_equal(session.step(TEXT[3:]), engine.session().step(TEXT))
            other.generate("abcd", max_tokens=1)
            assert other.last is not None and other.last.reused_tokens == 0

    def test_a_running_generation_keeps_its_weights(self, toy_bundle: Bundle) -> None:
        settings = {"max_tokens": 20, "temperature": 50.0, "seed": 2}
        for name in (None, "all"):
            with Engine(toy_bundle) as engine:
                expected = engine.session(name).generate("ab", **settings)
                pieces = engine.session(name).generate("ab", **settings, stream=True)
                text = next(pieces)
                engine.unload(name)
                assert text + "".join(pieces) == expected

    def test_sixteen_running_generations_keep_theirs(self, toy_bundle: Bundle) -> None:
        names, settings = [None, "all", "all2", "all8"] * 4, {"max_tokens": 12, "temperature": 50.0}
        with Engine(toy_bundle, cache_bytes=0) as engine:

            def begun(number: int) -> Iterator[str]:
                session = engine.session(names[number])
                return session.generate([number + 5, 9], seed=number, stream=True, **settings)

            expected = ["".join(begun(number)) for number in range(16)]
            for gone in ("all", None, "all8"):
                running = [begun(number) for number in range(16)]
                texts = [next(pieces) for pieces in running]
                engine.unload(gone)
                for number in range(16):
                    texts[number] += next(running[number], "")
                engine.unload()
                assert [text + "".join(rest) for text, rest in zip(texts, running, strict=True)] == expected
            assert engine.memory().foundation == 0

    def test_the_base_goes_with_all_adapters(self, toy_bundle: Bundle) -> None:
        with Engine(toy_bundle) as engine:
            session = engine.session("all")
            expected = session.step(TEXT)
            engine.unload()
            assert (engine.memory().foundation, engine.memory().adapters) == (0, {})
            session.reset()
            np.testing.assert_array_equal(session.step(TEXT), expected)

    def test_an_adapter_that_no_generation_uses_is_gone(self, toy_bundle: Bundle) -> None:
        """Also where sessions have generated with it, and go on holding what it computed."""
        with Engine(toy_bundle) as engine:
            session = engine.session("all")
            session.generate("ab", max_tokens=3)
            session.step([1])
            adapter, decoder = engine.load("all").adapter, engine.load().decoder
            assert holders(adapter) == 1
            engine.unload("all")
            assert holders(adapter) == 0 and session.kv_bytes > 0
            engine.unload()
            assert holders(decoder) == 0


class TestASession:
    def test_that_is_reset_holds_nothing(self, toy_bundle: Bundle) -> None:
        with Engine(toy_bundle) as engine:
            session = engine.session()
            session.step(TEXT)
            kv = session._held.kv
            assert session.kv_bytes > 0 and holders(kv) == 1
            session.reset()
            assert (session.tokens, session.kv_bytes, holders(kv)) == ((), 0, 0)

    def test_of_an_engine_that_is_closed_holds_nothing_and_can_be_used_again(
        self, toy_bundle: Bundle
    ) -> None:
        engine = Engine(toy_bundle, threads=2)
        session, before = engine.session("all8"), os_threads()
        expected = session.step(TEXT)
        engine.close()
        assert (session.tokens, session.kv_bytes, os_threads()) == ((), 0, before)
        np.testing.assert_array_equal(session.step(TEXT), expected)
        engine.close()


MEASURE = """
import ctypes, gc, os, sys
import bedplate
def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")
bundle = bedplate.Bundle.open(sys.argv[1])
def rounds(count):
    for _ in range(count):
        with bedplate.Engine(bundle, threads=2) as engine:
            for name in (None, *bundle.adapters):
                engine.session(name).step([1] * 100)
rounds(3)
before = resident()
rounds(60)
print(resident() - before, bundle.foundation.stat().st_size)
"""


def test_closing_gives_memory_back(toy_bundle: Bundle) -> None:
    command = [sys.executable, "-c", MEASURE, str(toy_bundle.path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, foundation = map(int, result.stdout.split())
    assert grown < 60 * foundation / 4  # of what as many foundations take


def test_steps_while_the_engine_is_closed(toy_bundle: Bundle) -> None:
    """Closing waits for no session that waits for the engine."""
    with Engine(toy_bundle, threads=1) as engine:
        expected = engine.session().step(TEXT)
        wrong: list[object] = []

        def work(use: Callable[[], object]) -> None:
            try:
                for _ in range(40):
                    use()
            except BaseException as error:
                wrong.append(error)

        def step() -> None:
            session = engine.session()
            if not np.array_equal(session.step(TEXT), expected):
                wrong.append("other logits")

        jobs = [threading.Thread(target=work, args=(use,)) for use in (step, step, engine.close)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join(timeout=60)
        assert not any(job.is_alive() for job in jobs) and not wrong
