"""How a request is answered, whole or as a stream, in whatever words its API has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bedplate.serve import stream
from bedplate.serve.answers import Choice, start
from bedplate.serve.catalog import Model
from bedplate.serve.errors import ApiError, about, api_error_of
from bedplate.serve.limits import Place
from bedplate.serve.server import Server
from bedplate.serve.wire import Sampling

_Asked = TypeVar("_Asked", bound=Sampling)


class Told(ABC):
    """What is said of the answers of a request. Either `lines` or `whole` is called, once.

    choices: the answers. None has started.
    """

    choices: Sequence[Choice]

    async def begin(self) -> None:
        """Before the lines. Raises what is wrong with the request."""
        await start(self.choices)

    @abstractmethod
    def lines(self) -> AsyncGenerator[str]:
        """Server-sent events, as they come."""

    @abstractmethod
    async def whole(self) -> dict[str, Any]:
        """When all has been said."""

    def failed(self, error: ApiError) -> str:
        """The last line, if something goes wrong after the status has been sent."""
        return stream.data(error.body())


async def answered(
    server: Server, request: Request, asked: _Asked, tell: Callable[[_Asked, Model, Place], Told]
) -> Response:
    """tell: is called in a thread: another process may read a chat template, and weights may load."""
    model = server.model(request, asked.model, asked.lora)
    asked.check()
    async with server.ticket(request, model, asked, asked.answers) as ticket:
        with about("prompt"):
            told = await run_in_threadpool(tell, asked, model, ticket.place)
        if asked.stream:
            await ticket.whole(told.begin())
            return ticket.stream(_lines(told))
        return JSONResponse(await ticket.whole(told.whole()))


async def _lines(told: Told) -> AsyncGenerator[str]:
    async with aclosing(told.lines()) as lines:
        try:
            async for line in lines:
                yield line
        except Exception as error:
            yield told.failed(api_error_of(error))
