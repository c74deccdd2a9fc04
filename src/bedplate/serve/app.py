"""The ASGI application, and the process that serves it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from bedplate.errors import BedplateError
from bedplate.serve import live_api, models, openai_chat, openai_text, openapi
from bedplate.serve.catalog import Base, Catalog
from bedplate.serve.errors import ApiError, of_bedplate
from bedplate.serve.server import Server
from bedplate.serve.settings import Settings

_PARTS = (models, live_api, openai_chat, openai_text)


def create_app(bases: Sequence[Base], settings: Settings | None = None) -> Starlette:
    """The ASGI application of some bundles. It closes their engines when it ends."""
    server = Server(Catalog(bases), settings or Settings())

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        server.live.start()
        yield
        await run_in_threadpool(server.live.close)
        for base in bases:
            await run_in_threadpool(base.engine.close)

    handlers: dict[Any, Callable[[Request, Any], Response]] = {
        ApiError: _said,
        BedplateError: _refused,
        ClientDisconnect: _left,
    }
    routes = [route for part in _PARTS for route in part.routes(server)]
    routes.append(openapi.route(routes))
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=life)


def serve(bases: Sequence[Base], settings: Settings) -> None:
    """Serve until the process is told to end."""
    app = create_app(bases, settings)
    uvicorn.run(
        app, host=settings.host, port=settings.port, log_level="warning", http="httptools", access_log=False
    )


def _said(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


def _refused(request: Request, error: BedplateError) -> Response:
    return _said(request, of_bedplate(error))


def _left(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it
