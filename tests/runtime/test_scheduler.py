"""Generations that go on at the same time are computed together, and none of them can tell."""

from __future__ import annotations

import asyncio
import gc
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from itertools import zip_longest
from typing import Any, cast

import pytest
from os_threads import os_threads

from bedplate import _native
from bedplate.bundle.store import Bundle
from bedplate.errors import RunError
from bedplate.runtime import steps
from bedplate.runtime.engine import Engine
from bedplate.runtime.loading import load_adapter
from bedplate.runtime.request import Event
from bedplate.runtime.session import Session
from bedplate.runtime.shares import Shares
from bedplate.runtime.tokenizer import Tokenizer
from bedplate.runtime.weights import Weights

LONG = "the quick brown fox jumps over the lazy dog and runs away " * 3
HOT: dict[str, Any] = {"max_tokens": 25, "temperature": 50.0}
Request = tuple[str | None, str, dict[str, Any]]
REQUESTS: list[Request] = [
    (name, prompt, {**HOT, "seed": seed})
    for seed, (name, prompt) in enumerate(
        (name, prompt)
        for name in (None, "all", "all8")
        for prompt in ("ab", LONG, "pack my box with five dozen jugs")
    )
]


@pytest.fixture(scope="module")
def expected(toy_bundle: Bundle) -> list[str]:
    """What each request gives alone."""
    with Engine(toy_bundle, cache_bytes=0, lookup=False) as engine:
        return [engine.session(name).generate(prompt, **options) for name, prompt, options in REQUESTS]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sessions each native step computes."""
    counts: list[int] = []
    compute = steps.compute

    def counting(parts: Sequence[steps.Part]) -> _native.Logits:
        counts.append(len(parts))
        return compute(parts)

    monkeypatch.setattr("bedplate.runtime.scheduler.compute", counting)
    return counts


def begin(engine: Engine, request: Request) -> Iterator[str]:
    name, prompt, options = request
    return engine.session(name).generate(prompt, stream=True, **options)


@pytest.mark.parametrize("max_step_rows", [1, 5, 64])
def test_of_one_thread_in_turn(
    toy_bundle: Bundle, expected: list[str], counted: list[int], max_step_rows: int
) -> None:
    with Engine(toy_bundle, max_step_rows=max_step_rows) as engine:
        pieces = zip_longest(*(begin(engine, request) for request in REQUESTS), fillvalue="")
        texts = ["".join(own) for own in zip(*pieces, strict=True)]
    assert texts == expected
    assert max(counted) == min(max_step_rows, len(REQUESTS))


def test_of_many_threads(toy_bundle: Bundle, expected: list[str], counted: list[int]) -> None:
    ready = threading.Barrier(len(REQUESTS))

    def answer(request: Request) -> str:
        pieces = begin(engine, request)
        ready.wait()
        return "".join(pieces)

    with Engine(toy_bundle) as engine, ThreadPoolExecutor(len(REQUESTS)) as pool:
        for _ in range(3):
            assert list(pool.map(answer, REQUESTS)) == expected
    assert max(counted) == len(REQUESTS)


def test_of_tasks(toy_bundle: Bundle, expected: list[str], counted: list[int]) -> None:
    async def answer(request: Request) -> str:
        name, prompt, options = request
        return await engine.session(name).generate_async(prompt, **options)

    async def all_answers() -> list[str]:
        return await asyncio.gather(*map(answer, REQUESTS))

    before = os_threads()
    with Engine(toy_bundle, threads=1) as engine:
        for _ in range(2):
            assert asyncio.run(all_answers()) == expected
    assert max(counted) > 1
    assert os_threads(before) == before


def test_of_tasks_and_threads_at_once(toy_bundle: Bundle, expected: list[str]) -> None:
    async def answers() -> list[str]:
        async def answer(request: Request) -> str:
            name, prompt, options = request
            session = engine.session(name)
            return "".join([event.text async for event in session.events_async(prompt, **options)])

        return await asyncio.gather(*map(answer, REQUESTS))

    with Engine(toy_bundle) as engine, ThreadPoolExecutor(len(REQUESTS) + 1) as pool:
        for _ in range(3):
            tasks = pool.submit(asyncio.run, answers())
            assert list(pool.map(lambda request: "".join(begin(engine, request)), REQUESTS)) == expected
            assert tasks.result() == expected


def test_a_loop_goes_on_while_its_tasks_wait(toy_bundle: Bundle) -> None:
    async def both() -> int:
        ticks = 0
        task = asyncio.create_task(engine.session().generate_async(LONG, max_tokens=60, ignore_eos=True))
        while not task.done():
            ticks += 1
            await asyncio.sleep(0)
        return ticks

    with Engine(toy_bundle) as engine:
        engine.load()
        assert asyncio.run(both()) > 20


def test_a_task_that_is_cancelled_ends_its_generation(toy_bundle: Bundle, expected: list[str]) -> None:
    async def leave() -> Session:
        session = engine.session()
        async with aclosing(session.events_async("ab", max_tokens=10_0, temperature=50.0)) as events:
            await anext(events)
            task = asyncio.create_task(engine.session().generate_async(LONG, **HOT))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        return session

    with Engine(toy_bundle) as engine:
        session = asyncio.run(leave())
        assert session.last is not None and session.last.finish_reason == "cancelled"
        assert not engine._scheduler._active
        assert "".join(begin(engine, REQUESTS[0])) == expected[0]


def test_a_task_that_is_cancelled_while_it_starts(
    toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    starting, may = threading.Event(), threading.Event()
    encode = Tokenizer.encode

    def waiting(self: Tokenizer, text: str) -> list[int]:
        starting.set()
        may.wait()
        return encode(self, text)

    async def leave() -> None:
        task = asyncio.create_task(engine.session().generate_async("ab", max_tokens=5))
        await asyncio.to_thread(starting.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not engine._scheduler._active
        may.set()

    with Engine(toy_bundle) as engine:
        monkeypatch.setattr(Tokenizer, "encode", waiting)
        asyncio.run(leave())
        gc.collect()
        assert not engine._scheduler._active


def test_what_is_refused_reaches_the_task(toy_bundle: Bundle) -> None:
    with Engine(toy_bundle) as engine, pytest.raises(RunError, match="max_tokens is 0"):
        asyncio.run(engine.session().generate_async("ab", max_tokens=0))


class TestAlone:
    def test_it_is_not_ahead_of_its_caller(self, toy_bundle: Bundle) -> None:
        with Engine(toy_bundle, lookup=False) as engine:
            session = engine.session()
            pieces = session.events("fox", max_tokens=20, ignore_eos=True)
            said = 0
            for _ in range(5):
                said += len(next(pieces).tokens)
                assert session.last is not None and session.last.generated_tokens == said

    def test_no_thread_is_made(self, toy_bundle: Bundle) -> None:
        before = os_threads()
        with Engine(toy_bundle, threads=1) as engine:
            pieces = engine.session().generate("fox", max_tokens=20, stream=True)
            next(pieces)
            assert os_threads() == before


class TestWhoDoesNotAsk:
    def test_it_is_a_few_events_ahead_at_most(self, toy_bundle: Bundle) -> None:
        with Engine(toy_bundle, lookup=False) as engine:
            idle, busy = engine.session(), engine.session("all")
            events = idle.events("ab", max_tokens=60, ignore_eos=True, seed=1, temperature=50.0)
            busy.generate("ab", max_tokens=60, ignore_eos=True)
            assert idle.last is not None and busy.last is not None
            assert busy.last.generated_tokens == 60
            assert 8 <= idle.last.generated_tokens < 30
            alone = engine.session().generate("ab", max_tokens=60, ignore_eos=True, seed=1, temperature=50.0)
            assert "".join(event.text for event in events) == alone

    def test_it_ends_when_nobody_holds_it(self, toy_bundle: Bundle) -> None:
        with Engine(toy_bundle) as engine:
            session = engine.session()
            events = session.events("ab", max_tokens=60)
            assert len(engine._scheduler._active) == 1
            del events
            gc.collect()
            assert not engine._scheduler._active
            assert session.last is not None and session.last.finish_reason == "cancelled"


class TestCancel:
    def test_while_another_thread_drives(self, toy_bundle: Bundle) -> None:
        with Engine(toy_bundle) as engine, ThreadPoolExecutor(3) as pool:
            sessions = [engine.session() for _ in range(3)]
            endless = {"max_tokens": 110, "ignore_eos": True, "temperature": 50.0}
            for _ in range(5):
                answers = [pool.submit(one.generate, "ab", **endless) for one in sessions]
                while any(one.last is None or not one.last.generated_tokens for one in sessions):
                    time.sleep(0.001)
                for one in sessions:
                    one.cancel()
                for answer in answers:
                    answer.result(timeout=10)

    def test_close_ends_all(self, toy_bundle: Bundle) -> None:
        engine = Engine(toy_bundle)
        with ThreadPoolExecutor(4) as pool:
            sessions = [engine.session() for _ in range(4)]
            started = threading.Barrier(5)

            def answer(session: Session) -> str:
                pieces = session.generate("ab", max_tokens=110, ignore_eos=True, stream=True)
                text = next(pieces)
                started.wait()
                return text + "".join(pieces)

            answers = [pool.submit(answer, one) for one in sessions]
            started.wait()
            engine.close()
            for one in answers:
                one.result(timeout=10)
            assert all(one.last is not None and one.last.finish_reason for one in sessions)

    def test_who_was_to_drive_next(self, toy_bundle: Bundle) -> None:
        """Another one that waits drives in its place: nobody waits for ever."""
        text = [5 + i % 50 for i in range(60)]
        with Engine(toy_bundle, max_step_rows=2, lookup=False, cache_bytes=0) as engine:
            drawn = random.Random(0)
            for _ in range(60):
                first, cancelled, last = (engine.session() for _ in range(3))
                ended = threading.Event()
                events = [
                    first.events(text[:20], max_tokens=1),
                    *(one.events(text, max_tokens=2) for one in (cancelled, last)),
                ]
                threads = [threading.Thread(target=list, args=(one,), daemon=True) for one in events[1:]]
                threads.append(threading.Thread(target=lambda: (list(events[0]), ended.set()), daemon=True))  # noqa: B023
                for thread in threads:
                    thread.start()
                ended.wait()
                time.sleep(drawn.uniform(0, 0.0002))
                cancelled.cancel()
                for thread in threads:
                    thread.join(10)
                assert not any(thread.is_alive() for thread in threads)

    def test_by_whoever_forgets_them_anywhere(self, toy_bundle: Bundle, expected: list[str]) -> None:
        """The collector finds iterators that refer to each other in the midst of anything."""

        class Cycle:
            pass

        threshold = gc.get_threshold()
        gc.set_threshold(20, 2, 2)
        try:
            with Engine(toy_bundle) as engine, ThreadPoolExecutor(3) as pool:

                def answers(number: int) -> None:
                    for i in range(12):
                        cycle: Any = Cycle()
                        cycle.own = cycle
                        cycle.events = engine.session().events("ab", key=str(i % 3), max_tokens=40)
                        next(cycle.events)
                        del cycle
                        request = REQUESTS[(number + i) % len(REQUESTS)]
                        assert "".join(begin(engine, request)) == expected[(number + i) % len(REQUESTS)]
                        engine.memory()

                list(pool.map(answers, range(3)))
        finally:
            gc.set_threshold(*threshold)


def test_events_are_read_by_one_thread_at_a_time(toy_bundle: Bundle) -> None:
    reading, may = threading.Event(), threading.Event()

    def slow(chosen: tuple[int, ...]) -> None:
        reading.set()
        may.wait(10)

    with Engine(toy_bundle) as engine, ThreadPoolExecutor(1) as pool:
        events = engine.session().events("ab", max_tokens=5, ignore_eos=True, mask=slow)
        others = pool.submit(list, events)
        reading.wait()
        with pytest.raises(RunError, match=r"the next event of .* is waited for elsewhere\nhint: "):
            next(events)
        may.set()
        assert others.result()[-1].finish_reason == "length"


def test_threads_that_outlive_the_main_one_get_their_answers(toy_bundle: Bundle) -> None:
    script = """
