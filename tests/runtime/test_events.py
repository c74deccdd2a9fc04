"""Events of a generation: text, the tokens that it stands for, and logarithms of probabilities."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from bedplate.bundle.store import Bundle
from bedplate.errors import RunError
from bedplate.runtime.engine import Engine
from bedplate.runtime.request import Event

OPTIONS: dict[str, Any] = {"max_tokens": 30, "temperature": 50.0}


@pytest.fixture(scope="module")
def engine(toy_bundle: Bundle) -> Iterator[Engine]:
    with Engine(toy_bundle) as engine:
        yield engine


def events(engine: Engine, prompt: Any = "ab", **options: Any) -> list[Event]:
    return list(engine.session().events(prompt, **{**OPTIONS, **options}))


def tokens(found: list[Event]) -> list[int]:
    return [token for event in found for token in event.tokens]


@pytest.mark.parametrize("seed", range(6))
def test_texts_and_tokens_are_those_of_the_generation(engine: Engine, seed: int) -> None:
    session = engine.session()
    found = list(session.events("ab", **OPTIONS, seed=seed))
    stats = session.last
    assert stats is not None
    assert "".join(event.text for event in found) == engine.session().generate("ab", **OPTIONS, seed=seed)
    assert engine.tokenizer.decode(tokens(found)) == "".join(event.text for event in found)
    assert len(tokens(found)) == stats.generated_tokens
    assert all(event.text for event in found[:-1])
    assert all(event.finish_reason is None for event in found[:-1])
    assert found[-1].finish_reason == stats.finish_reason
    assert all(event.logprobs is None for event in found)


def test_an_end_token_is_in_no_event(engine: Engine) -> None:
    end = engine.bundle.manifest.tokenizer.eos_ids[0]
    found = events(engine, logit_bias={end: 100}, temperature=0)
    assert found == [Event(text="", tokens=(), logprobs=None, finish_reason="stop")]


def test_tokens_of_a_stop_string_are_in_the_last_event(engine: Engine) -> None:
    letters = [engine.tokenizer.encode(letter)[-1] for letter in "xyz"]
    order = iter([letters[0], letters[1], letters[2], letters[0]])

    def mask(chosen: tuple[int, ...]) -> bytes:
        return (1 << next(order)).to_bytes(40, "little")

    found = events(engine, mask=mask, stop=["yz"])
    assert [(event.text, event.tokens) for event in found] == [
        ("x", tuple(letters[:1])),
        ("", tuple(letters[1:])),
    ]
    assert found[-1].finish_reason == "stop"


def test_logprobs_are_of_the_model_itself(engine: Engine) -> None:
    """Before temperature, penalties, bias and mask."""
    found = events(engine, seed=3, logprobs=4, presence_penalty=1.0, ignore_eos=True, banned_tokens=[5])
    prompt, chosen = engine.tokenizer.encode("ab"), tokens(found)
    logprobs = [one for event in found for one in event.logprobs or ()]
    assert [one.token for one in logprobs] == chosen and len(chosen) == 30
    assert all(len(event.logprobs or ()) == len(event.tokens) for event in found)
    rows = engine.session().logits([*prompt, *chosen])[len(prompt) - 1 : -1].astype(np.float64)
    for one, row in zip(logprobs, rows, strict=True):
        expected = row - row.max() - np.log(np.exp(row - row.max()).sum())
        assert one.logprob == pytest.approx(expected[one.token], abs=2e-6)
        order = np.argsort(-row, kind="stable")[:4]
        assert [token for token, _ in one.top] == order.tolist()
        assert [value for _, value in one.top] == pytest.approx(expected[order].tolist(), abs=2e-6)


def test_logprobs_of_the_chosen_alone(engine: Engine) -> None:
    found = events(engine, seed=3, logprobs=0)
    assert all(one.top == () for event in found for one in event.logprobs or ())
    assert sum(len(event.logprobs or ()) for event in found) == len(tokens(found)) > 0


def test_logprobs_of_more_tokens_than_there_are(engine: Engine) -> None:
    """As of all."""
    all_of_them = events(engine, seed=3, logprobs=320)
    assert events(engine, seed=3, logprobs=10**30) == all_of_them
    assert list(engine.session().logprobs([5, 9, 13], top=10**30)) == list(
        engine.session().logprobs([5, 9, 13], top=320)
    )


def test_logprobs_of_a_text_are_those_of_its_logits(engine: Engine) -> None:
    """Longer than what is computed at once, and of a session that goes on with what it holds."""
    ids = [int(one) for one in np.random.default_rng(3).integers(2, 320, 150)]
    session = engine.session("all")
    session.step([7, 8])
    found = list(session.logprobs(ids, top=2))
    assert session.tokens == (7, 8) and [one.token for one in found] == ids[1:]
    rows = engine.session("all").logits(ids)[:-1].astype(np.float64)
    for one, row in zip(found, rows, strict=True):
        expected = row - row.max() - np.log(np.exp(row - row.max()).sum())
        assert one.logprob == pytest.approx(expected[one.token], abs=2e-6)
        assert [token for token, _ in one.top] == np.argsort(-row, kind="stable")[:2].tolist()


def test_logprobs_of_logits_that_are_not_numbers(engine: Engine) -> None:
    session = engine.session()
    session.use("all", scale=3e38)
    with pytest.raises(RunError, match="the model's logits are not numbers\nhint: "):
        list(session.logprobs([5, 9, 13]))


@pytest.mark.parametrize("option", ["mask", "on_prefill"])
def test_a_function_of_the_caller_that_has_nothing_more(engine: Engine, option: str) -> None:
    """Its StopIteration does not look like the end of the answer."""
    nothing = iter(())
    options: dict[str, Any] = {option: lambda *_: next(nothing)}
    asked: list[Iterator[Any]] = [
        engine.session().events("ab", max_tokens=3, **options),
        engine.session().generate("ab", max_tokens=3, stream=True, **options),
    ]
    for pieces in asked:
        with pytest.raises(RuntimeError, match="raised StopIteration"):
            list(pieces)
    with pytest.raises(RuntimeError, match="raised StopIteration"):
        asyncio.run(engine.session().generate_async("ab", max_tokens=3, **options))
    assert engine.running == 0


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_a_prompt_of_token_ids(engine: Engine, kind: Any) -> None:
    ids = engine.tokenizer.encode("the fox")
    found = events(engine, kind(ids), seed=1)
    assert found == events(engine, "the fox", seed=1)
    assert engine.session().generate(kind(ids), max_tokens=5) == engine.session().generate(
        "the fox", max_tokens=5
    )


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"prompt": [5, "a"]}, r"prompt is \[5, 'a'\]"),
        ({"prompt": [5, -1]}, "token -1 is not in the vocabulary"),
        ({"prompt": [5, 10**6]}, "token 1000000 is not in the vocabulary"),
        ({"prompt": np.zeros((2, 2))}, "prompt is array"),
        ({"prompt": np.zeros(0, int)}, "there are no tokens"),
        ({"prompt": [True]}, "token -1 is not in the vocabulary"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"logprobs": True}, "logprobs is True"),
        ({"mask": 5}, "mask is 5"),
        ({"min_tokens": 31}, "min_tokens is 31"),
        ({"banned_tokens": [10**6]}, "token 1000000 is not in the vocabulary"),
        ({"logit_bias": {320: 1.0}}, "token 320 is not in the vocabulary"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(
    engine: Engine, options: dict[str, Any], complaint: str
) -> None:
    session = engine.session()
    with pytest.raises(RunError, match=rf"(?s){complaint}.*\nhint: "):
        session.events(**{"prompt": "ab", **OPTIONS, **options})
    assert session.tokens == () and session.last is None


def test_an_option_that_is_none(engine: Engine) -> None:
    for method in (engine.session().events, engine.session().generate):
        with pytest.raises(TypeError, match="topp"):
            method("ab", max_tokens=1, topp=1.0)  # type: ignore[call-arg]


def test_cancelled(engine: Engine) -> None:
    session = engine.session()
    running = session.events("ab", **OPTIONS, seed=1)
    first = next(running)
    assert first.finish_reason is None
    session.cancel()
    rest = list(running)
    assert rest[-1].finish_reason == "cancelled"
    assert session.last is not None
    assert len(tokens([first, *rest])) == session.last.generated_tokens


def test_statistics_count_all_time_but_the_callers(engine: Engine) -> None:
    session = engine.session()

    def mask(chosen: tuple[int, ...]) -> None:
        time.sleep(0.01)

    start, away = time.perf_counter(), 0.0
    for _ in session.events("the fox", max_tokens=10, ignore_eos=True, mask=mask):
        time.sleep(0.02)
        away += 0.02
    whole, stats = time.perf_counter() - start, session.last
    assert stats is not None
    assert stats.prefill_seconds >= 0.01 and stats.decode_seconds >= 0.09
    assert stats.prefill_seconds + stats.decode_seconds <= whole - away
