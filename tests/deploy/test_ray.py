"""Two replicas on a Ray of one machine, asked by OpenAI's own client. One Ray serves all tests of this file."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray_live import CONTEXT, MESSAGES, Node, ray_running, until, wanted
from toy import BuildToy, save_adapter, save_toy_model, toy_config

import bedplate

pytestmark = pytest.mark.slow
REFRESH = 0.5
STORED = ("one", "two", "three")


@contextmanager
def _expecting(
    folder: Path, bundle: bedplate.Bundle, adapters: dict[str, Path]
) -> Iterator[Callable[[str | None, int], str]]:
    """What an engine of the test's own says, with each adapter packed as replicas do."""
    own = bedplate.Bundle.open(shutil.copytree(bundle.path, folder / "own.bundle"))
    with bedplate.Engine(own, threads=1) as engine:
        own.add_all({name: adapters[name] for name in adapters if name != "own"}, programs=False)

        def expected(adapter: str | None, tokens: int) -> str:
            return engine.session(adapter).generate(MESSAGES, max_tokens=tokens, ignore_eos=True)

        yield expected


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, build_toy: BuildToy) -> Iterator[Node]:
    folder = tmp_path_factory.mktemp("ray")
    save_toy_model(folder / "model", toy_config(max_position_embeddings=CONTEXT))
    adapters = {
        name: save_adapter(folder / "peft" / name, folder / "model", seed=seed)
        for seed, name in enumerate(("own", *STORED, "other"), 1)
    }
    bundle = build_toy(folder / "model", out=folder / "toy.bundle", max_context=CONTEXT, programs=False)
    bundle.add(adapters["own"], name="own")
    store = folder / "store"
    for name in STORED:
        shutil.copytree(adapters[name], store / name)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {
        "bundle": str(bundle.path),
        "adapters": f"file://{store}",
        "cache": str(folder / "cache"),
        "replicas": 2,
        "adapters_per_replica": 2,
        "spill": 6,
        "refresh_seconds": REFRESH,
        "api_key_file": str(folder / "keys"),
        "settings": {"max_prompt": 1000},
    }
    (folder / "keys").write_text("key-of-tests")
    with (
        _expecting(folder, bundle, adapters) as expected,
        ray_running(folder, port, options) as process,
        openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="key-of-tests", max_retries=0, timeout=60
        ) as client,
    ):
        yield Node(process, client, store, adapters, expected)


@pytest.mark.parametrize("model", [None, "own", "two"])
def test_an_answer_is_that_of_an_engine(node: Node, model: str | None) -> None:
    expected = node.expected(model, 12)
    for name in (model or "toy", f"toy:{model}" if model else "toy"):
        assert node.ask(name, 12)[1] == expected
    stream = node.client.chat.completions.create(model=model or "toy", stream=True, **wanted(12))
    pieces = [one.choices[0] for one in stream]
    assert "".join(one.delta.content or "" for one in pieces) == expected
    assert pieces[-1].finish_reason == "length"


def test_all_apis(node: Node) -> None:
    expected = node.expected("two", 16)
    said = node.client.responses.create(model="two", input=MESSAGES, max_output_tokens=16, temperature=0)
    assert expected.startswith(said.output_text)
    events = node.client.responses.create(
        model="two", input=MESSAGES, max_output_tokens=16, temperature=0, stream=True
    )
    assert (
        "".join(one.delta for one in events if one.type == "response.output_text.delta") == said.output_text
    )
    asked = {"model": "two", "messages": MESSAGES, "max_tokens": 16, "temperature": 0}
    message = node.client.post("/messages", cast_to=dict[str, Any], body=asked)
    assert message["content"][0]["text"] == said.output_text
    tokens = node.client.post("/../tokenize", cast_to=dict[str, Any], body={"model": "two", "prompt": "fox"})
    assert tokens["count"] == len(tokens["tokens"]) > 0


def test_models_are_listed_before_they_are_used(node: Node) -> None:
    models = {model.id: model.model_extra or {} for model in node.client.models.list()}
    assert list(models) == ["toy", "own", *sorted(STORED)]
    assert models["toy"]["parent"] is None and models["one"]["parent"] == "toy"
    assert models["one"]["root"] == f"file://{node.store}/one"
    assert node.client.models.retrieve("toy:one").id == "toy:one"


def test_several_adapters_of_a_request(node: Node) -> None:
    asked = wanted(6)
    asked["extra_body"] = {"lora": [{"id": "one", "scale": 0}, {"id": "two", "scale": 0}], "ignore_eos": True}
    said = node.client.chat.completions.create(model="toy", **asked)
    assert said.choices[0].message.content == node.expected(None, 6)


def test_a_request_goes_where_its_adapter_is(node: Node) -> None:
    """Also of more adapters than a replica keeps. Where the machine is busy, a replica can say too late how long its
    queue is: then the other one has the request.
    """
    names = ["own", *STORED]
    homes: dict[str, Counter[str]] = {name: Counter() for name in names}
    for _ in range(7):
        for name in names:
            replica, said = node.ask(name)
            assert said == node.expected(name, 6)
            homes[name][replica] += 1
    # Of 28 requests, by chance, so many would be at their homes with a probability of 1/4,500.
    assert sum(max(home.values()) for home in homes.values()) >= 25, homes


