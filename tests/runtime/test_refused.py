"""A refused call changes nothing: the session holds the same tokens, and its next logits are the same bits."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bedplate.api import Bundle
from bedplate.errors import BedplateError, BundleError, NotFoundError, RunError
from bedplate.runtime.engine import Engine
from bedplate.runtime.session import Session

TEXT = [5, 9, 13, 2, 7]
CONTEXT = 40


@pytest.fixture(scope="module")
def engine(toy_bundle: Bundle) -> Iterator[Engine]:
    with Engine(toy_bundle, max_context=CONTEXT) as engine:
        yield engine


WRONG_IDS: list[Any] = [[], [-1], [320], [2**70], [1, 5000], [1.5], ["1"], None, "12", 5, [True], [[1]]]
REFUSED: list[tuple[type[BedplateError], Callable[[Session], object]]] = [
    *((RunError, lambda s, ids=ids: s.step(ids)) for ids in WRONG_IDS),  # type: ignore[misc]
    *((RunError, lambda s, ids=ids: s.logits(ids)) for ids in WRONG_IDS),  # type: ignore[misc]
    (RunError, lambda s: s.step([1] * CONTEXT)),
    (RunError, lambda s: s.logits([1] * (CONTEXT + 1))),
    (RunError, lambda s: s.generate("a" * 500, max_tokens=1)),
    (RunError, lambda s: s.generate("", max_tokens=1)),
    (RunError, lambda s: s.generate("ab", max_tokens=0)),
    (RunError, lambda s: s.generate([{"role": "user"}], max_tokens=1)),
    (NotFoundError, lambda s: s.use("nobody")),
    (RunError, lambda s: s.use(5)),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
@pytest.mark.parametrize("name", [None, "all8"])
def test_of_a_session(engine: Engine, name: str | None, number: int) -> None:
    error, call = REFUSED[number]
    session, other = engine.session(name), engine.session(name)
    for one in (session, other):
        one.step(TEXT)
    with pytest.raises(error):
        call(session)
    assert (session.tokens, session.adapter, session.last) == (tuple(TEXT), name, None)
    np.testing.assert_array_equal(session.step([3]), other.step([3]))


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_beside_a_generation_that_goes_on(engine: Engine, number: int) -> None:
    error, call = REFUSED[number]
    settings = {"max_tokens": 12, "temperature": 50.0, "seed": 2}
    expected = engine.session().generate("ab", **settings)
    session = engine.session()
    pieces = session.generate("ab", **settings, stream=True)
    text = next(pieces)
    with pytest.raises(error):
        call(session)
    assert text + "".join(pieces) == expected


BAD_PARTS: list[Callable[[Session, Session], Any]] = [
    *(lambda a, b, ids=ids: [(a, [1]), (b, ids)] for ids in WRONG_IDS),  # type: ignore[misc]
    lambda a, b: [(a, [1]), (b, [1] * CONTEXT)],
    lambda a, b: [(a, [1]), (b, [1]), (a, [2])],
    lambda a, b: [(a, [1]), (None, [1])],
    lambda a, b: [(a, [1]), b],
    lambda a, b: [(a, [1]), (b,)],
    lambda a, b: [(a, [1]), (b, [1], 2)],
    lambda a, b: [],
    lambda a, b: None,
    lambda a, b: (a, [1]),
    lambda a, b: {a: [1]},
]


@pytest.mark.parametrize("number", range(len(BAD_PARTS)))
def test_of_several_sessions(engine: Engine, number: int) -> None:
    sessions = [engine.session(name) for name in (None, "all8")]
    others = [engine.session(name) for name in (None, "all8")]
    for one in (*sessions, *others):
        one.step(TEXT)
    with pytest.raises(RunError, match=r"(?s).*\nhint: "):
        engine.step(BAD_PARTS[number](*sessions))
    assert [session.tokens for session in sessions] == [tuple(TEXT)] * 2
    logits = engine.step([(session, [3]) for session in sessions])
    np.testing.assert_array_equal(logits, np.stack([other.step([3]) for other in others]))


def test_a_session_of_another_engine(toy_bundle: Bundle, engine: Engine) -> None:
    with Engine(toy_bundle) as other:
        stranger, own = other.session(), engine.session()
        for one in (stranger, own):
            one.step(TEXT)
        with pytest.raises(RunError, match=r"another engine\nhint: "):
            engine.step([(own, [1]), (stranger, [1])])
        assert own.tokens == stranger.tokens == tuple(TEXT)


def test_one_adapter_of_several_that_cannot_be_loaded(toy_bundle: Bundle, tmp_path: Path) -> None:
    """The first session was to be computed anew, by weights that were loaded again; it still is, later."""
    copy = Bundle.open(shutil.copytree(toy_bundle.path, tmp_path / "copy"))
    with Engine(copy) as engine:
        whole, broken = engine.session("all8"), engine.session("all")
        whole.step(TEXT)
        engine.unload()
        weights = copy.adapters["all"].weights
        weights.write_bytes(weights.read_bytes()[:-1000])
        with pytest.raises(BundleError, match=r"weights\.ptd"):
            engine.step([(whole, [1]), (broken, [1])])
        assert (whole.tokens, broken.tokens) == (tuple(TEXT), ())
        expected = engine.session("all8").step([*TEXT, 3])
        np.testing.assert_array_equal(whole.step([3]), expected)


def test_a_context_that_is_full_stays_as_it_is(engine: Engine) -> None:
    session, other = engine.session("all"), engine.session("all")
    for one in (session, other):
        one.step([1] * (CONTEXT - 1))
    for _ in range(2):
        with pytest.raises(RunError, match=rf"{CONTEXT + 1} tokens do not fit the context of {CONTEXT}"):
            session.step([1, 2])
    np.testing.assert_array_equal(session.step([2]), other.step([2]))
    with pytest.raises(RunError, match=rf"{CONTEXT + 1} tokens do not fit"):
        session.step([3])
    assert len(session.tokens) == CONTEXT


def test_at_random_between_good_steps(engine: Engine) -> None:
    drawn = random.Random(0)
    sessions = {name: engine.session(name) for name in (None, "all", "all8")}
    mirrors = {name: engine.session(name) for name in sessions}
    for _ in range(60):
        name = drawn.choice(list(sessions))
        session = sessions[name]
        if len(session.tokens) > CONTEXT - 4:
            session.reset()
            mirrors[name].reset()
        for _ in range(drawn.randrange(3)):
            error, call = drawn.choice(REFUSED[: 2 * len(WRONG_IDS)])
            with pytest.raises(error):
                call(session)
        ids = [drawn.randrange(2, 320) for _ in range(drawn.randint(1, 3))]
        np.testing.assert_array_equal(session.step(ids), mirrors[name].step(ids))
        assert session.tokens == mirrors[name].tokens
