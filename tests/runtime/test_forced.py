"""Masks that force tokens: fewer steps, the same text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from bedplate import Bundle, Engine
from bedplate.errors import RunError
from bedplate.runtime.sampling import ForcingMask

LETTERS = "abc" * 5
ANY = (1 << 320) - 1


class Mask:
    """Allows any token at each third place, else one of a text."""

    def __init__(self, ids: Sequence[int], wrong: int = 0) -> None:
        self._ids, self._wrong = ids, wrong
        self.calls = 0

    def __call__(self, chosen: tuple[int, ...]) -> bytes:
        self.calls += 1
        at = len(chosen)
        return (1 << self._ids[at] if at % 3 else ANY).to_bytes(40, "little")

    def _forced(self, chosen: tuple[int, ...], most: int) -> Sequence[int]:
        at = len(chosen)
        end = at if at % 3 == 0 else at + 3 - at % 3
        return [token + self._wrong for token in self._ids[at:end]]


class Forcing(Mask):
    def forced(self, chosen: tuple[int, ...], most: int) -> Sequence[int]:
        return self._forced(chosen, most)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("lookup", [True, False])
def test_steps_are_fewer_and_the_text_is_the_same(
    toy_bundle: Bundle, lookup: bool, options: dict[str, Any]
) -> None:
    with Engine(toy_bundle, lookup=lookup) as engine:
        ids = engine.tokenizer.encode(LETTERS)
        assert isinstance(Forcing(ids), ForcingMask) and not isinstance(Mask(ids), ForcingMask)

        def answer(mask: Any) -> tuple[list[Any], Any]:
            session = engine.session("all")
            events = session.events(
                "the fox", max_tokens=15, ignore_eos=True, logprobs=2, mask=mask, **options
            )
            return list(events), session.last

        plain, without = answer(Mask(ids))
        found, stats = answer(Forcing(ids))
        assert found == plain
        assert stats.accepted_tokens >= 9 and (lookup or without.drafted_tokens == 0)
        if not lookup:  # nobody computes the last one, so it is no draft
            assert stats.drafted_tokens == stats.accepted_tokens == 9
        wrong, stats = answer(Forcing(ids, wrong=1))
        assert wrong == plain and (lookup or stats.accepted_tokens == 0)


def test_many_at_once(toy_bundle: Bundle) -> None:
    with Engine(toy_bundle, lookup=False) as engine:
        ids = engine.tokenizer.encode(LETTERS)
        options: dict[str, Any] = {"max_tokens": 15, "ignore_eos": True}
        expected = engine.session("all").generate("the fox", mask=Mask(ids), **options)
        sessions = [engine.session("all") for _ in range(5)]
        running = [one.events("the fox", mask=Forcing(ids), **options) for one in sessions]
        assert ["".join(event.text for event in events) for events in running] == [expected] * 5
        assert all(one.last is not None and one.last.accepted_tokens == 9 for one in sessions)


class Failing(Mask):
    def __init__(self, force: Callable[[], Any]) -> None:
        super().__init__([5] * 15)
        self._force = force

    def forced(self, chosen: tuple[int, ...], most: int) -> Any:
        return self._force() if len(chosen) == 4 else ()


def fail() -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("force", "error", "what"),
    [
        (fail, ZeroDivisionError, "^$"),
        (lambda: 5, RunError, r"forced tokens is 5\nhint: "),
        (lambda: ["x"], RunError, r"forced tokens is \['x'\]\nhint: "),
        (lambda: [320], RunError, "the mask forces token 320, which is not in the vocabulary\nhint: "),
    ],
)
def test_an_error_is_of_its_generation_alone(
    toy_bundle: Bundle, force: Callable[[], Any], error: type[Exception], what: str
) -> None:
    with Engine(toy_bundle, lookup=False) as engine:
        expected = engine.session().generate("ab", max_tokens=9, ignore_eos=True)
        wrong = engine.session().events("ab", max_tokens=9, ignore_eos=True, mask=Failing(force))
        other = engine.session().events("ab", max_tokens=9, ignore_eos=True)
        assert "".join(event.text for event in other) == expected
        with pytest.raises(error, match=what):
            list(wrong)
        assert list(wrong) == []
        alone = engine.session().events("ab", max_tokens=9, ignore_eos=True, mask=Failing(force))
        with pytest.raises(error, match=what):
            list(alone)


def test_it_can_cancel(toy_bundle: Bundle) -> None:
    with Engine(toy_bundle) as engine:
        session = engine.session()

        def force() -> list[int]:
            session.cancel()
            return [5]

        session.generate("ab", max_tokens=9, ignore_eos=True, mask=Failing(force))
        assert session.last is not None
        assert (session.last.finish_reason, session.last.generated_tokens) == ("cancelled", 4)