def test_a_hot_adapter_spreads(node: Node) -> None:
    expected = node.expected("one", 500)
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda _: node.ask("one", 500), range(32)))
    assert {said for _, said in answers} == {expected}
    counts = Counter(replica for replica, _ in answers)
    assert len(counts) == 2 and min(counts.values()) >= 4, counts


def test_errors(node: Node) -> None:
    with pytest.raises(openai.NotFoundError, match=r"'none' does not exist\. There are: toy, own") as missing:
        node.ask("none")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        node.client.chat.completions.create(model="one", messages=MESSAGES, extra_body={"functions": []})
    assert refused.value.param == "functions"
    with pytest.raises(openai.APIStatusError) as large:
        node.client.completions.create(model="one", prompt="x" * (9 << 20))
    assert large.value.status_code == 413
    with pytest.raises(openai.NotFoundError):
        node.client.get("/nothing", cast_to=object)


def test_keys_and_limits(node: Node) -> None:
    for key in ("none", "key-of-test"):
        other = node.client.with_options(api_key=key)
        with pytest.raises(openai.AuthenticationError):
            other.chat.completions.create(model="one", **wanted(1))
        with pytest.raises(openai.AuthenticationError):
            other.models.list()
    with pytest.raises(openai.BadRequestError, match="at most 1000"):
        node.client.completions.create(model="one", prompt=[5] * 1001)
    with pytest.raises(openai.PermissionDeniedError, match="Adapters come from the folder"):
        node.client.post("/load_lora_adapter", cast_to=object, body={})


def test_metrics_of_all_replicas(node: Node) -> None:
    url = str(node.client.base_url).removesuffix("/v1/")
    with httpx.Client(base_url=url) as client:
        said = client.get("/metrics", headers={"Authorization": "Bearer key-of-tests"})
        assert client.get("/ready").status_code == 200
    families = {family.name: family for family in text_string_to_metric_families(said.text)}
    for name in ("vllm:num_requests_waiting", "vllm:lora_requests_info"):
        assert len({sample.labels["replica"] for sample in families[name].samples}) == 2


def test_a_broken_adapter_disturbs_nobody(node: Node) -> None:
    shutil.copytree(node.adapters["one"], node.store / "broken")
    (node.store / "broken" / "adapter_model.safetensors").write_bytes(b"none")
    try:
        with pytest.raises(openai.BadRequestError, match="adapter cannot be used") as caught:
            node.ask("broken")
        assert caught.value.param == "model"
        assert node.ask("one")[1] == node.expected("one", 6)
    finally:
        shutil.rmtree(node.store / "broken")


def test_adapters_come_and_go(node: Node) -> None:
    node.put("other", "late")
    assert node.ask("late")[1] == node.expected("other", 6)  # at once
    until(lambda: all("late" in [one.id for one in node.client.models.list()] for _ in range(8)), 10)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(node.ask, "late", 3000)
        time.sleep(0.2)
        node.put("two", "late")  # while it is in use
        expected = node.expected("two", 6)
        took = until(lambda: node.ask("late")[1] == expected, 10)
        assert took < REFRESH + 2
        assert node.ask("late")[1] == expected
        assert running.result()[1] == node.expected("other", 3000)  # to its end as it began
    shutil.rmtree(node.store / "late")

    def gone() -> bool:
        try:
            node.ask("late")
        except openai.NotFoundError:
            return True
        return False

    until(gone, 10)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_replica(node: Node, stream: bool) -> None:
    client = node.client.with_options(timeout=1)
    if stream:
        with client.chat.completions.create(model="one", stream=True, **wanted(CONTEXT - 100)) as pieces:
            next(iter(pieces))
    else:
        with pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(model="one", **wanted(CONTEXT - 100))
    until(node.is_idle, 5)


def test_a_killed_replica_loses_no_request_that_had_not_begun_to_answer(node: Node) -> None:
    expected = node.expected("one", 3000)
    until(lambda: len(node.replicas()) == 2 and node.is_idle(), 60)
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(node.ask, "one", 3000) for _ in range(8)]
        time.sleep(0.3)
        os.kill(node.busiest(), signal.SIGKILL)
        assert not all(one.done() for one in asked)
        assert [one.result()[1] for one in asked] == [expected] * 8


def test_a_killed_replica_ends_a_stream_with_an_error(node: Node) -> None:
    until(lambda: len(node.replicas()) == 2 and node.is_idle(), 60)
    stream = node.client.chat.completions.create(model="one", stream=True, **wanted(CONTEXT - 100))
    said = "".join(next(stream).choices[0].delta.content or "" for _ in range(20))
    os.kill(node.busiest(), signal.SIGKILL)
    with pytest.raises(openai.APIError) as caught:
        for _ in stream:
            pass
    assert caught.value.code == "replica_lost"
    assert said and node.expected("one", 100).startswith(said)
    assert node.ask("one")[1] == node.expected("one", 6)
