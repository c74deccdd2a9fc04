"""Measures how fast a bundle runs: tokens per second of prompts and answers, by batch and by position."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bedplate.errors import RunError
from bedplate.runtime import arguments
from bedplate.runtime.engine import Engine


@dataclass(frozen=True, kw_only=True)
class Speed:
    """One row of the table.

    test: `prompt` (all tokens in one call) or `answer` (one token after the other).  sessions: how many step together.
    position: where the tokens begin.  tokens: how many in each session.  tokens_per_second: of all sessions together,
    in the best run.
    """

    test: str
    sessions: int
    position: int
    tokens: int
    tokens_per_second: float


def measure_speed(
    engine: Engine,
    *,
    adapter: str | None,
    prompts: Sequence[int],
    answers: int,
    batches: Sequence[int],
    positions: Sequence[int],
    runs: int,
) -> Iterator[Speed]:
    """Measure prompts of these lengths, then answers of `answers` tokens, at each position and for each batch.

    RunError: a number is too small, or the positions do not fit the context.  NotFoundError: there is no such adapter.
    """
    for name, numbers, least in (
        ("the length of a prompt", prompts, 1),
        ("the number of tokens of an answer", [answers], 1),
        ("the number of sessions", batches, 1),
        ("the position", positions, 0),
        ("the number of runs", [runs], 1),
    ):
        for number in numbers:
            arguments.integer(name, number, least=least)
    longest = max(*prompts, *(position + answers for position in positions))
    if longest > engine.limits.max_context:
        raise RunError(
            f"{longest} positions do not fit the context of {engine.limits.max_context}",
            hint="give shorter prompts, fewer tokens or smaller positions",
        )
    engine.load(adapter)
    for count in prompts:
        best = max(_prompt(engine, adapter, count) for _ in range(runs))
        yield Speed(test="prompt", sessions=1, position=0, tokens=count, tokens_per_second=best)
    for position in positions:
        for sessions in batches:
            best = max(_answer(engine, adapter, sessions, position, answers) for _ in range(runs))
            yield Speed(
                test="answer", sessions=sessions, position=position, tokens=answers, tokens_per_second=best
            )


def _tokens(engine: Engine, adapter: str | None, count: int, *, begin: bool = True) -> list[int]:
    """Token ids from the whole vocabulary. The text does not change how long a step takes. Only an activated LoRA must
    be on: a text begins with its invocation, and does not hold it again.
    """
    vocab, invocation = engine.limits.vocab, engine.load(adapter).invocation or ()
    text = [i * 7919 % vocab for i in range(count)]
    text = [token if token not in invocation[:1] else (token + 1) % vocab for token in text]
    return [*invocation, *text][:count] if begin else text


def _prompt(engine: Engine, adapter: str | None, count: int) -> float:
    session, tokens = engine.session(adapter), _tokens(engine, adapter, count)
    start = time.perf_counter()
    session.step(tokens)
    return count / (time.perf_counter() - start)


def _answer(engine: Engine, adapter: str | None, count: int, position: int, tokens: int) -> float:
    sessions = [engine.session(adapter) for _ in range(count)]
    if position:
        engine.step([(session, _tokens(engine, adapter, position)) for session in sessions])
    start = time.perf_counter()
    for token in _tokens(engine, adapter, tokens, begin=position == 0):
        engine.step([(session, [token]) for session in sessions])
    return count * tokens / (time.perf_counter() - start)
