"""Server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, suppress
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

DONE = "data: [DONE]\n\n"


def data(value: Any, event: str | None = None) -> str:
    """One event. event: its name, for APIs that name them."""
    head = "" if event is None else f"event: {event}\n"
    return f"{head}data: {json.dumps(value, ensure_ascii=False)}\n\n"


class EventStream(StreamingResponse):
    """A response of server-sent events. Where nothing is said for `ping` seconds, as while a long prompt is read, it
    sends a comment: proxies and clients give up where nothing comes for long.

    If the client goes away, or has not taken all of it in so many `seconds`, the lines are closed at once.
    held: is closed after them, also if they never began.
    """

    def __init__(
        self, lines: AsyncGenerator[str], held: AsyncExitStack, *, ping: float, seconds: float | None
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        self._lines, self._held, self._seconds = lines, held, seconds
        super().__init__(_pinged(lines, ping), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            try:
                with suppress(TimeoutError):  # then the connection breaks off
                    async with asyncio.timeout(self._seconds):
                        await super().__call__(scope, receive, send)
            finally:
                await self._lines.aclose()


async def _pinged(lines: AsyncGenerator[str], seconds: float) -> AsyncGenerator[str]:
    following: asyncio.Future[str] | None = None
    try:
        while True:
            if following is None:
                following = asyncio.ensure_future(anext(lines))
            done, _ = await asyncio.wait([following], timeout=seconds)
            if not done:
                yield ": ping\n\n"
                continue
            ready, following = following, None
            try:
                yield ready.result()
            except StopAsyncIteration:
                return
    finally:
        if following is not None:
            following.cancel()
            with suppress(asyncio.CancelledError, StopAsyncIteration):
                await following
