"""`/metrics`, `/health` and `/ready`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from live import running, serving
from scraped import Got, Scraped, get, scrape

import bedplate
from bedplate.errors import BundleError, RunError
from bedplate.runtime.activity import MemoryUse
from bedplate.runtime.engine import Engine
from bedplate.serve.catalog import Base, Model
from bedplate.serve.limits import Places
from bedplate.serve.metrics import Metrics
from bedplate.serve.settings import Settings

MESSAGES: list[Any] = [{"role": "user", "content": "the fox"}]


@pytest.fixture
def own(toy_bundle: bedplate.Bundle) -> Iterator[str]:
    """A server that no other test asks."""
    with serving({"toy": toy_bundle}) as address:
        yield address


@pytest.fixture
def asking(own: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{own}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_counters_are_what_the_answers_say(own: str, asking: openai.OpenAI) -> None:
    before = scrape(own)
    assert before.value("bedplate_prompt_tokens_total", model_name="toy") == 0
    for name in ("prompt", "reused", "generated", "drafted", "accepted"):
        assert before.types[f"bedplate_{name}_tokens"] == "counter"
    assert before.all("bedplate_adapter_requests_total") == [], "an adapter that nobody used costs nothing"
    long = [{"role": "user", "content": "the fox and a dog " * 8}]
    said = [
        asking.chat.completions.create(model=model, messages=long, max_tokens=length, temperature=0)  # type: ignore[arg-type]
        for model, length in (("toy", 5), ("all", 7), ("toy:all", 9), ("all2", 11))
    ]
    used = [one.usage for one in said if one.usage is not None]
    after = scrape(own)
    prompt, generated = sum(one.prompt_tokens for one in used), sum(one.completion_tokens for one in used)
    reused = sum(one.prompt_tokens_details.cached_tokens or 0 for one in used if one.prompt_tokens_details)
    assert reused > 0
    assert after.value("bedplate_prompt_tokens_total", model_name="toy") == prompt
    assert after.value("bedplate_generated_tokens_total", model_name="toy") == generated
    assert after.value("bedplate_reused_tokens_total", model_name="toy") == reused
    assert after.value("bedplate_answers_total", finish_reason="length") == 4
    for name, count in {"request_queue": 4, "time_to_first_token": 4, "request": 4}.items():
        assert after.types[f"bedplate_{name}_seconds"] == "histogram"
        assert after.value(f"bedplate_{name}_seconds_count", model_name="toy") == count
    gaps = after.value("bedplate_inter_token_latency_seconds_count", model_name="toy")
    assert generated - 2 * len(used) <= gaps < generated, "the first text can have several tokens"
    assert after.value("bedplate_adapter_requests_total", adapter_name="all") == 2
    assert after.value("bedplate_adapter_generated_tokens_total", adapter_name="all2") == 11
    asked = [said[1].usage, said[2].usage]
    expected = sum(one.prompt_tokens for one in asked if one is not None)
    assert after.value("bedplate_adapter_prompt_tokens_total", adapter_name="all") == expected


def test_answers_of_one_request(own: str, asking: openai.OpenAI) -> None:
    asking.chat.completions.create(model="all", messages=MESSAGES, max_tokens=4, n=3, temperature=1, seed=1)
    found = scrape(own)
    assert found.value("bedplate_adapter_requests_total", adapter_name="all") == 1
    assert found.value("bedplate_time_to_first_token_seconds_count") == 1
    assert sum(value for _, value in found.all("bedplate_answers_total")) == 3


def test_responses_are_counted_by_route_and_status(own: str, asking: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        asking.chat.completions.create(model="none", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError):
        asking.chat.completions.create(model="all", messages=MESSAGES, n=0)
    assert get(f"{own}/nowhere").status == get(f"{own}/else").status == 404
    assert get(f"{own}/tokenize").status == 405
    found = scrape(own)
    paths = [
        ("/v1/chat/completions", "404", 1),
        ("/v1/chat/completions", "400", 1),
        ("other", "404", 2),
        ("/tokenize", "405", 1),
    ]
    for path, status, count in paths:
        assert found.value("bedplate_responses_total", path=path, status=status) == count


def test_what_fails_is_an_answer_of_its_own_kind(
    own: str, asking: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise RunError("there is no memory")

    monkeypatch.setattr("bedplate.runtime.generation.Generation.computed", broken)
    with pytest.raises(openai.BadRequestError, match="no memory"):
        asking.chat.completions.create(model="all", messages=MESSAGES)
    assert scrape(own).value("bedplate_answers_total", finish_reason="error") == 1


def test_what_is_in_memory(toy_bundle: bedplate.Bundle, own: str, asking: openai.OpenAI) -> None:
    asking.chat.completions.create(model="all2", messages=MESSAGES, max_tokens=2)
    found = scrape(own)
    loaded = found.all("bedplate_lora_adapter_loaded")
    assert loaded == [({"model_name": "toy", "adapter_name": "all2", "level": "cpu", "rank": "4"}, 1)]
    parts = {labels["part"]: value for labels, value in found.all("bedplate_memory_bytes")}
    assert list(parts) == ["foundation", "adapters", "kv", "cache"] and min(parts.values()) >= 0
    assert parts["adapters"] == found.value("bedplate_lora_adapter_bytes", adapter_name="all2") > 0
    assert found.value("process_resident_memory_bytes") > parts["foundation"] > parts["adapters"]


def test_an_adapter_that_is_unloaded_leaves_no_series(toy_bundle: bedplate.Bundle) -> None:
    settings = Settings(allow_adapters_from=(str(toy_bundle.path),))
    with running({"toy": toy_bundle}, settings) as live:
        with openai.OpenAI(base_url=f"{live.address}/v1", api_key="none") as client:
            for name in ("all", "all2"):
                client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=2)
        assert 'adapter_name="all"' in get(f"{live.address}/metrics").text
        live.server.live.unload("all", base_model=None)
        text = get(f"{live.address}/metrics").text
    assert 'adapter_name="all2"' in text and 'adapter_name="all"' not in text


@pytest.mark.parametrize(
    "accept", ["application/openmetrics-text; version=abc", "text/plain;version=a;escaping=x"]
)
def test_a_version_that_is_none(own: str, accept: str) -> None:
    got = get(f"{own}/metrics", accept=accept)
    assert got.status == 200 and got.kind.startswith("text/plain")


def test_metrics_are_read_in_a_thread(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop goes on meanwhile, however many adapters there are."""
    threads, memory = [], Engine.memory

    def noted(engine: Engine) -> MemoryUse:
        threads.append(threading.current_thread().name)
        return memory(engine)

    monkeypatch.setattr(Engine, "memory", noted)
    scrape(own)
    assert len(threads) == 1 and threads[0].startswith("AnyIO worker")