import asyncio, sys, threading
from contextlib import aclosing
from bedplate import Bundle, Engine

engine, begun = Engine(Bundle.open(sys.argv[1]), threads=1, lookup=False, max_context=250), threading.Barrier(6)
engine.load()
settings = dict(max_tokens=240, ignore_eos=True)

async def listen(session):
    async with aclosing(await session.begin_async([5, 6, 7], **settings)) as events:
        begun.wait()
        threading.main_thread().join()
        async for event in events:
            pass

def ask(number):
    session = engine.session()
    if number % 2:
        asyncio.run(listen(session))
    else:
        events = session.events([5, 6, 7], **settings)
        begun.wait()
        threading.main_thread().join()
        list(events)
    print(session.last.finish_reason, session.last.generated_tokens, flush=True)

def for_ever():
    asyncio.run(listen(engine.session()))
    threading.Event().wait()

for number in range(4):
    threading.Thread(target=ask, args=[number]).start()
threading.Thread(target=for_ever, daemon=True).start()
begun.wait()
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(toy_bundle.path)], capture_output=True, text=True, timeout=60
    )
    # Of the last thread, which is a daemon, the extension says that it leaks.
    assert (done.returncode, done.stdout.splitlines()) == (0, ["length 240"] * 4), done.stderr


def test_the_interpreter_ends_while_tasks_generate(toy_bundle: Bundle) -> None:
    script = f"""if True:
        import asyncio
        from bedplate import Bundle, Engine
        engine = Engine(Bundle.open({str(toy_bundle.path)!r}), threads=1)
        engine.load()
        async def main():
            run = lambda i: engine.session().generate_async([7 + i] * 150, max_tokens=90)
            some = [asyncio.create_task(run(i)) for i in range(8)]
            await asyncio.sleep(0.05)
        asyncio.run(main())
    """
    for _ in range(3):
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        assert (ended.returncode, ended.stderr) == (0, "")


