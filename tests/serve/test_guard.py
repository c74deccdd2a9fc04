"""What stands before the routes: keys, other sites, bodies that are none, failures, bad clients beside good ones."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import logging
import shutil
import socket
import struct
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from live import Live, running
from raw import ask, chat, open_request, wait_until
from starlette.types import Message

import bedplate
from bedplate.errors import BedplateError
from bedplate.runtime.activity import resident_bytes
from bedplate.runtime.template_guard import Templates
from bedplate.serve import guard
from bedplate.serve.answers import Choice
from bedplate.serve.chat import ChatRequest
from bedplate.serve.keys import Keys
from bedplate.serve.limits import Place
from bedplate.serve.settings import Settings
from bedplate.serve.stream import EventStream
from bedplate.serve.wire import read_json

MARK = "zanzibar"  # stands in prompts, and must stand in no log


@pytest.fixture(scope="module")
def live(toy_bundle: bedplate.Bundle) -> Iterator[Live]:
    limits = Settings(max_body=100_000, client_timeout=1.0, allow_origins=("https://page.example",))
    with running({"toy": toy_bundle}, limits) as live:
        yield live


@pytest.mark.parametrize(
    ("lines", "names"),
    [
        (
            ["a", "", "# b", "c=d", "abc=="],
            {b"a": "key1", b"d": "c", b"abc==": "key5", b"c=d": None, b"": None},
        ),
        ([" name=k=e=y "], {b"k=e=y": "name"}),
    ],
)
def test_names_of_keys(lines: list[str], names: dict[bytes, str | None]) -> None:
    keys = Keys.of(lines)
    assert {key: keys.name_of(key) for key in names} == names


@pytest.mark.parametrize("lines", [[], ["# none"], ["a=x", "a=y"], ["a b"], ["ä"]])
def test_keys_that_are_none(lines: list[str], tmp_path: Path) -> None:
    with pytest.raises(BedplateError, match="API key"):
        Keys.of(lines)
    with pytest.raises(BedplateError, match="cannot be read"):
        Keys.of_file(tmp_path / "none")


def test_a_key_is_needed(toy_bundle: bedplate.Bundle) -> None:
    with running({"toy": toy_bundle}, Settings(keys=Keys.of(["one=secret", "two=other"]))) as live:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"x-api-key": ""},
            {"Authorization": "secret"},
        ):
            said = ask(live.address, path="/v1/models", headers=headers)
            assert said.status == 401 and said.error["code"] == "invalid_api_key"
        said = ask(live.address, {}, path="/v1/messages", headers={"x-api-key": "wrong"})
        assert said.status == 401 and said.body["type"] == "error"
        assert said.error["type"] == "authentication_error" and said.body["request_id"]
        assert ask(live.address, path="/health").status == 200
        for headers in ({"Authorization": "Bearer secret"}, {"x-api-key": "other"}):
            assert ask(live.address, path="/v1/models", headers=headers).status == 200
        keys, place = list[str](), live.server.places.place

        def kept(one: Place) -> AbstractAsyncContextManager[None]:
            keys.append(one.key)
            return place(one)

        live.server.places.place = kept  # type: ignore[method-assign,assignment]
        ask(live.address, chat(max_tokens=1), headers={"Authorization": "Bearer secret"})
        assert keys == ["one"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:8080", "Origin": "http://evil.example:8080"}, 403),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 200),
        ({"Host": "localhost:1", "Origin": "http://localhost:2"}, 403),
        ({"Host": "page.example"}, 200),
        ({"Host": "["}, 403),
        ({"Host": "localhost:1", "Origin": "http://["}, 403),
        ({"Origin": "https://page.example"}, 200),
    ],
)
def test_pages_of_other_sites(live: Live, headers: dict[str, str], status: int) -> None:
    said = ask(live.address, path="/v1/models", headers=headers)
    assert said.status == status
    if "page" in headers.get("Origin", ""):
        assert said.headers["access-control-allow-origin"] == "https://page.example"
    else:
        assert "access-control-allow-origin" not in said.headers


def test_other_names_are_fine_with_a_key_or_beyond_loopback(toy_bundle: bedplate.Bundle) -> None:
    with running({"toy": toy_bundle}, Settings(keys=Keys.of(["secret"]))) as live:
        headers = {"Host": "some.example", "x-api-key": "secret"}
        assert ask(live.address, path="/v1/models", headers=headers).status == 200


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "default": "?"}}}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"", 400),
        (b"\xff\xfe", 400),
        (b"[" * 50_000, 400),
        (
            b'{"model": "all", "messages": [{"role": "user", "content": "x", "more": '
            + b"[" * 90
            + b"]" * 90
            + b"}]}",
            400,
        ),
        (json.dumps(chat()).encode()[:-1] + b', "max_tokens": ' + b"9" * 5000 + b"}", 400),
        (json.dumps(chat(seed=1e308)).encode(), 400),
        (json.dumps(chat(temperature=float("nan"))).encode(), 400),
        *(
            (json.dumps(chat(tools=[TOOL])).replace('"?"', number).encode(), 400)
            for number in ("1e999", "NaN", "-Infinity", "9" * 250 + "e0099", "9" * 320 + ".5")
        ),
        (b'{"model": "all", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b" " * 100_001, 413),
    ],
)
def test_bodies_that_are_none(live: Live, body: bytes, status: int) -> None:
    said = ask(live.address, body)
    assert said.status == status and said.error["message"]


def _rest(made: socket.socket) -> bytes:
    """What the server says until it closes the connection."""
    said = b""
    with suppress(ConnectionResetError):
        while piece := made.recv(65536):
            said += piece
    return said


def _raw(address: str, data: bytes) -> bytes:
    """What the server says to it. Nothing: it closed the connection."""
    to = urlsplit(address)
    with socket.create_connection((to.hostname, to.port or 0), timeout=10) as made:
        try:
            made.sendall(data)
        except (ConnectionResetError, BrokenPipeError):
            return b""
        return _rest(made)


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize("number", ["1e-999", '"NaN 1e999"', "1e308", "9" * 300])
def test_numbers_that_are_finite(number: str) -> None:
    body = json.dumps(chat(tools=[TOOL])).replace('"?"', number).encode()
    tools = read_json(ChatRequest, body).tools
    assert tools is not None and tools[0].function.parameters == {
        "type": "object",
        "default": json.loads(number),
    }


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET / HTTP/9.9\r\n\r\n", b"400"),
        (HEAD + b"Content-Length: -1\r\n\r\n", b"400"),
        (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", b"400"),
        (HEAD + b"Content-Length: 99999999999999999999999999\r\n\r\n", b"400"),
        (HEAD + b"Content-Length: 10000000000\r\n\r\n", b"413"),
        (HEAD + b"Content-Length: 50\r\n\r\n{", b"408"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{", b"408"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"fff\r\n" + b" " * 0xFFF + b"\r\n", b"408"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + (b"fff\r\n" + b" " * 0xFFF + b"\r\n") * 30, b"413"),
        (HEAD + b"X: " + b"y" * 300_000, b""),
        (HEAD + b"X: y\r\n" * 100_000, b""),
        (HEAD + b"X: " + b"y" * 80_000 + b"\r\n\r\n", b""),
        (HEAD + b"X: " + b" " * 80_000 + b"y\r\n\r\n", b""),
        (HEAD + b"X: y\r\n" * 13_000 + b"\r\n", b""),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ".ljust(65_532) + b"\r\n\r\n", b"200"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ".ljust(65_600) + b"\r\n\r\n", b""),
        (b"CONNECT some.example:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", b"400"),
        (HEAD[:20], b""),
        (b"", b""),
    ],
)
def test_broken_http(live: Live, data: bytes, answer: bytes) -> None:
    start = time.monotonic()
    said = _raw(live.address, data)
    assert said == answer or said.split(b" ")[1:2] == [answer], said
    assert time.monotonic() - start < 9, "the server lets go of the connection"
    wait_until(lambda: not live.server.places.running)


def _posted(headers: bytes, *, chunked: bool = False, more: bytes = b"") -> bytes:
    body = json.dumps(chat(max_tokens=1)).encode()
    if chunked:
        return (
            HEAD
            + headers
            + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n%b\r\n" % (len(body), body, more)
        )
    return HEAD + headers + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"


@pytest.mark.parametrize(
    "data",
    [
        _posted(H2C),
        _posted(H2C, chunked=True),
        _posted(b"Connection: close, Upgrade\r\nUpgrade: h2c\r\n"),
        _posted(b"Connection: Upgrade\r\nConnection: HTTP2-Settings\r\nUpgrade: h2c, x\r\nUpgrade: y\r\n"),
        _posted(b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n"),
        _posted(b"Expect: 100-continue\r\n" + H2C),
        _posted(H2C).replace(b"HTTP/1.1", b"HTTP/1.0"),
    ],
)
@pytest.mark.parametrize("step", [1, 50, 10_000])
def test_another_protocol_is_not_spoken(live: Live, data: bytes, step: int) -> None:
    """Java's client, for one, asks for HTTP/2 with each request."""
    to = urlsplit(live.address)
    with socket.create_connection((to.hostname, to.port or 0), timeout=10) as made:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(data), step):
            made.sendall(data[at : at + step])
        said = _rest(made)
    assert said.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").startswith(b"HTTP/1.1 200"), said
    assert b'"finish_reason"' in said and b"upgrade" not in said.lower()


