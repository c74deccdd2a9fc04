"""A request on its way to a replica and back, without Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from bedplate.deploy.ray.forwarded import Call, Head, adapters_of, answered
from bedplate.deploy.ray.ingress import Ingress, _Forwarded
from bedplate.deploy.ray.options import RayOptions
from bedplate.deploy.ray.router import AdapterRouter
from bedplate.deploy.ray.together import together
from bedplate.serve import guard

CALL = Call("POST", "/echo", b"a=1", [(b"x-own", b"yes")], ("127.0.0.1", 1), b'{"b": 2}', [])


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ({"model": "toy"}, []),
        ({"model": "sql"}, ["sql"]),
        ({"model": "toy:sql"}, ["sql"]),
        ({"model": "toy:a:b"}, ["a:b"]),
        ({"model": "sql", "lora": [{"id": "a", "scale": 0.5}, {"id": "b"}]}, ["a", "b"]),
        ({"model": "sql", "lora": []}, []),
        ({"model": "sql", "lora": None}, ["sql"]),
        ({"model": 5}, []),
        ({"model": "toy", "lora": ["a", {"id": 5}, {"id": ""}]}, []),
        ([], []),
    ],
)
def test_the_adapters_of_a_body(body: Any, names: list[str]) -> None:
    assert adapters_of(json.dumps(body).encode(), "toy") == names


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000])
def test_the_body_is_no_json(body: bytes) -> None:
    assert adapters_of(body, "toy") == []


def test_an_answer() -> None:
    async def echo(request: Request) -> Response:
        said = {**await request.json(), **request.query_params, "own": request.headers["x-own"]}
        return JSONResponse(said, status_code=418)

    async def run() -> list[Head | bytes]:
        app = Starlette(routes=[Route("/echo", echo, methods=["POST"])])
        return [part async for part in answered(app, CALL)]

    head, *body = asyncio.run(run())
    assert (
        isinstance(head, Head)
        and head.status == 418
        and (b"content-type", b"application/json") in head.headers
    )
    assert [json.loads(part) for part in body if isinstance(part, bytes)] == [
        {"b": 2, "a": "1", "own": "yes"}
    ]


def test_a_reader_that_leaves_cancels_the_application() -> None:
    ended: list[str] = []

    async def endless(request: Request) -> Response:
        async def lines() -> Any:
            try:
                while True:
                    yield "line\n"
                    await asyncio.sleep(0)
            finally:
                ended.append("lines")

        return StreamingResponse(lines())

    async def run() -> None:
        app = Starlette(routes=[Route("/echo", endless, methods=["POST"])])
        async with aclosing(answered(app, CALL)) as parts:
            async for part in parts:
                if not isinstance(part, Head):
                    break
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())
    assert ended == ["lines"]


def test_what_is_said_at_once_is_sent_together() -> None:
    async def lines() -> AsyncIterator[str]:
        for number in range(1000):
            yield f"{number}\n"
            await asyncio.sleep(0)

    async def run() -> list[Head | bytes]:
        return [part async for part in answered(StreamingResponse(lines()), CALL)]

    _, *body = asyncio.run(run())
    assert b"".join(part for part in body if isinstance(part, bytes)).split() == [
        b"%d" % n for n in range(1000)
    ]
    assert len(body) < 100


def test_an_application_that_fails() -> None:
    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError

    async def run() -> None:
        async for _ in answered(fails, CALL):
            raise AssertionError("it says nothing")

    with pytest.raises(ZeroDivisionError):
        asyncio.run(run())


def chosen(name: str, replicas: dict[str, tuple[int, set[str]]], spill: int = 4) -> list[list[str]]:
    """What the router prefers. replicas: how many requests each has, and which adapters."""
    known = {one: count for one, (count, _) in replicas.items()}
    router = AdapterRouter.__new__(AdapterRouter)
    router.initialize_state(spill=spill)
    router._replica_queue_len_cache = SimpleNamespace(get=known.get)
    candidates = [
        SimpleNamespace(replica_id=_Id(one), multiplexed_model_ids=adapters)
        for one, (_, adapters) in replicas.items()
    ]
    metadata = SimpleNamespace(multiplexed_model_id=name)
    pending = SimpleNamespace(metadata=metadata, routing_context=SimpleNamespace(should_backoff=False))
    ranks = asyncio.run(router.choose_replicas(candidates, pending))
    assert pending.routing_context.should_backoff
    return [[one.replica_id.unique_id for one in rank] for rank in ranks]


class _Id(str):
    @property
    def unique_id(self) -> str:
        return str(self)


def test_the_router_prefers_who_has_the_adapter() -> None:
    none: set[str] = set()
    assert chosen("sql", {"a": (0, none), "b": (3, {"sql"}), "c": (0, {"chat"})})[0] == ["b"]
    assert chosen("sql", {"a": (0, none), "b": (4, {"sql"})}) == [["a"], ["b"], ["a"]]
    assert chosen("sql", {"a": (3, none), "b": (4, {"sql"}), "c": (9, {"sql"})})[0] in (
        ["b", "c"],
        ["c", "b"],
    )
    assert sorted(chosen("", {"a": (0, none), "b": (9, {"sql"})})[0]) == ["a", "b"]


def test_an_adapter_that_nobody_has_goes_where_its_name_says() -> None:
    replicas = {one: (0, set[str]()) for one in "abcd"}
    homes = {name: chosen(name, replicas)[0] for name in map(str, range(40))}
    assert {one for home in homes.values() for one in home} == set("abcd")
    del replicas["a"]
    after = {name: chosen(name, replicas)[0] for name in homes}
    assert all(after[name] == home for name, home in homes.items() if home != ["a"])


def test_metrics_of_replicas() -> None:
    text = (
        "# HELP bedplate:tokens_total Tokens.\n# TYPE bedplate:tokens_total counter\n"
        'bedplate:tokens_total{{of="a"}} {}.0\n'
    )
    said = together({"one": text.format(1), "two": text.format(2)}).decode()
    assert said.splitlines() == [
        "# HELP bedplate:tokens_total Tokens.",
        "# TYPE bedplate:tokens_total counter",
        'bedplate:tokens_total{of="a",replica="one"} 1.0',
        'bedplate:tokens_total{of="a",replica="two"} 2.0',
    ]
    assert together({}) == b""


def test_options() -> None:
    options = RayOptions.model_validate({"bundle": "b", "replicas": "2", "settings": {"max_tokens": 5}})
    assert options.replicas == 2 and options.server().max_tokens == 5
    for wrong in (
        {"replicas": 0},
        {"bundles": "b"},
        {"replicas": 3, "max_replicas": 2},
        {"settings": {"host": "127.0.0.1"}},
        {"settings": {"most_tokens": 5}},
    ):
        with pytest.raises(ValidationError):
            RayOptions.model_validate({"bundle": "b", **wrong})


class _Answer:
    """What a handle gives: parts, and then an error, if it is one."""

    def __init__(self, parts: list[Any]) -> None:
        self._parts = parts
        self.cancelled = False

    async def __aiter__(self) -> AsyncIterator[Any]:
        for part in self._parts:
            if isinstance(part, Exception):
                raise part
            yield part

    def cancel(self) -> None:
        self.cancelled = True


class _Handle:
    """Replicas of which each answers once."""

    def __init__(self, *answers: list[Any]) -> None:
        self.left, self.given, self.asked = list(answers), list[_Answer](), list[Any]()
        self.respond = SimpleNamespace(remote=self._answer)

    def options(self, **options: Any) -> _Handle:
        self.asked.append(options)
        return self

    def _answer(self, call: Call) -> _Answer:
        self.given.append(_Answer(self.left.pop(0)))
        return self.given[-1]


def forwarded(handle: _Handle, path: str = "/v1/chat/completions") -> tuple[int, str]:
    """The status and the body of an answer that the ingress passes on."""
    said: list[Any] = []

    async def send(message: Any) -> None:
        said.append(message)

    async def receive() -> Any:
        raise AssertionError("the body is read")

    scope = {"type": "http", "method": "POST"}
    call = CALL._replace(path=path, adapters=["sql"])
    asyncio.run(_Forwarded(handle, call)(scope, receive, send))
    assert [one["type"] for one in said[1:]] == ["http.response.body"] * (len(said) - 1)
    assert not said[-1].get("more_body", False)
    assert all(answer.cancelled for answer in handle.given)
    assert handle.asked == [{"stream": True, "multiplexed_model_id": "sql"}] * len(handle.given)
    return said[0]["status"], b"".join(one["body"] for one in said[1:]).decode()


STREAM = Head(200, [(b"content-type", b"text/event-stream; charset=utf-8")])
LOST = RayActorError()


def test_a_lost_replica_is_replaced_before_it_has_begun() -> None:
    answer = [Head(200, []), b"yes"]
    assert forwarded(_Handle(answer)) == (200, "yes")
    assert forwarded(_Handle([LOST], [Head(200, []), LOST], answer)) == (200, "yes")
    status, body = forwarded(_Handle(*[[LOST]] * 9))
    assert status == 503 and json.loads(body)["error"]["code"] == "replica_lost"
    status, body = forwarded(_Handle(*[[LOST]] * 9), "/v1/messages")
    assert status == 503 and json.loads(body)["type"] == "error"
    # Comments that keep the stream open say nothing.
    handle = _Handle([STREAM, b": ping\n\n", LOST], [STREAM, b"data: 1\n\n"])
    assert forwarded(handle) == (200, ": ping\n\ndata: 1\n\n")


@pytest.mark.parametrize(
    ("path", "begins"),
    [
        ("/v1/chat/completions", 'data: {"error": {"message": "The replica that answers is lost."'),
        ("/v1/messages", 'event: error\ndata: {"type": "error", "error": {"type": "api_error"'),
        ("/v1/responses", 'event: error\ndata: {"type": "error", "code": "replica_lost"'),
    ],
)
def test_a_stream_that_has_begun_ends_with_an_error(path: str, begins: str) -> None:
    status, body = forwarded(_Handle([STREAM, b"data: 1\n\n", LOST], [STREAM, b"data: 1\n\n"]), path)
    assert status == 200 and body.removeprefix("data: 1\n\n").startswith(begins)


def test_an_answer_that_has_begun_breaks_off() -> None:
    with pytest.raises(ConnectionError):
        forwarded(_Handle([Head(200, []), b"{", LOST]))


def test_too_many_wait() -> None:
    status, body = forwarded(_Handle([BackPressureError(5, 5)]))
    assert status == 429 and json.loads(body)["error"]["type"] == "rate_limit_error"


class TestTheGuard:
    """What an ingress lets through to a replica."""

    HEADERS: ClassVar = {"authorization": "Bearer secret"}

    def ingress(self, tmp_path: Path, *answers: list[Any], **settings: Any) -> Ingress:
        (tmp_path / "keys").write_text("secret")
        options = RayOptions(bundle="toy.bundle", api_key_file=str(tmp_path / "keys"), settings=settings)
        return Ingress(_Handle(*answers), options)

    def ask(
        self,
        ingress: Ingress,
        *pieces: bytes,
        path: str = "/v1/chat/completions",
        method: str = "POST",
        headers: Mapping[str, str] = HEADERS,
    ) -> tuple[int, Any, int]:
        """The status and the body of the answer, and how many pieces of the body were not read. After the pieces,
        nothing comes, unless the last one is empty.
        """
        left, said = list(pieces), list[Any]()

        async def receive() -> Any:
            if not left:
                await asyncio.sleep(60)
            piece = left.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(piece)}

        async def send(message: Any) -> None:
            said.append(message)

        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": encoded}

        async def run() -> None:
            answer = await ingress(Request(scope))
            await answer(scope, receive, send)

        asyncio.run(run())
        return said[0]["status"], b"".join(one["body"] for one in said[1:]), len(left)

    def test_asks_for_a_key_before_it_reads(self, tmp_path: Path) -> None:
        ingress = self.ingress(tmp_path, [Head(200, []), b"yes"])
        for headers in ({}, {"authorization": "Bearer wrong"}):
            status, body, left = self.ask(ingress, b"{}", b"", headers=headers)
            assert (status, left) == (401, 2) and json.loads(body)["error"]["code"] == "invalid_api_key"
        status, body, _ = self.ask(ingress, path="/v1/messages", headers={})
        assert status == 401 and json.loads(body)["error"]["type"] == "authentication_error"
        assert self.ask(ingress, b"{", b"}", b"") == (200, b"yes", 0)
        status, body, left = self.ask(ingress, b"{}", b"", path="/v1/load_lora_adapter")
        assert (status, left) == (403, 2)

    def test_bounds_each_body_and_all_together(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(guard, "_BODIES", 1)
        answer = [Head(200, []), b"yes"]
        ingress = self.ingress(tmp_path, answer, answer, max_body=10)
        for _ in range(2):  # what the first one held is free
            assert self.ask(ingress, b"x" * 8, b"")[0] == 200
        assert self.ask(ingress, headers={**self.HEADERS, "content-length": "11"})[0] == 413
        monkeypatch.setattr(guard, "_BODIES", 2)
        assert self.ask(ingress, b"x" * 8, b"x" * 8, b"")[0] == 413
        monkeypatch.setattr(guard, "_BODIES", 0)
        status, body, _ = self.ask(ingress, b"x" * 8, b"")
        assert status == 503 and json.loads(body)["error"]["code"] == "overloaded"

    def test_waits_for_a_body_only_so_long(self, tmp_path: Path) -> None:
        assert self.ask(self.ingress(tmp_path, client_timeout=0.05), b"{")[0] == 408

    def test_answers_browsers_that_ask_whether_they_may(self, tmp_path: Path) -> None:
        ingress = self.ingress(tmp_path, allow_origins=["https://page.example"])
        asked = {"origin": "https://page.example", "access-control-request-method": "POST"}
        assert self.ask(ingress, method="OPTIONS", headers=asked)[0] == 200

    def test_does_not_end_an_answer_that_breaks_off(self, tmp_path: Path) -> None:
        with pytest.raises(ConnectionError):
            self.ask(self.ingress(tmp_path, [Head(200, []), b"{", LOST]), b"{}", b"")