class TestDeadline:
    def test_that_is_over(self, toy_bundle: Bundle) -> None:
        with Engine(toy_bundle) as engine:
            session = engine.session()
            assert session.generate("ab", max_tokens=50, deadline=0) == ""
            assert session.last is not None
            assert (session.last.finish_reason, session.last.generated_tokens) == ("deadline", 0)

    def test_in_the_midst(self, toy_bundle: Bundle) -> None:
        def slow(chosen: tuple[int, ...]) -> None:
            time.sleep(0.01)

        with Engine(toy_bundle) as engine:
            session = engine.session()
            events = list(session.events("ab", max_tokens=60, ignore_eos=True, deadline=0.2, mask=slow))
            assert events[-1].finish_reason == "deadline"
            assert session.last is not None and 1 < session.last.generated_tokens < 60

    @pytest.mark.parametrize("value", [-1, "soon", float("nan"), True])
    def test_that_is_none(self, toy_bundle: Bundle, value: Any) -> None:
        with Engine(toy_bundle) as engine, pytest.raises(RunError, match=r"deadline is .*\nhint: "):
            engine.session().events("ab", max_tokens=1, deadline=value)


class TestFairness:
    def test_a_short_prompt_does_not_wait_for_a_long_one(self, toy_bundle: Bundle) -> None:
        with Engine(toy_bundle, max_step_rows=8, lookup=False, cache_bytes=0) as engine:
            done: list[tuple[int, int]] = []
            long = engine.session().generate(
                LONG, max_tokens=2, stream=True, on_prefill=lambda *read: done.append(read)
            )
            short = engine.session()
            short.generate("ab", max_tokens=3)
            assert done == []  # it is told by who asks
            next(long)
            assert len(done) > 5 and done[0][0] < 8


