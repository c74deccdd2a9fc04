"""A request on its way from the ingress to a replica, and the answer on its way back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any, NamedTuple

from starlette.types import ASGIApp, Message

ADAPTERS = "bedplate.adapters"  # in the scope of a request: `Call.adapters`

_TOGETHER_SECONDS = (
    0.01  # what a stream says in this time is sent together: each part that Ray carries costs CPU
)
REPLICA = b"x-bedplate-replica"  # a header of each answer: who gave it


class Call(NamedTuple):
    """A request. adapters: which it needs, as far as its body tells."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    client: tuple[str, int] | None
    body: bytes
    adapters: list[str]


class Head(NamedTuple):
    """What an answer begins with."""

    status: int
    headers: list[tuple[bytes, bytes]]


def adapters_of(body: bytes, base: str) -> list[str]:
    """The adapters that the body of a request names, if it is one that names a model. They need not exist."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):  # the application says what is wrong
        return []
    if not isinstance(asked, dict):
        return []
    model, lora = asked.get("model"), asked.get("lora")
    if isinstance(lora, list):
        names = [one.get("id") for one in lora if isinstance(one, dict)]
    else:
        names = [model.removeprefix(f"{base}:")] if isinstance(model, str) and model != base else []
    return [name for name in names if isinstance(name, str) and name]


async def answered(app: ASGIApp, call: Call) -> AsyncGenerator[Head | bytes]:
    """The answer of an ASGI application: its head, and then its body as it comes.

    If nobody reads on, the application is cancelled.
    """
    sent: asyncio.Queue[Message | None] = asyncio.Queue(maxsize=64)
    complete = False
    unread = [{"type": "http.request", "body": call.body, "more_body": False}]

    async def receive() -> Message:
        if unread:
            return unread.pop()
        await asyncio.Event().wait()  # the client stays: when it leaves, the application is cancelled
        raise AssertionError("nobody sets it")

    async def run() -> None:
        try:
            await app(_scope(call), receive, sent.put)
        finally:
            await sent.put(None)

    running = asyncio.create_task(run())
    try:
        ended = False
        while not ended:
            messages = [await sent.get()]
            while not sent.empty():
                messages.append(sent.get_nowait())
            ended = messages[-1] is None
            body = b""
            for message in messages:
                if message is not None and message["type"] == "http.response.start":
                    yield Head(message["status"], list(message.get("headers", ())))
                elif message is not None:
                    body += message.get("body", b"")
                    complete = not message.get("more_body", False)
            if body:
                yield body
            if body and not complete:
                await asyncio.sleep(_TOGETHER_SECONDS)
        if not complete:  # else it has said what went wrong
            await running
    finally:
        running.cancel()
        while not sent.empty():  # so that it can end
            sent.get_nowait()
        await asyncio.gather(running, return_exceptions=True)


def _scope(call: Call) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.path,
        "raw_path": call.path.encode(),
        "query_string": call.query,
        "root_path": "",
        "headers": call.headers,
        "client": call.client,
        "server": None,
        ADAPTERS: call.adapters,
    }
