"""Limits: who gets a place, how much a request may ask for, and clients that leave."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import toy_tokenizers
from live import Live, running
from raw import MESSAGES, ask, chat, open_request, wait_until

import bedplate
from bedplate.runtime import loaded, loading
from bedplate.runtime.lengths import _Bound, _bound_in, _bound_of, too_long
from bedplate.runtime.request import TokenLogprobs
from bedplate.runtime.session import Session
from bedplate.runtime.tokenizer import Tokenizer
from bedplate.serve import openai_text
from bedplate.serve.errors import ApiError
from bedplate.serve.keys import Keys
from bedplate.serve.limits import Place, Places
from bedplate.serve.settings import Settings


@pytest.fixture(scope="module")
def live(toy_bundle: bedplate.Bundle) -> Iterator[Live]:
    """With two answers at once, and a queue of one."""
    limits = Settings(max_running=2, max_queue=1, max_tokens=60, max_prompt=40, ping=0.05, max_body=200_000)
    with running({"toy": toy_bundle}, limits) as live:
        yield live


@pytest.fixture
def slow(live: Live, monkeypatch: pytest.MonkeyPatch) -> Live:
    """Each step takes 20 ms more."""
    scheduler = live.engine._scheduler
    step = scheduler._step

    def slowed() -> None:
        time.sleep(0.02)
        step()

    monkeypatch.setattr(scheduler, "_step", slowed)
    return live


def _idle(live: Live) -> bool:
    return not live.server.places.running and not live.engine._scheduler._active


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 61}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "fox " * 60}]}, "messages"),
        ({"n": 3}, "n"),
        ({"messages": MESSAGES * 2049}, "messages"),
        ({"stop": ["x" * 1001]}, "stop"),
        ({"user": "x" * 257}, "user"),
        ({"timeout": 0}, "timeout"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_too_much_is_refused_by_name(
    live: Live, fields: dict[str, Any], param: str, stream: bool
) -> None:
    said = ask(live.address, chat(stream=stream, **fields))
    assert said.status == 400 and said.error["param"].split(".")[0] == param
    assert _idle(live)


LONG = "fox " * 40_000
LONG_MESSAGES = [{"role": "user", "content": LONG}]
HELLO = {"role": "user", "content": "the fox"}
# Perhaps not more than the context, until it is tokenized.
FULL = {"role": "user", "content": "the fox " * 25}


@pytest.mark.parametrize(
    ("path", "fields", "called"),
    [
        ("/v1/chat/completions", {"messages": LONG_MESSAGES}, "messages"),
        ("/v1/completions", {"prompt": LONG}, "prompt"),
        (
            "/v1/completions",
            {"prompt": ["the fox", LONG], "echo": True, "max_tokens": 0, "stream": True},
            "prompt",
        ),
        ("/v1/responses", {"input": LONG}, "input"),
        ("/v1/messages", {"messages": LONG_MESSAGES, "max_tokens": 1}, "messages"),
        ("/v1/messages/count_tokens", {"messages": LONG_MESSAGES}, "messages"),
        ("/tokenize", {"prompt": LONG}, "prompt"),
        ("/tokenize", {"messages": LONG_MESSAGES}, "messages"),
    ],
)
def test_a_text_that_is_certainly_too_long_is_not_tokenized(
    live: Live, path: str, fields: dict[str, Any], called: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Tokenizer.encode

    def short(tokenizer: Tokenizer, text: str) -> list[int]:
        assert text != LONG
        return encode(tokenizer, text)

    monkeypatch.setattr(Tokenizer, "encode", short)
    monkeypatch.setattr(Tokenizer, "encode_chat", None)
    said = ask(live.address, {"model": "all", **fields}, path=path)
    assert said.status == 400 and "characters, so it has more than 40 tokens" in said.error["message"]
    assert said.error.get("code", "context_length_exceeded") == "context_length_exceeded"
    where: str = said.error.get("param") or said.error["message"]
    assert where.startswith(called)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "fields", "called"),
    [
        ("/v1/chat/completions", {"messages": [HELLO], "max_tokens": 500}, "max_tokens"),
        (
            "/v1/chat/completions",
            {"messages": [HELLO], "max_completion_tokens": 500},
            "max_completion_tokens",
        ),
        ("/v1/responses", {"input": "the fox", "max_output_tokens": 500}, "max_output_tokens"),
        ("/v1/chat/completions", {"messages": [FULL]}, "messages"),
        ("/v1/responses", {"input": [FULL]}, "input"),
    ],
)
def test_an_error_names_the_field_that_was_sent(
    live: Live, path: str, fields: dict[str, Any], called: str, stream: bool
) -> None:
    said = ask(live.address, {"model": "all", "stream": stream, **fields}, path=path)
    assert (said.status, said.error["param"]) == (400, called)


def test_what_does_not_fit_the_context_is_said_in_words_of_http(live: Live) -> None:
    said = ask(live.address, {"model": "all", "prompt": [5] * 5000}, path="/v1/completions")
    assert said.status == 400 and said.error["code"] == "context_length_exceeded"
    assert said.error["message"] == "prompt: it has 5000 tokens; this server takes at most 40."


@pytest.mark.parametrize(
    ("path", "field", "value", "more"),
    [
        ("/v1/completions", "prompt", [5] * 30_000, {}),
        ("/v1/completions", "prompt", [5] * 30_000, {"echo": True, "max_tokens": 0}),
        ("/v1/completions", "prompt", [[5], [5] * 30_000], {"stream": True}),
        ("/v1/completions", "prompt", ["a"] * 30_000, {}),
        ("/detokenize", "tokens", [5] * 30_000, {}),
    ],
)
def test_many_items_are_refused_before_anything_looks_at_them(
    live: Live, path: str, field: str, value: Any, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "decode", None)
    monkeypatch.setattr(Session, "begin_async", None)
    said = ask(live.address, {"model": "all", field: value, **more}, path=path)
    assert (said.status, said.error["param"]) == (400, field)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"100000": 1}}, "logit_bias.100000"),
        ({"logit_bias": {str(2**40): 1}}, f"logit_bias.{2**40}"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
        ({"min_tokens": 10, "max_tokens": 5}, "min_tokens"),
        ({"min_tokens": 1_000_000}, "min_tokens"),
        ({"prompt": [5, 100_000]}, "prompt.1"),
        ({"prompt": [5, -1]}, "prompt.1"),
        ({"prompt": [5, 100_000], "echo": True, "logprobs": 0}, "prompt.1"),
    ],
)
def test_what_the_engine_refuses_is_named(live: Live, fields: dict[str, Any], param: str) -> None:
    said = ask(live.address, {"model": "all", "prompt": "fox", **fields}, path="/v1/completions")
    assert (said.status, said.error["param"]) == (400, param)
    if "prompt" not in fields:
        body = chat(**{"max_tokens": None, **fields})
        said = ask(live.address, body)
        assert (said.status, said.error["param"]) == (400, param)


def test_an_adapter_that_is_replaced_while_a_request_begins(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one with another tokenizer: the next try finds it."""
    monkeypatch.setattr(Tokenizer, "is_as", lambda tokenizer, other: False)
    said = ask(live.address, chat())
    assert said.status == 503 and said.error["code"] == "adapter_replaced"
    assert said.headers["retry-after"] == "1"