class _Entry:
    def read_info(self) -> Any:
        return SimpleNamespace(rank=16)


def _of_adapters(count: int) -> str:
    """The metrics of a base with many adapters, all of them loaded and used."""
    entries = {f"adapter-{at:04}": _Entry() for at in range(count)}
    memory = MemoryUse(process=1, foundation=1, adapters=dict.fromkeys(entries, 1), kv=0, cache=0)
    engine: Any = SimpleNamespace(
        bundle=SimpleNamespace(adapters=entries), memory=lambda: memory, memory_bytes=None
    )
    base = Base("toy", engine)
    metrics = Metrics([base], Places(Settings()))
    for name in entries:
        fixed: Any = SimpleNamespace(adapters={name: 1.0})
        with metrics.running(Model(name, base, fixed)):
            pass
    return metrics.text("")[0].decode()


def test_a_thousand_adapters_make_a_short_text() -> None:
    few, many = _of_adapters(10), _of_adapters(1000)
    assert (many.count("\n") - few.count("\n")) / 990 <= 6, "lines for each adapter"
    assert len(many) < 600_000  # with a histogram for each it would be 6.6 million
    assert Scraped(many).value("bedplate_adapter_requests_total", adapter_name="adapter-0999") == 1


def _ready(address: str, before: str) -> Got:
    """What `/ready` says, when it no longer says `before`."""
    deadline = time.monotonic() + 60
    while before in (got := get(f"{address}/ready")).text and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    return got


def test_ready_when_the_model_is_loaded(toy_bundle: bedplate.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, load = threading.Event(), Base.load

    def slowly(base: Base) -> None:
        assert loaded.wait(60)
        load(base)

    monkeypatch.setattr(Base, "load", slowly)
    with serving({"toy": toy_bundle}) as address:
        try:
            got = get(f"{address}/ready")
            assert (got.status, got.json["error"]["type"]) == (503, "unavailable_error")
            assert get(f"{address}/health").json == {"status": "ok"}
        finally:
            loaded.set()
        assert _ready(address, "loading").json == {"status": "ok"}


def test_a_model_that_cannot_be_loaded_is_never_ready(
    toy_bundle: bedplate.Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(base: Base) -> None:
        raise BundleError("foundation.ptd is damaged")

    monkeypatch.setattr(Base, "load", broken)
    with serving({"toy": toy_bundle}) as address:
        got = _ready(address, "loading")
        assert (got.status, got.json["error"]["message"]) == (503, "foundation.ptd is damaged")