def test_requests_on_one_connection_that_ask_for_another_protocol(live: Live) -> None:
    said = _raw(live.address, _posted(H2C) + _posted(b"") + _posted(H2C, chunked=True))
    assert said.count(b"HTTP/1.1 200") == said.count(b'"finish_reason"') == 3


def test_what_follows_a_body_is_no_header(live: Live) -> None:
    more = b"Origin: https://evil.example\r\n"
    assert b" 200 " in _raw(live.address, _posted(b"", chunked=True, more=more))
    assert b" 403 " in _raw(live.address, _posted(more))


def test_a_body_that_never_ends_is_cut_off(live: Live) -> None:
    to = urlsplit(live.address)
    sent = 0
    with socket.create_connection((to.hostname, to.port or 0), timeout=10) as made:
        made.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        with pytest.raises(OSError, match=r"reset|[Bb]roken"):
            while sent < 100 << 20:
                made.sendall(b"ffff\r\n" + b" " * 0xFFFF + b"\r\n")
                sent += 0xFFFF
    assert sent < 20 << 20


def test_who_reads_too_slowly_holds_no_place() -> None:
    """One that takes a little now and then never stands still."""
    closed = list[str]()

    async def lines() -> AsyncGenerator[str]:
        try:
            while True:
                yield "data: 1\n\n"
        finally:
            closed.append("lines")

    async def never() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def slowly(message: Message) -> None:
        await asyncio.sleep(0.01)

    async def main() -> None:
        held = AsyncExitStack()
        held.callback(closed.append, "held")
        answer = EventStream(lines(), held, ping=5, seconds=0.1)
        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        await asyncio.wait_for(answer(scope, never, slowly), 5)

    asyncio.run(main())
    assert closed == ["lines", "held"]