@pytest.mark.parametrize("toy", [toy_tokenizers.llama3, toy_tokenizers.llama2, toy_tokenizers.smollm2])
def test_no_text_has_fewer_tokens_than_its_length_says(toy: Callable[[], toy_tokenizers.Toy]) -> None:
    ours = toy().ours
    bound = _bound_of(ours)
    assert bound is not None
    control = "".join(map(chr, range(32)))
    greek, beyond = "\u03b1\u0314\u0342\u0345", "\U000f0000"
    for text in ("the fox ", "\u1f87", greek, beyond, "    ", *control, control, f"a{control}"):
        whole = text * 50
        kept = len(whole) - sum(map(whole.count, bound.lost))
        assert kept <= bound.longest * len(ours.encode(whole))


def test_characters_that_become_no_token_do_not_count() -> None:
    ours = toy_tokenizers.smollm2().ours
    bound = _bound_of(ours)
    assert bound is not None and bound.lost and ours.encode(bound.lost * 50) == []
    assert too_long(ours, bound.lost * 100_000, 40) is None
    assert too_long(ours, "the fox " * 100_000 + bound.lost, 40) == 800_000


@pytest.mark.parametrize("toy", [toy_tokenizers.unigram, toy_tokenizers.spaces])
def test_of_tokenizers_that_may_leave_out_text_nothing_is_certain(
    toy: Callable[[], toy_tokenizers.Toy],
) -> None:
    assert _bound_of(toy().ours) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("normalizer", {"type": "Strip", "strip_left": True, "strip_right": True}),
        ("normalizer", {"type": "Replace", "pattern": {"String": "ab"}, "content": "a"}),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFKC"}]}),
        ("pre_tokenizer", {"type": "WhitespaceSplit"}),
        ("pre_tokenizer", None),
        ("model", {"vocab": {"a": 0}}),
        ("model", {"vocab": {chr(one): one for one in range(0x100, 0x144)}, "unk_token": "a"}),
    ],
)
def test_what_could_shorten_a_text_is_not_overlooked(live: Live, field: str, value: Any) -> None:
    data = json.loads(live.engine.tokenizer.to_json())
    assert _bound_in(data) == _Bound(max(map(len, data["model"]["vocab"])))
    assert _bound_in({**data, field: value}) is None