@pytest.mark.parametrize("name", _native.instruction_sets())
def test_a_step_is_as_long_as_the_processor_is_fast(toy_bundle: Bundle, name: str) -> None:
    before, read = _native.instruction_set(), [0]
    _native.use_instruction_set(name)
    try:
        with Engine(toy_bundle, cache_bytes=0) as engine:
            session = engine.session()
            session.generate([5] * 100, max_tokens=1, on_prefill=lambda count, _: read.append(count))
    finally:
        _native.use_instruction_set(before)
    assert read == ([0, 48, 96, 100] if "avx512" in name else [0, 32, 64, 96, 100])


class Asker:
    """What Shares needs of a generation that always wants rows."""

    def __init__(self, key: str, wanted: int = 1) -> None:
        self.key, self.wanted, self.is_reading = key, wanted, wanted > 1
        self.served, self.last_step, self.got, self.block, self.position = 0, 0, 0, None, 0


def give(shares: Shares, askers: Sequence[Asker], most: int, steps_: int) -> None:
    for _ in range(steps_):
        for one, rows in shares.give(cast("Any", askers), most).items():
            cast("Any", one).got += rows


def of_keys(*keys: str) -> tuple[Shares, list[Asker]]:
    shares = Shares()
    for key in keys:
        shares.enter(key)
    return shares, [Asker(key) for key in keys]