def test_bodies_take_so_much_memory_together(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_BODIES", 0.5)
    to = urlsplit(live.address)
    half = HEAD + b"Content-Length: 60000\r\n\r\n" + b" " * 30_000
    with socket.create_connection((to.hostname, to.port or 0), timeout=10) as first:
        first.sendall(half)
        time.sleep(0.2)
        assert _raw(live.address, half).split()[1] == b"503"
        assert ask(live.address, chat(max_tokens=1)).status == 200
        assert _rest(first).split()[1] == b"408"


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_is_a_500_and_says_nothing_of_the_request(
    live: Live, stream: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(choice: Choice) -> None:
        raise KeyError(f"{MARK} in {choice.options}") from ValueError(MARK)

    monkeypatch.setattr(Choice, "finish", property(fail))
    log = io.StringIO()
    monkeypatch.setattr(logging.getLogger("bedplate.serve"), "handlers", [logging.StreamHandler(log)])
    messages = [{"role": "user", "content": MARK}]
    said = ask(live.address, chat(messages=messages, max_tokens=2, stream=stream))
    if stream:
        last = said.body.strip().split(b"\n\n")[-1].removeprefix(b"data: ")
        error = json.loads(last)["error"]
    else:
        assert said.status == 500
        error = said.error
    assert error["type"] == "server_error" and MARK not in str(said.body)
    logged = log.getvalue() + "".join(capfd.readouterr())
    assert MARK not in logged and "KeyError" in logged and error["code"].removeprefix("failure_") in logged
    wait_until(lambda: not live.server.places.running)


def _good(address: str) -> list[Any]:
    """What normal clients get."""
    bodies = [chat(model=model, max_tokens=40, ignore_eos=True) for model in ("all", "all2", "toy")] * 2
    with ThreadPoolExecutor(3) as threads:
        said = list(threads.map(lambda body: ask(address, body), bodies))
    assert {one.status for one in said} == {200}
    return [one.body["choices"] for one in said]


def test_bad_clients_do_not_disturb_good_ones(toy_bundle: bedplate.Bundle) -> None:
    """One reads nothing, some leave, some speak no HTTP or no JSON, and some send too much, all at once."""
    limits = Settings(max_body=1 << 20, client_timeout=2.0)
    with running({"toy": toy_bundle}, limits) as live:
        expected = _good(live.address)
        # More than the system's buffers take: the server has to wait for its reader.
        wide = chat(stream=True, n=32, ignore_eos=True, logprobs=True, top_logprobs=20)
        readers = [open_request(live.address, wide, receive_buffer=4096) for _ in range(2)]
        wait_until(lambda: len(live.server.places.running) == 2)
        before = resident_bytes()

        def leave(_: int) -> None:
            for stream in (True, False):
                gone = open_request(live.address, chat(stream=stream, n=2, ignore_eos=True))
                time.sleep(0.01)
                gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # by RST
                gone.close()

        def mumble(_: int) -> None:
            _raw(live.address, b"nonsense\r\n\r\n")
            assert ask(live.address, b"{" * 1000).status == 400

        def overfill(_: int) -> None:
            assert ask(live.address, b" " * (1 << 20) + b" ").status == 413

        with ThreadPoolExecutor(4) as threads:
            bad = [threads.submit(one, turn) for turn in range(10) for one in (leave, mumble, overfill)]
            assert _good(live.address) == expected
            assert _good(live.address) == expected
            for one in bad:
                one.result()
        assert resident_bytes() - before < 64 << 20
        # Who reads nothing is let go.
        wait_until(lambda: not live.server.places.running)
        wait_until(lambda: not live.process.server_state.connections)
        for reader in readers:
            with reader:
                assert b"[DONE]" not in _rest(reader)
        assert _good(live.address) == expected
        assert not live.engine._scheduler._active
        wait_until(lambda: gc.collect() >= 0 and not live.engine._sessions)  # also where one had just begun


def test_a_chat_template_that_never_ends(
    toy_bundle: bedplate.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = Templates.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "seconds", 0.3)
    shutil.copytree(toy_bundle.path, tmp_path / "bad.bundle")
    bad = bedplate.Bundle.open(tmp_path / "bad.bundle")
    template = bad.chat_settings(None).template_file
    assert template is not None
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template.write_text(
        endless.ljust(template.stat().st_size)
    )  # bundles are opened by the sizes of their files
    with (
        running({"toy": toy_bundle, "bad": bad}, guard_templates=True) as live,
        ThreadPoolExecutor(2) as threads,
    ):
        expected = _good(live.address)
        # `all` is the name of an adapter in both bundles.
        failing = [
            threads.submit(ask, live.address, chat(model="bad:all", stream=stream))
            for stream in (False, True)
        ]
        assert _good(live.address) == expected
        for one in failing:
            said = one.result()
            assert said.status == 400 and "chat template takes more than 0.3 seconds" in said.error["message"]
        assert ask(live.address, chat(model="bad")).status == 400
        body = {"model": "bad", "prompt": "the fox", "max_tokens": 2}
        assert ask(live.address, body, path="/v1/completions").status == 200