def test_the_likelihood_of_a_prompt_has_an_end_too(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    logprobs = Session.logprobs

    def slowly(*arguments: Any, **options: Any) -> Iterator[TokenLogprobs]:
        for one in logprobs(*arguments, **options):
            time.sleep(0.05)
            yield one

    monkeypatch.setattr(Session, "logprobs", slowly)
    monkeypatch.setattr(openai_text, "_AT_ONCE", 1)
    asked = {"model": "all", "prompt": [5] * 40, "echo": True, "logprobs": 0, "max_tokens": 0, "timeout": 0.3}
    said = ask(live.address, asked, path="/v1/completions")
    assert said.status == 503 and said.error["code"] == "timeout"
    assert _idle(live)


def test_a_completion_that_names_no_number_has_no_more_than_are_allowed(toy_bundle: bedplate.Bundle) -> None:
    with running({"toy": toy_bundle}, Settings(max_tokens=3)) as live:
        asked = {"model": "all", "prompt": "the fox", "ignore_eos": True}
        said = ask(live.address, asked, path="/v1/completions")
        assert said.status == 200 and said.body["usage"]["completion_tokens"] == 3


def test_no_limit_named_means_the_server_s(live: Live) -> None:
    said = ask(live.address, chat(ignore_eos=True))
    assert said.body["usage"]["completion_tokens"] == 60


def test_a_full_queue_says_when_to_come_back(slow: Live) -> None:
    places = slow.server.places
    with ThreadPoolExecutor(4) as threads:
        first = threads.submit(ask, slow.address, chat(n=2, max_tokens=20, ignore_eos=True))
        wait_until(lambda: places.running)
        second = threads.submit(ask, slow.address, chat(max_tokens=2))
        wait_until(lambda: places.waiting)
        third = ask(slow.address, chat())
        assert third.status == 429 and third.error["code"] == "rate_limit_exceeded"
        assert int(third.headers["retry-after"]) >= 1
        assert first.result().status == second.result().status == 200


def test_time_is_up_in_the_queue_and_in_an_answer(slow: Live) -> None:
    with ThreadPoolExecutor(1) as threads:
        long = threads.submit(ask, slow.address, chat(n=2, timeout=0.4, ignore_eos=True))
        wait_until(lambda: slow.server.places.running)
        waited = ask(slow.address, chat(timeout=0.1))
        assert waited.status == 503 and waited.error["code"] == "timeout" and "retry-after" in waited.headers
        body = long.result().body
    assert [one["finish_reason"] for one in body["choices"]] == ["length", "length"]
    assert 2 < body["usage"]["completion_tokens"] < 120


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_frees_the_place_within_a_step(slow: Live, stream: bool) -> None:
    gone = open_request(slow.address, chat(stream=stream, n=2, ignore_eos=True))
    wait_until(lambda: slow.engine._scheduler._active)
    queued = open_request(slow.address, chat(stream=stream))
    wait_until(lambda: slow.server.places.waiting)
    queued.close()
    wait_until(lambda: not slow.server.places.waiting)
    assert not _idle(slow)
    steps = slow.engine.activity().steps
    gone.close()
    wait_until(lambda: _idle(slow))
    assert slow.engine.activity().steps - steps < 25, "some go on until the server hears of it, not all 60"

    def nobody_holds_them() -> bool:
        gc.collect()
        return not slow.engine._sessions

    wait_until(nobody_holds_them, seconds=5)


def test_pings_come_while_nothing_is_said(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    step = live.engine._scheduler._step

    def slowed() -> None:
        time.sleep(0.3)
        step()

    monkeypatch.setattr(live.engine._scheduler, "_step", slowed)
    body = ask(live.address, chat(stream=True, max_tokens=1)).body
    assert body.count(b": ping\n\n") >= 2 and body.endswith(b"[DONE]\n\n")


def test_others_are_answered_while_weights_load(
    toy_bundle: bedplate.Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop waits for no lock of the engine."""
    load = loading.load_adapter

    def slowly(*arguments: Any) -> Any:
        time.sleep(2)
        return load(*arguments)

    monkeypatch.setattr(loaded, "load_adapter", slowly)
    mixed = chat(lora=[{"id": "all", "scale": 0.5}, {"id": "all2", "scale": 2.0}], max_tokens=1)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    asks: list[tuple[str, Any]] = [
        ("/v1/chat/completions", mixed),
        ("/v1/chat/completions", chat(model="all8", max_tokens=1)),
        # Tools do not fit the context of the toy.
        ("/v1/chat/completions", chat(model="all8", max_tokens=40, stream=True, tools=tools)),
        ("/v1/chat/completions", chat(model="all8", max_tokens=40, response_format={"type": "json_object"})),
        ("/v1/completions", {"model": "all8", "prompt": "the fox", "max_tokens": 1, "echo": True}),
        ("/v1/messages/count_tokens", {"model": "all8", "messages": MESSAGES}),
        ("/tokenize", {"model": "all8", "messages": MESSAGES}),
        ("/detokenize", {"model": "all8", "tokens": [5]}),
    ]
    with running({"toy": toy_bundle}) as live, ThreadPoolExecutor(8) as threads:
        ask(live.address, chat(model="toy", max_tokens=1))
        asked = [threads.submit(ask, live.address, body, path=path) for path, body in asks]
        longest, rounds = 0.0, 0
        while not all(one.done() for one in asked):
            start = time.perf_counter()
            assert ask(live.address, path="/health").status == 200
            longest, rounds = max(longest, time.perf_counter() - start), rounds + 1
        assert [one.result().status for one in asked] == [200, 200, 400, 200, 200, 200, 200, 200]
        assert longest < 1.8 and rounds > 5  # a load takes two seconds


def test_a_rate_of_tokens(toy_bundle: bedplate.Bundle) -> None:
    with running({"toy": toy_bundle}, Settings(tokens_per_minute=20)) as live:
        first = ask(live.address, chat(max_tokens=10, ignore_eos=True))
        assert first.status == 200 and first.headers["x-ratelimit-limit-tokens"] == "20"
        ask(live.address, chat(max_tokens=20, ignore_eos=True))
        second = ask(live.address, chat(max_tokens=1))
        assert second.status == 429 and second.error["type"] == "tokens"
        assert (
            second.headers["x-ratelimit-remaining-tokens"] == "0" and int(second.headers["retry-after"]) > 1
        )
        assert ask(live.address, chat(model="all2", max_tokens=1)).status == 200
        scored = {"model": "all8", "prompt": [5] * 40, "echo": True, "logprobs": 0, "max_tokens": 0}
        said = [ask(live.address, scored, path="/v1/completions").status for _ in range(2)]
        assert said == [200, 429]


def test_each_answer_tells_the_rate(toy_bundle: bedplate.Bundle) -> None:
    """Of the API key, or of the model. Pages of allowed sites may read it too."""
    keys, site = Keys.of(["one=secret"]), {"Origin": "https://page.example"}
    limits = Settings(tokens_per_minute=20, keys=keys, allow_origins=("https://page.example",))
    wrong = chat(temprature=1)
    with running({"toy": toy_bundle}, limits) as live:
        known = {"Authorization": "Bearer secret", **site}
        asks: list[tuple[str, Any, dict[str, str], int]] = [
            ("/v1/models", None, known, 200),
            ("/v1/chat/completions", wrong, known, 400),
            ("/v1/chat/completions", b"{", known, 400),
            ("/v1/messages", {}, known, 400),
            ("/v1/chat/completions", chat(model="none"), known, 404),
            ("/none", None, known, 404),
            ("/v1/chat/completions", chat(max_tokens=30, ignore_eos=True, stream=True), known, 200),
            ("/v1/chat/completions", chat(max_tokens=1), known, 429),
            ("/v1/chat/completions", wrong, site, 401),
        ]
        for path, body, headers, status in asks:
            said = ask(live.address, body, path=path, headers=headers)
            assert said.status == status, (path, body)
            assert said.headers.get("x-ratelimit-limit-tokens") == (None if status == 401 else "20"), path
            assert said.headers["access-control-expose-headers"] == "*"
    with running({"toy": toy_bundle}, Settings(tokens_per_minute=20)) as live:
        for body in (chat(top_logprobs=1), chat(logit_bias={"9999": 1}), chat(max_tokens=1)):
            assert ask(live.address, body).headers["x-ratelimit-limit-tokens"] == "20"


def test_the_rate_is_told_once(toy_bundle: bedplate.Bundle) -> None:
    with running({"toy": toy_bundle}, Settings(tokens_per_minute=20)) as live:
        for expected in (200, 429):
            with open_request(live.address, chat(max_tokens=30, ignore_eos=True)) as made:
                said = made.recv(65536)
            assert said.split()[1] == str(expected).encode() and said.count(b"x-ratelimit-limit-tokens") == 1


def _place(settings: Settings, key: str, user: str = "", n: int = 1) -> Place:
    model: Any = SimpleNamespace()
    asked: Any = SimpleNamespace(caller=user, timeout=None)
    return Place(model, key, asked, n, settings)


def _uses(place: Place, tokens: int) -> None:
    stats = SimpleNamespace(prompt_tokens=tokens, reused_tokens=0, generated_tokens=0)
    session: Any = SimpleNamespace(last=stats, cancel=lambda: None)
    place.sessions.append(session)


def _order(settings: Settings, asked: list[tuple[str, str]], tokens: Callable[[Place], int]) -> list[str]:
    """Who is served, one after the other, where all have come before the first one is."""
    served: list[str] = []

    async def one(places: Places, key: str, user: str) -> None:
        place = _place(settings, key, user)
        async with places.place(place):
            _uses(place, tokens(place))
            served.append(key + user)
            await asyncio.sleep(0)

    async def all_of_them() -> None:
        places = Places(settings)
        async with places.place(_place(settings, "first")):
            tasks = [asyncio.create_task(one(places, key, user)) for key, user in asked]
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        assert not places.running and not places.waiting and places.answers == 0

    asyncio.run(all_of_them())
    return served


def test_who_was_served_least_comes_first() -> None:
    settings = Settings(max_running=1)
    asked = [("a", ""), ("a", ""), ("a", ""), ("a", ""), ("b", ""), ("b", "")]
    assert "".join(_order(settings, asked, lambda place: 10)) == "ababaa"
    # b's requests are twice as long
    assert "".join(_order(settings, asked, lambda place: 20 if place.key == "b" else 10)) == "abaaba"


def test_within_a_key_users_are_served_alike() -> None:
    asked = [("a", "1"), ("a", "1"), ("a", "1"), ("a", "2"), ("b", "1")]
    assert _order(Settings(max_running=1), asked, lambda place: 10) == ["a1", "b1", "a2", "a1", "a1"]


def test_who_comes_back_has_no_more_claim_than_others() -> None:
    settings = Settings(max_running=1)

    async def main() -> list[str]:
        places, order = Places(settings), list[str]()
        async with places.place(first := _place(settings, "idle")):
            _uses(first, 5)
        async with AsyncExitStack() as held:
            busy = _place(settings, "busy")
            await held.enter_async_context(places.place(busy))
            _uses(busy, 1000)

            async def later(key: str, tokens: int) -> None:
                place = _place(settings, key)
                async with places.place(place):
                    order.append(key)
                    _uses(place, tokens)

            tasks = [asyncio.create_task(later("busy", 10))]
            tasks += [asyncio.create_task(later("idle", 10)) for _ in range(3)]
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        return order

    assert asyncio.run(main()) == ["busy", "idle", "idle", "idle"]


def test_a_large_request_is_not_passed_by_small_ones() -> None:
    settings = Settings(max_running=4)

    async def main() -> None:
        places = Places(settings)
        async with AsyncExitStack() as held:
            await held.enter_async_context(places.place(_place(settings, "a", n=2)))
            large = asyncio.create_task(places.place(_place(settings, "b", n=4)).__aenter__())
            await asyncio.sleep(0)
            small = asyncio.create_task(places.place(_place(settings, "c")).__aenter__())
            await asyncio.sleep(0.01)
            assert not large.done() and not small.done()
        await large
        assert places.answers == 4 and len(places.waiting) == 1
        small.cancel()
        await asyncio.gather(small, return_exceptions=True)
        assert not places.waiting

    asyncio.run(main())


@pytest.mark.parametrize("names", ["one key", "many users", "many keys"])
def test_a_long_queue_costs_little(names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings()
    looks = 0
    tokens: Callable[[Place], int] = vars(Place)["tokens"].fget

    def counted(place: Place) -> int:
        nonlocal looks
        looks += 1
        return tokens(place)

    monkeypatch.setattr(Place, "tokens", property(counted))

    async def one(places: Places, i: int) -> None:
        key, user = (
            ("a", "") if names == "one key" else ("a", str(i)) if names == "many users" else (str(i), "")
        )
        async with places.place(place := _place(settings, key, user)):
            _uses(place, i)
            await asyncio.sleep(0)

    async def main() -> None:
        places = Places(settings)
        await asyncio.gather(*(one(places, i) for i in range(settings.max_running + settings.max_queue)))

    asyncio.run(main())
    # Each comes, gets its place and leaves: each time those that run are looked at a few times.
    assert looks < 8 * settings.max_running * (settings.max_running + settings.max_queue)


def test_no_queue() -> None:
    settings = Settings(max_running=1, max_queue=0)

    async def main() -> None:
        places = Places(settings)
        async with places.place(_place(settings, "a")):
            with pytest.raises(ApiError) as caught:
                async with places.place(_place(settings, "b")):
                    pass
            assert caught.value.status == 429
        async with places.place(_place(replace(settings, timeout=math.inf), "b")):
            pass

    asyncio.run(main())