class TestShares:
    def test_keys_get_the_same(self) -> None:
        """Six generations of one key do not get more than the one of another."""
        shares, (one, *many) = of_keys("one", *["many"] * 6)
        give(shares, [*many, one], 2, 90)
        assert one.got >= 89 and abs(sum(other.got for other in many) - one.got) <= 2
        assert max(other.got for other in many) - min(other.got for other in many) <= 1

    def test_old_ones_of_a_key_are_not_kept_waiting(self) -> None:
        shares, (old, *young) = of_keys(*["one"] * 50)
        old.served = 10_000
        give(shares, [old, *young], 10, 50)
        assert {one.got for one in (old, *young)} == {10}

    def test_a_key_that_comes_back_has_no_more_claim(self) -> None:
        shares, (busy, away) = of_keys("busy", "away")
        give(shares, [busy], 1, 900)
        give(shares, [busy, away], 1, 100)
        assert abs(busy.got - 900 - away.got) <= 1

    def test_a_key_that_enters_has_no_more_claim(self) -> None:
        shares, (paused, busy) = of_keys("paused", "busy")
        give(shares, [busy], 1, 900)
        shares.enter("later")
        later = Asker("later")
        give(shares, [busy, later], 1, 100)
        assert abs(busy.got - 900 - later.got) <= 1 and paused.got == 0

    @pytest.mark.parametrize("most", [1, 2, 3])
    def test_few_rows_are_shared_by_prompts_and_answers(self, most: int) -> None:
        shares, (answer, _) = of_keys("one", "one")
        prompt = Asker("one", wanted=1000)
        give(shares, [answer, prompt], most, 100)
        assert min(answer.got, prompt.got) >= 30


def mask_that(use: Callable[[], object]) -> Callable[[tuple[int, ...]], None]:
    def mask(chosen: tuple[int, ...]) -> None:
        if len(chosen) == 2:
            use()

    return mask


class TestWithinAStep:
    @pytest.mark.parametrize("what", ["step", "generate", "reset", "fork", "next"])
    def test_a_mask_cannot_use_sessions(self, toy_bundle: Bundle, expected: list[str], what: str) -> None:
        with Engine(toy_bundle) as engine:
            session, other = engine.session(), engine.session()
            running = other.events("ab", max_tokens=5)
            uses: dict[str, Callable[[], object]] = {
                "step": lambda: other.step([1]),
                "generate": lambda: other.generate("ab", max_tokens=1),
                "reset": session.reset,
                "fork": session.fork,
                "next": lambda: next(running),
            }
            with pytest.raises(RunError, match="a session is used within a step\nhint: "):
                session.generate("ab", max_tokens=9, ignore_eos=True, mask=mask_that(uses[what]))
            assert "".join(begin(engine, REQUESTS[0])) == expected[0]

    def test_it_can_cancel(self, toy_bundle: Bundle) -> None:
        with Engine(toy_bundle) as engine:
            session = engine.session()
            session.generate("ab", max_tokens=9, ignore_eos=True, mask=mask_that(session.cancel))
            assert session.last is not None
            assert (session.last.finish_reason, session.last.generated_tokens) == ("cancelled", 2)

    @pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit])
    def test_its_error_is_of_its_generation_alone(
        self, toy_bundle: Bundle, expected: list[str], error: type[BaseException]
    ) -> None:
        def fail() -> None:
            raise error

        async def answer(**options: Any) -> str:
            return await engine.session().generate_async("ab", **options)

        with Engine(toy_bundle) as engine:
            options: dict[str, Any] = {"max_tokens": 9, "ignore_eos": True, "mask": mask_that(fail)}
            wrong = engine.session().events("ab", **options)
            assert "".join(begin(engine, REQUESTS[0])) == expected[0]
            with pytest.raises(error):
                list(wrong)
            assert list(wrong) == []
            if error is not SystemExit:  # which asyncio takes for the end of its loop
                with pytest.raises(error):
                    asyncio.run(answer(**options))
            assert asyncio.run(answer(**REQUESTS[0][2])) == expected[0]


