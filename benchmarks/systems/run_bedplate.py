"""bedplate: speeds, start, adapter.

    run_bedplate.py speeds WINDOW TURNS BUNDLE [HQQ_BUNDLE]
    run_bedplate.py base WINDOW TURNS BUNDLE
    run_bedplate.py start BUNDLE TOKENS
    run_bedplate.py adapters BUNDLE
    run_bedplate.py follow_up BUNDLE [ADAPTER]
    run_bedplate.py alora BUNDLE ADAPTER

`base` is what commit c8bd865 has too: this script also runs there.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import timing
from timing import PROMPT

import bedplate

AVX2 = "avx2"


def new_engine(path: str, **options: Any) -> Any:
    return bedplate.Engine(bedplate.Bundle.open(path, check=False), threads=timing.THREADS, **options)


def open_engine(path: str, **options: Any) -> Any:
    # What one run has computed must not spare the next one its work.
    engine = new_engine(path, **{"cache_bytes": 0, **options})
    engine.load(None)
    return engine


def base(path: str, window: int, turns: int) -> dict[str, float]:
    engine = new_engine(path)
    engine.load(None)
    return base_speeds(engine, window, turns)


def base_speeds(engine: Any, window: int, turns: int) -> dict[str, float]:
    session = engine.session()

    def fill(tokens: Any) -> None:
        session.reset()
        session.step(tokens)

    return timing.speeds(fill, lambda token: session.step([token]), window, turns)


def speeds(path: str, window: int, turns: int, hqq: str | None) -> dict[str, float]:
    from bedplate import _native

    engine = open_engine(path)
    found = base_speeds(engine, window, turns)
    found["weights_mb"] = engine.memory().foundation / 1e6
    eight: list[str | None] = [f"a{number}" for number in range(8)]
    variants = {
        "decode": burst(engine, [None], window),
        "float32": burst(engine, ["float32"], window),
        "8bit": burst(engine, ["a0"], window),
        "batch": burst(engine, [None] * 8, window),
        "batch_one_adapter": burst(engine, ["a0"] * 8, window),
        "batch_adapters": burst(engine, eight, window),
    }
    if hqq:
        variants["hqq"] = burst(open_engine(hqq), [None], window)
    if AVX2 in _native.instruction_sets():
        _native.use_instruction_set(AVX2)  # of engines that load from here on
        variants["avx2"] = burst(open_engine(path), [None], window)
    for _ in range(turns):  # in turns, so that what else the machine does hits all alike
        for name, measure in variants.items():
            found[name] = max(found.get(name, 0.0), measure())
    return found


def burst(engine: Any, adapters: list[str | None], window: int) -> Callable[[], float]:
    """Tokens/s of all sessions together: each step takes one token of each, from position 16 on."""

    def measure() -> float:
        sessions = [engine.session(name) for name in adapters]
        engine.step([(session, PROMPT[:16]) for session in sessions])

        def step(token: int) -> None:
            engine.step([(session, [token]) for session in sessions])

        return len(sessions) * timing.decode(step, window, 1)

    return measure


def start(path: str, tokens: int) -> dict[str, float]:
    engine = new_engine(path, cache_bytes=0)
    session = engine.session()
    session.generate("Hello", max_tokens=1)
    found = {"first_token": timing.now()}
    if tokens:
        session.generate("Once upon a time there was a", max_tokens=tokens)
        assert session.last.generated_tokens == tokens
    return {**found, "resident_mb": timing.resident_mb(), "weights_mb": engine.memory().foundation / 1e6}


def adapters(path: str) -> dict[str, float]:
    """How long adapters load beside a base that has run, and what they take beyond their own bytes."""
    from statistics import median  # not for `start`: it takes longer to import than a layer takes to load

    engine = open_engine(path)

    def use(name: str | None) -> None:
        session = engine.session(name)
        session.step(PROMPT[:241])
        for token in PROMPT[:20]:
            session.step([token])

    use(None)
    engine.session().generate("Hello", max_tokens=1)  # the tokenizer is the base's
    before = timing.resident_mb()
    times = [1e3 * timing.seconds(partial(engine.load, name)) for name in engine.bundle.adapters]
    for name in engine.bundle.adapters:
        use(name)
    held = engine.memory().adapters
    by_name = dict(zip(engine.bundle.adapters, times, strict=True))
    return {
        "load_float32_ms": by_name.pop("float32"),
        "load_8bit_ms": median(by_name.values()),
        "bytes_8bit_mb": held["a0"] / 1e6,
        "bytes_float32_mb": held["float32"] / 1e6,
        "beyond_bytes_mb": (timing.resident_mb() - before - sum(held.values()) / 1e6) / len(held),
    }


def follow_up(path: str, adapter: str | None) -> dict[str, float]:
    """Milliseconds to the first token of the next question in a conversation of 1,500 tokens: computed as a whole, in
    the session that has held it, and in another one that finds it in the cache. The answers are the same text.
    """
    engine, known = open_engine(path), open_engine(path, cache_bytes=1 << 30)
    for one in (engine, known):
        one.load(adapter)
    tokenizer = engine.tokenizer
    text = "The keeper of the lighthouse wrote down the weather each morning before breakfast. " * 200
    held = tokenizer.decode(tokenizer.encode(text)[:1500])
    question = held + " And on the last day of the year"
    session = known.session(adapter)
    session.generate(held, max_tokens=1)
    found: dict[str, float] = {}
    for _ in range(5):
        own, other = session.fork(), known.session(adapter)
        for name, one in {"cold": engine.session(adapter), "session": own, "cache": other}.items():
            answer: list[str] = []
            ms = 1e3 * timing.seconds(lambda: answer.append(one.generate(question, max_tokens=1)))  # noqa: B023
            found[f"{name}_ms"] = min(found.get(f"{name}_ms", ms), ms)
            found[f"{name}_reused"] = one.last.reused_tokens
    answers = {one.generate(question, max_tokens=50) for one in (engine.session(adapter), own, other)}
    return {**found, "prompt_tokens": other.last.prompt_tokens, "answers": len(answers)}


def alora(path: str, adapter: str) -> dict[str, float]:
    """Milliseconds to the first token of a call of an activated LoRA after 1,500 tokens that the base has computed:
    computed as a whole, in the session that has held them, and in another one that finds them in the cache. Answers
    are the same tokens.
    """
    engine, known = open_engine(path), open_engine(path, cache_bytes=1 << 30)
    invocation = [*engine.load(adapter).invocation]
    known.load(adapter)
    held = [token for token in (PROMPT * (1 + 3000 // len(PROMPT))) if token not in invocation][:1500]
    question = [*held, *invocation]
    base = known.session()
    base.generate(held, max_tokens=1)
    found: dict[str, float] = {}
    answers = set()
    for _ in range(5):
        own, other = base.fork(), known.session(adapter)
        own.use(adapter)
        for name, one in {"cold": engine.session(adapter), "session": own, "cache": other}.items():
            ms = 1e3 * timing.seconds(lambda: one.generate(question, max_tokens=1))  # noqa: B023
            found[f"{name}_ms"] = min(found.get(f"{name}_ms", ms), ms)
            found[f"{name}_reused"] = one.last.reused_tokens
    for one in (engine.session(adapter), own, other):
        events = one.events(question, max_tokens=50, ignore_eos=True)
        answers.add(tuple(token for event in events for token in event.tokens))
    return {**found, "prompt_tokens": len(question), "answers": len(answers)}


def main() -> None:
    what, *words = sys.argv[1:]
    if what == "start":
        timing.tell(start(words[0], int(words[1])))
    elif what == "adapters":
        timing.tell(adapters(words[0]))
    elif what == "follow_up":
        timing.tell(follow_up(words[0], words[1] if len(words) > 1 else None))
    elif what == "alora":
        timing.tell(alora(words[0], words[1]))
    elif what == "base":
        timing.tell(base(words[2], int(words[0]), int(words[1])))
    else:
        timing.tell(speeds(words[2], int(words[0]), int(words[1]), words[3] if len(words) > 3 else None))


if __name__ == "__main__":
    main()
