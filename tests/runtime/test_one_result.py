"""One row, one result: a token's logits are the same bits, whatever is computed beside it and whatever came before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from bedplate.bundle.store import Bundle
from bedplate.runtime.engine import MAX_ROWS, Engine
from bedplate.runtime.session import Session

TOKENS = [int(token) for token in np.random.default_rng(1).integers(2, 320, 200)]
NAMES = [None, "all", "all2", "all8"]
Logits = NDArray[np.float32]


@pytest.fixture(scope="module", params=["float16", "float32"])
def engine(toy_bundle: Bundle, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine(toy_bundle, threads=2, kv=request.param) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(engine: Engine) -> dict[str | None, Logits]:
    """Of every position, token by token."""
    found = {}
    for name in NAMES:
        session = engine.session(name)
        found[name] = np.stack([session.step([token]) for token in TOKENS])
    assert all(not np.array_equal(found[one], found[other]) for one, other in pairwise(NAMES))
    return found


def pieces(count: int, seed: int) -> list[tuple[int, int]]:
    """[0, count) in random pieces."""
    cuts = sorted(random.Random(seed).sample(range(1, count), random.Random(seed).randint(0, 12)))
    return list(pairwise([0, *cuts, count]))


@pytest.mark.parametrize("name", NAMES)
class TestAPrompt:
    def test_in_any_pieces(
        self, name: str | None, engine: Engine, expected: dict[str | None, Logits]
    ) -> None:
        for seed in range(8):
            session = engine.session(name)
            for begin, end in pieces(len(TOKENS), seed):
                last = session.step(TOKENS[begin:end])
                np.testing.assert_array_equal(last, expected[name][end - 1])

    def test_all_positions_at_once(
        self, name: str | None, engine: Engine, expected: dict[str | None, Logits]
    ) -> None:
        np.testing.assert_array_equal(engine.session(name).logits(TOKENS), expected[name])

    def test_again_and_after_any_reuse(
        self, name: str | None, engine: Engine, expected: dict[str | None, Logits]
    ) -> None:
        """What two prompts share is not computed again, in other positions and after other tokens."""
        session, drawn = engine.session(name), random.Random(5)
        text = engine.tokenizer.decode(TOKENS[:40])
        whole = engine.session(name).generate(text, max_tokens=12)
        for _ in range(10):
            other = text[: drawn.randrange(1, len(text))] + drawn.choice(["", "abc", "the quick"])
            alone = engine.session(name).generate(other, max_tokens=6)
            assert session.generate(other, max_tokens=6) == alone
            assert session.generate(text, max_tokens=12) == whole
            assert session.last is not None and session.last.reused_tokens > 0
        last = session.step([7])
        np.testing.assert_array_equal(last, engine.session(name).step([*session.tokens[:-1], 7]))
        session.reset()
        np.testing.assert_array_equal(session.step(TOKENS), expected[name][-1])


@pytest.mark.parametrize("threads", [1, 3, 4])
def test_any_number_of_threads(
    threads: int, toy_bundle: Bundle, engine: Engine, expected: dict[str | None, Logits]
) -> None:
    with Engine(toy_bundle, threads=threads, kv=engine.load().precision) as other:
        for name in NAMES:
            np.testing.assert_array_equal(other.session(name).logits(TOKENS), expected[name])


class TestSessionsInOneStep:
    def test_each_as_alone(self, engine: Engine, expected: dict[str | None, Logits]) -> None:
        """Sessions of several adapters, at different positions, with runs of different lengths."""
        for seed in range(6):
            drawn = random.Random(seed)
            sessions = [(engine.session(name), name) for name in drawn.choices(NAMES, k=7)]
            done = dict.fromkeys(range(len(sessions)), 0)
            while rest := [i for i in done if done[i] < len(TOKENS)]:
                chosen = drawn.sample(rest, drawn.randint(1, len(rest)))
                counts = [min(drawn.choice([1, 1, 2, 17, 60]), len(TOKENS) - done[i]) for i in chosen]
                parts = [
                    (sessions[i][0], TOKENS[done[i] : done[i] + count])
                    for i, count in zip(chosen, counts, strict=True)
                ]
                logits = engine.step(parts)
                assert logits.shape == (len(parts), engine.limits.vocab) and logits.dtype == np.float32
                for row, i, count in zip(logits, chosen, counts, strict=True):
                    done[i] += count
                    np.testing.assert_array_equal(row, expected[sessions[i][1]][done[i] - 1])
            assert all(session.tokens == tuple(TOKENS) for session, _ in sessions)

    def test_more_rows_than_a_step_takes(self, engine: Engine, expected: dict[str | None, Logits]) -> None:
        sessions = [engine.session(name) for name in NAMES]
        assert len(sessions) * len(TOKENS) > 2 * MAX_ROWS
        logits = engine.step([(session, TOKENS) for session in sessions])
        for row, name in zip(logits, NAMES, strict=True):
            np.testing.assert_array_equal(row, expected[name][-1])

    def test_after_the_weights_were_unloaded(
        self, engine: Engine, expected: dict[str | None, Logits]
    ) -> None:
        """What a session held is computed anew, by the weights that are loaded then."""
        sessions: list[Session] = [engine.session(name) for name in NAMES]
        engine.step([(session, TOKENS[:50]) for session in sessions])
        engine.unload()
        logits = engine.step([(session, TOKENS[50:51]) for session in sessions])
        for row, name in zip(logits, NAMES, strict=True):
            np.testing.assert_array_equal(row, expected[name][50])
