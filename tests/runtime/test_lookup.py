"""Proposals by lookup: what they are, that they cost little, and that no text changes."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bedplate.bundle.store import Bundle
from bedplate.runtime.engine import Engine
from bedplate.runtime.lookup import MOST, Followers, Habits, Lookup


def new(tokens: list[int]) -> Lookup:
    """Of the first generation of an engine."""
    return Lookup(tokens, Followers())


def feed(lookup: Lookup, text: list[int]) -> tuple[int, int]:
    """Steps and proposed tokens that a text takes whose tokens are chosen as they are."""
    steps = proposed = at = 0
    while at < len(text):
        drafts = lookup.propose(MOST)
        steps, proposed = steps + 1, proposed + len(drafts)
        right = 0
        for token in drafts:
            if at + right + 1 >= len(text) or text[at + right] != token:
                break
            right += 1
        for token in text[at : at + right + 1]:
            lookup.append(token)
        lookup.checked(len(drafts), right)
        at += right + 1
    return steps, proposed


def test_what_followed_before_is_proposed() -> None:
    lookup = new([1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3])
    assert lookup.propose(2) == [4, 5]
    assert lookup.propose(1) == [4]
    assert lookup.propose(0) == []


def test_what_repeats_itself_goes_on() -> None:
    assert new([7, 1, 2, 3, 1, 2, 3]).propose(2) == [1, 2]
    lookup = new([5, 5, 5, 5])
    lookup.checked(2, 2)
    assert lookup.propose(4) == [5, 5, 5, 5]


def test_the_latest_place_counts() -> None:
    assert new([1, 2, 3, 4, 0, 1, 2, 3, 5, 0, 1, 2, 3]).propose(1) == [5]


@pytest.mark.parametrize("tokens", [[], [1], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 2, 3]])
def test_nothing_is_known(tokens: list[int]) -> None:
    assert new(tokens).propose(MOST) == []


def test_a_text_that_is_copied_takes_few_steps() -> None:
    drawn = random.Random(0)
    text = [drawn.randrange(1000) for _ in range(400)]
    steps, _ = feed(new(text), text[100:300])
    assert steps <= 200 / MOST + 12


def answer(followers: Followers, names: list[int]) -> tuple[int, int]:
    """An answer of the form 1 2 3 name 4 5 6 name …, after a prompt that says none of it."""
    form = [
        token for number, name in enumerate(names) for token in (*range(3 * number, 3 * number + 3), name)
    ]
    return feed(Lookup([998, 999], followers), form)


def test_answers_of_one_form_take_fewer_steps() -> None:
    drawn, followers = random.Random(0), Followers()
    steps = [answer(followers, [drawn.randrange(100, 900) for _ in range(8)])[0] for _ in range(10)]
    assert steps[0] == 32 and steps[-1] <= 18


def test_habits_are_of_one_adapter_and_not_without_end() -> None:
    habits = Habits()
    first = habits.of("a")
    assert habits.of("a") is first and habits.of("b") is not first
    for number in range(100):
        habits.of(str(number))
    assert habits.of("a") is not first
    for token in range(100_000):
        first.learn([token, token + 1, token + 2], token + 3)
    assert len(first._known) < 10_000


def test_habits_of_a_salt_are_for_this_salt_alone(toy_bundle: Bundle) -> None:
    """Nobody can learn what others were answered from how fast an answer comes."""
    with Engine(toy_bundle, cache_bytes=0) as engine:

        def drafted(adapter: str | None, salt: str) -> int:
            session = engine.session(adapter, cache_salt=salt)
            session.generate("ab", max_tokens=12, ignore_eos=True)
            assert session.last is not None
            return session.last.drafted_tokens

        first = drafted("all8", "a")
        for _ in range(3):
            again = drafted("all8", "a")
        assert again > first
        assert drafted("all8", "b") == first
        assert drafted("all2", "a") == drafted("all2", "c")


@given(seed=st.integers(0, 10**6), kinds=st.integers(2, 4), count=st.integers(1, 400))
def test_what_it_costs_is_bounded(seed: int, kinds: int, count: int) -> None:
    """Rows beyond one a step, at 0.3 of a step each, less steps that are saved."""
    drawn, followers = random.Random(seed), Followers()
    total, tokens = 0.0, 0
    for _ in range(5):  # all answers of an adapter together
        lookup = Lookup([drawn.randrange(kinds) for _ in range(200)], followers)
        steps, proposed = feed(lookup, [drawn.randrange(kinds) for _ in range(count)])
        total, tokens = total + steps + 0.3 * proposed, tokens + count
        assert total <= tokens * 1.02 + 2 + 4 + 0.3 * MOST


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "seed": 5}, {"repetition_penalty": 1.1}])
@pytest.mark.parametrize("name", [None, "all8"])
def test_no_text_changes(toy_bundle: Bundle, name: str | None, options: dict[str, Any]) -> None:
    prompt = "the fox, the fox, the fox, the fox, the"
    accepted = 0
    with Engine(toy_bundle) as engine, Engine(toy_bundle, lookup=False) as without:
        for start in range(8):
            session, plain = engine.session(name), without.session(name)
            settings = {"max_tokens": 150, "ignore_eos": True, **options}
            found = list(session.events(prompt[start:], logprobs=2, **settings))
            assert found == list(plain.events(prompt[start:], logprobs=2, **settings))
            assert session.tokens == plain.tokens
            np.testing.assert_array_equal(session.step([5]), plain.step([5]))
            assert session.last is not None and plain.last is not None
            assert plain.last.drafted_tokens == 0
            assert session.last.accepted_tokens <= session.last.drafted_tokens
            accepted += session.last.accepted_tokens
    assert accepted > 5 or options


def test_a_masked_text_is_the_same(toy_bundle: Bundle) -> None:
    letters = "abc" * 20

    def texts(lookup: bool) -> str:
        with Engine(toy_bundle, lookup=lookup) as engine:
            ids = engine.tokenizer.encode(letters)[-len(letters) :]

            def mask(chosen: tuple[int, ...]) -> bytes:
                return (1 << ids[len(chosen)]).to_bytes(40, "little")

            session = engine.session()
            text = session.generate(letters, max_tokens=len(ids), mask=mask)
            assert session.last is not None and (session.last.accepted_tokens > 20) == lookup
            return text

    assert texts(True) == texts(False) == letters


def test_the_context_is_filled_and_not_exceeded(toy_bundle: Bundle) -> None:
    with Engine(toy_bundle, max_context=80) as engine:
        session = engine.session()
        session.generate("abcabcabcabcabc", max_tokens=500, ignore_eos=True)
        assert len(session.tokens) == 80
