"""The ASGI application, and where its process begins."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from bedplate.errors import BedplateError
from bedplate.serve import messages, models, openai_chat, openai_text, openapi, page, process, responses
from bedplate.serve.catalog import Base, Catalog
from bedplate.serve.errors import ApiError, of_bedplate
from bedplate.serve.guard import Guard
from bedplate.serve.server import Server
from bedplate.serve.settings import Settings

_PARTS = (models, openai_chat, openai_text, responses, messages, page)


def create_app(
    bases: Sequence[Base],
    settings: Settings | None = None,
    catalog: Callable[[Sequence[Base]], Catalog] = Catalog,
) -> Starlette:
    """The ASGI application of some bundles. It closes their engines when it ends. `state.server` is what its routes
    share.
    """
    server = Server(catalog(bases), settings or Settings())

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        yield
        for base in bases:
            await run_in_threadpool(base.engine.close)

    handlers: dict[Any, Callable[[Request, Any], Response]] = {
        ApiError: _said,
        BedplateError: _refused,
        ClientDisconnect: _left,
    }
    routes = [route for part in _PARTS for route in part.routes(server)]
    routes.append(openapi.route(routes))
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=life)
    app.add_middleware(Guard, server=server)
    if allowed := server.settings.allow_origins:
        app.add_middleware(CORSMiddleware, allow_origins=allowed, allow_headers=["*"], allow_methods=["*"])
    app.state.server = server
    return app


def serve(bases: Sequence[Base], settings: Settings) -> None:
    """Serve until the process is told to end: see `process.run`."""
    app = create_app(bases, settings)
    process.run(app, app.state.server)


def _said(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


def _refused(request: Request, error: BedplateError) -> Response:
    return _said(request, of_bedplate(error))


def _left(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it
