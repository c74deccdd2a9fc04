"""The ASGI application, and where its process begins."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from bedplate.errors import BedplateError
from bedplate.serve import (
    live_api,
    messages,
    models,
    openai_chat,
    openai_text,
    openapi,
    page,
    probes,
    process,
    responses,
)
from bedplate.serve.catalog import Base, Catalog
from bedplate.serve.counted import Counted
from bedplate.serve.errors import ApiError, of_bedplate
from bedplate.serve.guard import Guard, cross_origin
from bedplate.serve.limits import Places
from bedplate.serve.metrics import Metrics
from bedplate.serve.server import Server
from bedplate.serve.settings import Settings

_PARTS = (models, live_api, openai_chat, openai_text, responses, messages, probes, page)


def create_app(
    bases: Sequence[Base],
    settings: Settings | None = None,
    catalog: Callable[[Sequence[Base]], Catalog] = Catalog,
) -> Starlette:
    """The ASGI application of some bundles. It closes their engines when it ends. `state.server` is what its routes
    share.
    """
    settings = settings or Settings()
    places = Places(settings)
    metrics = Metrics(bases, places)
    watched = [replace(base, watch=metrics) for base in bases]
    server = Server(catalog(watched), settings, places, metrics)

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        server.live.start()
        loading = asyncio.create_task(server.load())
        yield
        loading.cancel()
        await run_in_threadpool(server.live.close)
        for base in bases:
            await run_in_threadpool(base.engine.close)

    handlers: dict[Any, Callable[[Request, Any], Response]] = {
        ApiError: _said,
        BedplateError: _refused,
        ClientDisconnect: _left,
        HTTPException: _no_route,
    }
    routes = [route for part in _PARTS for route in part.routes(server)]
    routes.append(openapi.route(routes))
    app = Starlette(
        routes=routes,
        exception_handlers=handlers,
        lifespan=life,
        middleware=[
            Middleware(Counted, metrics, routes),
            *cross_origin(server.settings),
            Middleware(Guard, server),
        ],
    )
    app.state.server = server
    return app


def serve(bases: Sequence[Base], settings: Settings) -> None:
    """Serve until the process is told to end: see `process.run`."""
    app = create_app(bases, settings)
    process.run(app, app.state.server)


def _said(request: Request, error: ApiError) -> Response:
    body = error.body_at(request.scope["path"])
    return JSONResponse(body, status_code=error.status, headers=error.headers)


def _refused(request: Request, error: BedplateError) -> Response:
    return _said(request, of_bedplate(error))


def _no_route(request: Request, error: HTTPException) -> Response:
    """There is no such path, or it has no such method."""
    return _said(request, ApiError(error.status_code, f"{error.detail}.", headers=error.headers))


def _left(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it
