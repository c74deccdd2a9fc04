"""The page at `/`, and the state that it draws.

Its files are read once, when the server starts. They ask no other origin, and the browser is told to allow none.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bedplate.runtime.activity import Running, resident_bytes
from bedplate.serve.api import get
from bedplate.serve.catalog import Base
from bedplate.serve.described import Said
from bedplate.serve.errors import ApiError
from bedplate.serve.server import Server

FILES = Path(__file__).with_name("page_files")
_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".json": "application/json",
    ".LICENSE": "text/plain",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "Cache-Control": "no-cache",
    # No script or style stands within the HTML, and text never becomes HTML.
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Memory(Said):
    """Bytes of what is loaded. adapters: by name.  kv: of conversations.  cache: that only the cache holds."""

    foundation: int
    adapters: dict[str, int]
    kv: int
    cache: int


class BaseState(Said):
    """Of one bundle. rows: tokens that its steps have computed so far."""

    name: str
    memory: Memory
    steps: int
    rows: int
    running: list[Running]


class State(Said):
    """process: bytes of it in RAM.  waiting: requests without a place."""

    process: int
    waiting: int
    bases: list[BaseState]


class _File(NamedTuple):
    content: bytes
    media_type: str
    tag: str


def routes(server: Server) -> list[Route]:
    files = {str(path.relative_to(FILES)): _read(path) for path in FILES.rglob("*") if path.is_file()}

    async def page(request: Request) -> Response:
        return _sent(request, files["index.html"])

    async def file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in files:
            raise ApiError(404, "The page has no such file.", code="not_found")
        return _sent(request, files[name])

    async def state(request: Request) -> Response:
        found = State(
            process=resident_bytes(),
            waiting=len(server.places.waiting),
            bases=[_state(base) for base in server.catalog.bases],
        )
        return JSONResponse(found.model_dump(), headers={"Cache-Control": "no-store"})

    return [
        Route("/", page),
        Route("/page/{name:path}", file),
        get("/v1/bedplate/state", state, "What is in memory, and which answers are computed", said=State),
    ]


def _read(path: Path) -> _File:
    content = path.read_bytes()
    return _File(content, _TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def _sent(request: Request, file: _File) -> Response:
    headers = {**_HEADERS, "ETag": file.tag}
    if request.headers.get("if-none-match") == file.tag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


def _state(base: Base) -> BaseState:
    memory, activity = base.engine.memory(), base.engine.activity()
    return BaseState(
        name=base.name,
        memory=Memory(
            foundation=memory.foundation, adapters=memory.adapters, kv=memory.kv, cache=memory.cache
        ),
        steps=activity.steps,
        rows=activity.rows,
        running=activity.running,
    )
