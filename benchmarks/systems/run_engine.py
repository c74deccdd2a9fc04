"""bedplate's engine: many generations at once beside bare steps.

    run_engine.py sessions WINDOW TURNS BUNDLE     8 sessions with 8 adapters, and one session
    run_engine.py waiting BUNDLE                   a short prompt beside a long one
    run_engine.py lookup BUNDLE TASKS              an adapter's task with and without speculation by lookup
    run_engine.py batch BUNDLE                     200 prompts over 4 adapters

`timing.py` says what is printed.
"""

import inspect
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import timing
from run_bedplate import open_engine
from timing import PROMPT

import bedplate
from bedplate.cli.requests import Request, answered

EIGHT: list[str | None] = [f"a{number}" for number in range(8)]
LONG, SHORT = 1500, 16
PROMPTS, PARALLEL, ANSWER = 200, 16, 64
GREEDY = {"ignore_eos": True}


def sessions(path: str, window: int, turns: int) -> dict[str, float]:
    """Tokens/s of all sessions together, from position 16 on. All take turns."""
    engine = open_engine(path, lookup=False)  # it is measured by itself
    measures: dict[str, Callable[[], float]] = {
        "bare_batch": lambda: bare(engine, EIGHT, window),
        "threads": lambda: in_threads(engine, EIGHT, window),
        "round_robin": lambda: round_robin(engine, EIGHT, window),
        "bare_one": lambda: bare(engine, [None], 4 * window),
        "one": lambda: round_robin(engine, [None], 4 * window),
    }
    found: dict[str, float] = {}
    for _ in range(turns):
        for name, measure in measures.items():
            found[name] = max(found.get(name, 0.0), measure())
    return found


def bare(engine: Any, adapters: list[str | None], window: int) -> float:
    """Steps, and the likeliest token of each row."""
    held = [engine.session(name) for name in adapters]
    logits = engine.step([(session, PROMPT[:SHORT]) for session in held])
    moments = [time.perf_counter()]
    for _ in range(2 * window):
        tokens = np.argmax(logits, axis=1).tolist()
        logits = engine.step([(session, [token]) for session, token in zip(held, tokens, strict=True)])
        moments.append(time.perf_counter())
    return len(held) * timing.fastest(moments, window)


def events(engine: Any, adapter: str | None, window: int) -> Iterator[Any]:
    found: Iterator[Any] = engine.session(adapter).events(PROMPT[:SHORT], max_tokens=2 * window, **GREEDY)
    return found


def round_robin(engine: Any, adapters: list[str | None], window: int) -> float:
    """One thread asks each generation for its next event."""
    moments: list[float] = []
    waiting = [events(engine, name, window) for name in adapters]
    while waiting:
        for one in list(waiting):
            event = next(one, None)
            if event is None:
                waiting.remove(one)
            else:
                moments += [time.perf_counter()] * len(event.tokens)
    return timing.fastest(moments, len(adapters) * window)


def in_threads(engine: Any, adapters: list[str | None], window: int) -> float:
    """A thread for each generation."""
    all_begin = threading.Barrier(len(adapters))

    def listen(name: str | None) -> list[float]:
        all_begin.wait()
        moments: list[float] = []
        for event in events(engine, name, window):
            moments += [time.perf_counter()] * len(event.tokens)
        return moments

    with ThreadPoolExecutor(len(adapters)) as pool:
        moments = sorted(moment for listened in pool.map(listen, adapters) for moment in listened)
    return timing.fastest(moments, len(adapters) * window)


def waiting(path: str) -> dict[str, float]:
    """Milliseconds to the first token of a short prompt: alone, and while another session reads a long one."""
    engine = open_engine(path)
    long = [PROMPT[number % len(PROMPT)] for number in range(LONG)]

    def first_token() -> float:
        session = engine.session()
        return 1e3 * timing.seconds(lambda: session.generate(PROMPT[:SHORT], max_tokens=1, **GREEDY))

    def beside_a_long_one() -> float:
        reads, done = threading.Event(), []

        def progress(count: int, _: int) -> None:
            done.append(count)
            reads.set()

        def read() -> None:
            engine.session().generate(long, max_tokens=1, on_prefill=progress, **GREEDY)

        thread = threading.Thread(target=read)
        thread.start()
        reads.wait()
        took = first_token()
        assert done[-1] < LONG, "the long prompt was read before the short one was answered"
        thread.join()
        return took

    first_token()
    pairs = [(first_token(), beside_a_long_one()) for _ in range(7)]
    return {
        name: median(times)
        for name, times in zip(("alone_ms", "beside_ms"), zip(*pairs, strict=True), strict=True)
    }


def lookup(path: str, tasks: str) -> dict[str, float]:
    """Tokens/s of greedy answers with it and without it. Both are the same text. Nothing, if the engine has no such
    option.
    """
    if "lookup" not in inspect.signature(bedplate.Engine).parameters:
        return {}
    asked = [json.loads(line)["messages"][:1] for line in Path(tasks).read_text().splitlines()]
    speeds: dict[str, list[float]] = {"with": [], "without": []}
    texts: dict[str, list[str]] = {"with": [], "without": []}
    for _ in range(3):
        for name in speeds:
            engine = open_engine(path, lookup=name == "with")  # which has answered nothing so far
            tokens, seconds = 0, 0.0
            for messages in asked:
                session = engine.session("extract")
                texts[name].append(session.generate(messages, max_tokens=100))
                tokens, seconds = (
                    tokens + session.last.generated_tokens,
                    seconds + session.last.decode_seconds,
                )
            engine.close()
            speeds[name].append(tokens / seconds)
    assert texts["with"] == texts["without"], "speculation changes an answer"
    return {f"{name}_lookup": max(found) for name, found in speeds.items()}


def batch(path: str) -> dict[str, float]:
    """Tokens/s of all prompts: one after the other, and some at a time."""
    engine = open_engine(path, lookup=False)  # which would win most where random adapters repeat themselves
    for name in EIGHT[:4]:
        engine.load(name)
    # Prompts of 12 to 51 tokens, none of which begins as another one does.
    prompts = [(EIGHT[i % 4], [101 + i, *PROMPT[i : i + 11 + i % 40]]) for i in range(PROMPTS)]

    def answer(asked: tuple[str | None, list[int]]) -> str:
        name, prompt = asked
        return str(engine.session(name).generate(prompt, max_tokens=ANSWER, **GREEDY))

    texts: list[list[str]] = []

    def one_by_one() -> None:
        texts.append([answer(one) for one in prompts])

    def at_once() -> None:
        """As `run --file` does."""
        requests = [
            Request(prompt=prompt, adapter=name, scale=1.0, generation={"max_tokens": ANSWER, **GREEDY})
            for name, prompt in prompts
        ]
        texts.append([one.text for _, one in sorted(answered(engine, requests, PARALLEL))])

    seconds = {"one_by_one": timing.seconds(one_by_one), "at_once": timing.seconds(at_once)}
    assert texts[0] == texts[1], "company changes an answer"
    return {name: PROMPTS * ANSWER / taken for name, taken in seconds.items()}


def main() -> None:
    what, *words = sys.argv[1:]
    if what == "sessions":
        timing.tell(sessions(words[2], int(words[0]), int(words[1])))
    elif what == "waiting":
        timing.tell(waiting(words[0]))
    elif what == "lookup":
        timing.tell(lookup(words[0], words[1]))
    else:
        timing.tell(batch(words[0]))


if __name__ == "__main__":
    main()