def test_an_error_of_a_step_is_of_who_caused_it(
    toy_bundle: Bundle, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that one generation cannot get is not missed by the others."""
    with Engine(toy_bundle) as engine:
        wrong = engine.session("all")
        events = wrong.events("ab", **HOT, seed=1)
        compute = steps.compute

        def failing(parts: Sequence[steps.Part]) -> _native.Logits:
            if any(part.held is wrong._held for part in parts):
                raise RunError("no memory")
            return compute(parts)

        monkeypatch.setattr("bedplate.runtime.scheduler.compute", failing)
        assert "".join(begin(engine, REQUESTS[0])) == expected[0]
        with pytest.raises(RunError, match="no memory"):
            list(events)
        monkeypatch.undo()
        assert list(wrong.events("ab", max_tokens=2))[-1].finish_reason == "length"


def test_a_refused_memory_ends_one_generation(toy_bundle: Bundle) -> None:
    with Engine(toy_bundle, cache_bytes=0) as probe:
        session = probe.session()
        session.step([1])
        block = session.kv_bytes
    with Engine(toy_bundle, cache_bytes=0, memory_bytes=3 * block) as engine:
        options: dict[str, Any] = {"max_tokens": 90, "ignore_eos": True}
        events = [engine.session().events("ab", **options) for _ in range(3)]
        ends: list[str | None] = []
        for one in events:
            try:
                ends.append(list[Event](one)[-1].finish_reason)
            except RunError as error:
                assert "memory is full" in str(error)
                ends.append("full")
        assert ends.count("full") >= 1


@pytest.mark.parametrize("memory_bytes", [None, 100_000_000])
def test_an_adapter_is_loaded_beside_running_steps(
    toy_bundle: Bundle, expected: list[str], monkeypatch: pytest.MonkeyPatch, memory_bytes: int | None
) -> None:
    loading, may = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Weights:
        loading.set()
        may.wait()
        return load_adapter(*arguments)

    with Engine(toy_bundle, memory_bytes=memory_bytes) as engine, ThreadPoolExecutor(1) as pool:
        pieces = begin(engine, REQUESTS[0])
        text = next(pieces)
        monkeypatch.setattr("bedplate.runtime.loaded.load_adapter", slow)
        session = engine.session("all")
        loaded = pool.submit(session.generate, "ab", **REQUESTS[3][2])
        loading.wait()
        assert text + "".join(pieces) == expected[0]
        may.set()
        assert loaded.result() == expected[3]


def test_an_adapter_is_loaded_beside_running_steps_and_calls(
    toy_bundle: Bundle, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call whose adapter is there looks for it before it takes its turn, not in it."""
    may = threading.Event()
    with Engine(toy_bundle) as engine, ThreadPoolExecutor(2) as pool:
        session, pieces = engine.session("all8"), begin(engine, REQUESTS[0])
        text = next(pieces)
        session.step([3])
        load, loaded = Session._load, []

        def then_another_one(self: Session) -> Weights:
            weights = load(self)
            if not loaded:
                loaded.append(pool.submit(engine.load, "all"))
                begun.wait()
            return weights

        begun = threading.Event()

        def slow(*arguments: Any) -> Weights:
            begun.set()
            may.wait()
            return load_adapter(*arguments)

        monkeypatch.setattr("bedplate.runtime.loaded.load_adapter", slow)
        monkeypatch.setattr(Session, "_load", then_another_one)
        stepped = pool.submit(session.step, [4])
        begun.wait()
        assert text + "".join(pieces) == expected[0]
        stepped.result()
        may.set()
        loaded[0].result()


@pytest.mark.parametrize("cache_bytes", [0, 100_000, 256 << 20])
def test_what_prompts_have_in_common_is_read_once(toy_bundle: Bundle, cache_bytes: int) -> None:
    """Also if they begin at the same time. Where the cache is full, or there is none, each is read as a whole."""
    common = [(7 * at) % 300 + 2 for at in range(160)]
    prompts = [[*common[: 160 - at % 3], at + 3, *range(9, 9 + at)] for at in range(9)]
    settings: dict[str, Any] = {"max_tokens": 6, "temperature": 50.0, "seed": 1, "ignore_eos": True}
    names = [None, "all", "all8"]
    with Engine(toy_bundle, cache_bytes=0) as engine:
        alone = [engine.session(names[at % 3]).generate(one, **settings) for at, one in enumerate(prompts)]
    with Engine(toy_bundle, cache_bytes=cache_bytes, lookup=False) as engine:
        sessions = [engine.session(names[at % 3]) for at in range(9)]
        running = [
            session.generate(prompt, stream=True, key=str(at % 2), **settings)
            for at, (session, prompt) in enumerate(zip(sessions, prompts, strict=True))
        ]
        pieces = zip_longest(*running, fillvalue="")
        assert ["".join(text) for text in zip(*pieces, strict=True)] == alone
        rows, known = engine.activity().rows, sum(one.last.reused_tokens for one in sessions if one.last)
    whole = sum(len(prompt) + 5 for prompt in prompts)
    assert rows == whole - known
    # Two blocks of 64 are common. Of three adapters, each has three prompts.
    assert known == (0 if not cache_bytes else known if cache_bytes < 1 << 20 else 3 * 2 * 128)
