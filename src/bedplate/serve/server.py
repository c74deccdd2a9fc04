"""What all routes share: the models, and the way of a request from its body to the end of its answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from bedplate.errors import BedplateError
from bedplate.serve import stream
from bedplate.serve.answers import Choice, start
from bedplate.serve.catalog import Catalog, Model
from bedplate.serve.errors import ApiError, of_bedplate
from bedplate.serve.live import Live
from bedplate.serve.settings import Settings
from bedplate.serve.wire import first_problem

_Body = TypeVar("_Body", bound=BaseModel)
_Result = TypeVar("_Result")
MOST_BYTES = 8 << 20  # of a body


class Ticket:
    """A request that may use the engine. It is given back when the answer has ended, or the client is gone.

    key: fair shares are counted for it.
    """

    def __init__(self, request: Request, key: str, held: AsyncExitStack) -> None:
        self.key = key
        self._request, self._held = request, held

    async def stream(self, lines: AsyncGenerator[str], choices: Sequence[Choice]) -> Response:
        """An answer as server-sent events. The ticket is held until they end.

        Raises what is wrong with the request, before anything is said.
        """
        await start(choices)
        for choice in choices:
            self._held.callback(choice.session.cancel)
        return stream.EventStream(_with_errors(lines), self._held.pop_all())

    async def whole(self, answer: Coroutine[Any, Any, _Result]) -> _Result:
        """Wait for an answer. If the client goes away, it is cancelled."""
        answering = asyncio.ensure_future(answer)
        gone = asyncio.ensure_future(_gone(self._request))
        try:
            await asyncio.wait([answering, gone], return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                raise ClientDisconnect
            return answering.result()
        finally:
            answering.cancel()
            gone.cancel()
            await asyncio.gather(answering, gone, return_exceptions=True)


class Server:
    """What the routes need."""

    def __init__(self, catalog: Catalog, settings: Settings) -> None:
        self.catalog, self.settings = catalog, settings
        self.live = Live(catalog, settings)
        for base in catalog.bases:
            base.room.seconds = settings.memory_seconds

    @asynccontextmanager
    async def ticket(self, request: Request, model: Model, user: str | None) -> AsyncIterator[Ticket]:
        """A place for a request. ApiError: there is none."""
        async with AsyncExitStack() as held:
            held.enter_context(model.base.watch.running(model))
            yield Ticket(request, user or "", held)


async def body_of(request: Request, kind: type[_Body]) -> _Body:
    """ApiError: it is too long, no JSON, or has a field that is not honoured."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MOST_BYTES:
            raise ApiError(413, f"The body has more than {MOST_BYTES} bytes.")
    try:
        return kind.model_validate_json(bytes(data))
    except ValidationError as error:
        message, field = first_problem(error.errors(include_url=False, include_input=False))
        raise ApiError(400, message, param=field) from None


async def _gone(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.05)


async def _with_errors(lines: AsyncGenerator[str]) -> AsyncGenerator[str]:
    """An error after the status has been sent is said as the last line."""
    async with aclosing(lines):
        try:
            async for line in lines:
                yield line
        except ApiError as error:
            yield stream.data(error.body())
        except BedplateError as error:
            yield stream.data(of_bedplate(error).body())
