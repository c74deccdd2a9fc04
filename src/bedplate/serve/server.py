"""What all routes share: the models, and the way of a request from its body to the end of its answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Scope

from bedplate.errors import BedplateError
from bedplate.serve.catalog import Catalog, Model
from bedplate.serve.errors import of_bedplate
from bedplate.serve.limits import Place, Places
from bedplate.serve.live import Live
from bedplate.serve.metrics import Metrics
from bedplate.serve.settings import Settings
from bedplate.serve.stream import EventStream
from bedplate.serve.wire import Asking, Lora, read_json

_Body = TypeVar("_Body", bound=BaseModel)
_Result = TypeVar("_Result")
_COUNTING = 4  # requests at once whose tokens are only counted: their texts may be long


class Ticket:
    """A request that may use the engine. It is given back when the answer has ended, or the client is gone.

    place: what it may use.
    """

    def __init__(self, request: Request, place: Place, held: AsyncExitStack, settings: Settings) -> None:
        self.place = place
        self._request, self._held, self._settings = request, held, settings

    def stream(self, lines: AsyncGenerator[str]) -> Response:
        """An answer as server-sent events. The ticket is held until they end."""
        left, settings = self.place.seconds_left, self._settings
        # At its deadline an answer ends, and then its last words are to be taken.
        seconds = None if left is None else left + settings.client_timeout
        held = self._held.pop_all()
        return EventStream(lines, held, ping=settings.ping, seconds=seconds)

    async def whole(self, answer: Coroutine[Any, Any, _Result]) -> _Result:
        """Wait for an answer. If the client goes away, it is cancelled."""
        return await _unless_gone(self._request, answer)


class Server:
    """What the routes need.

    draining: it is told to end: no request comes in any more.  counting: is held while tokens are only counted.
    """

    def __init__(self, catalog: Catalog, settings: Settings, places: Places, metrics: Metrics) -> None:
        self.catalog, self.settings, self.places = catalog, settings, places
        self.live = Live(catalog, settings)
        for base in catalog.bases:
            base.room.seconds = settings.memory_seconds
        self.metrics = metrics
        self.counting = asyncio.Semaphore(_COUNTING)
        self.draining = False
        self._unloaded: str | None = "The model is loading."

    @property
    def unready(self) -> str | None:
        """Why a request is not answered at once, or not at all. None: it is."""
        return "The server is about to stop." if self.draining else self._unloaded

    async def load(self) -> None:
        """Load what every request needs, so that the first one does not wait for it."""
        try:
            for base in self.catalog.bases:
                await run_in_threadpool(base.load)
            self._unloaded = None
        except BedplateError as error:  # a request says it too
            self._unloaded = of_bedplate(error).message

    def model(self, request: Request, name: str, lora: Sequence[Lora] | None = None) -> Model:
        """What a request asks. ApiError: there is no such model, or not the adapters of `lora`."""
        model = self.catalog.find(name, lora)
        if not hasattr(request.state, "key"):  # else it is the name of the API key
            request.state.key = model.key
        return model

    def headers(self, scope: Scope) -> dict[str, str]:
        """What an answer to a request tells besides, whatever it is: the rate of whom the request is counted for."""
        key = scope.get("state", {}).get("key")
        return {} if key is None else self.places.headers(key)

    @asynccontextmanager
    async def ticket(
        self, request: Request, model: Model, asked: Asking, answers: int = 1
    ) -> AsyncIterator[Ticket]:
        """A place for a request that wants so many answers. It waits until there is one.

        ApiError: it gets none.  ClientDisconnect: the client did not wait so long.
        """
        place = Place(model, request.state.key, asked, answers, self.settings)
        async with AsyncExitStack() as held:
            await _unless_gone(request, held.enter_async_context(self.places.place(place)))
            held.enter_context(model.base.watch.running(model))
            # Here, in a thread: it may wait for weights that load. From now on it is known.
            await _unless_gone(request, run_in_threadpool(lambda: model.tokenizer))
            yield Ticket(request, place, held, self.settings)


async def body_of(request: Request, kind: type[_Body]) -> _Body:
    """ApiError: it is too long, no JSON, or has a field that is not honoured."""
    return read_json(kind, await request.body())


async def _unless_gone(request: Request, awaited: Coroutine[Any, Any, _Result]) -> _Result:
    """Wait for something. If the client goes away, it is cancelled."""
    doing = asyncio.ensure_future(awaited)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait([doing, gone], return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        return doing.result()
    finally:
        doing.cancel()
        gone.cancel()
        await asyncio.gather(doing, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
