"""The model-server protocol of the gateway-api-inference-extension (docs/proposals/003-model-server-protocol), with
the names that vLLM gives its metrics: what an endpoint picker scrapes, and the models that it sends requests to.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from live import serving
from scraped import Scraped, get, scrape

import bedplate
from bedplate.serve.catalog import Base, Model
from bedplate.serve.keys import Keys
from bedplate.serve.limits import Place, Places
from bedplate.serve.metrics import Metrics
from bedplate.serve.settings import Settings
from bedplate.serve.wire import Asking

MESSAGES: list[Any] = [{"role": "user", "content": "the fox"}]
GAUGES = ("vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc")
LORA = "vllm:lora_requests_info"


@pytest.fixture(scope="module")
def own(toy_bundle: bedplate.Bundle) -> Iterator[str]:
    with serving({"toy": toy_bundle}, memory_bytes=1 << 24) as address:
        yield address


@pytest.fixture(scope="module")
def asking(own: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{own}/v1", api_key="none", max_retries=0) as client:
        yield client


def _adapters(found: Scraped) -> tuple[list[str], list[str], int]:
    """Those that run, those that wait, and how many there can be."""
    (labels, stamp), *more = found.all(LORA)
    assert not more and set(labels) == {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}
    assert abs(stamp - time.time()) < 60, "the value is the time"
    running, waiting = (
        [name for name in labels[f"{state}_lora_adapters"].split(",") if name]
        for state in ("running", "waiting")
    )
    return running, waiting, int(labels["max_lora"])


def test_the_metrics_are_there_before_any_request(own: str) -> None:
    found = scrape(own)
    for name in (*GAUGES, LORA):
        assert found.types[name] == "gauge"
    assert [found.value(name, model_name="toy") for name in GAUGES] == [0, 0, 0]
    running, waiting, most = _adapters(found)
    assert running == waiting == [] and most >= 1


def test_completions_and_chat_take_an_adapter_as_model(asking: openai.OpenAI) -> None:
    for model in ("toy", "all", "all2"):
        assert asking.completions.create(model=model, prompt="the fox", max_tokens=2).choices
        assert asking.chat.completions.create(model=model, messages=MESSAGES, max_tokens=2).choices


def test_a_request_that_runs_is_seen(own: str, asking: openai.OpenAI) -> None:
    stream = asking.chat.completions.create(
        model="all8",
        messages=MESSAGES,
        max_tokens=110,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    with stream:
        next(iter(stream))
        found = scrape(own)
    if found.value("vllm:num_requests_running") == 1:  # else it was faster than the scrape
        assert 0 < found.value("vllm:kv_cache_usage_perc") <= 1
    assert "all8" in _adapters(found)[0]
    deadline = time.monotonic() + 60
    while scrape(own).value("vllm:num_requests_running") and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    found = scrape(own)
    assert found.value("vllm:num_requests_running") == 0 == found.value("vllm:kv_cache_usage_perc")
    assert "all8" in _adapters(found)[0], "an adapter that is loaded is ready to serve, also when it is idle"


def test_adapters_that_wait_are_not_those_that_run(toy_bundle: bedplate.Bundle) -> None:
    with bedplate.Engine(toy_bundle, threads=1) as engine:
        base = Base("toy", engine)
        places = Places(settings := Settings())
        metrics = Metrics([base], places)
        asked = Asking(model="toy")
        places.running, places.waiting = (
            [Place(Model("toy", base, engine.fixed(name)), "", asked, 1, settings) for name in names]
            for names in (("all", None), ("all2",))
        )
        found = Scraped(metrics.text("")[0].decode())
        assert _adapters(found)[:2] == (["all"], ["all2"])
        assert found.value("vllm:num_requests_running") == 2 == found.value("bedplate_requests_running")
        assert found.value("vllm:num_requests_waiting") == 1 == found.value("bedplate_requests_waiting")
        places.running, places.waiting = [], []
        assert _adapters(Scraped(metrics.text("")[0].decode()))[:2] == ([], [])


def test_gateways_need_no_key(toy_bundle: bedplate.Bundle) -> None:
    settings = Settings(keys=Keys.of(["of-a-client"]))
    with serving({"toy": toy_bundle}, settings) as address:
        assert [get(f"{address}{path}").status for path in ("/v1/models", "/openapi.json")] == [401, 401]
        assert get(f"{address}/health").status == 200
        found = scrape(address)
    assert found.types[LORA] == "gauge"
    assert found.value("bedplate_responses_total", path="other", status="401") == 2
