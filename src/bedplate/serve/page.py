"""The page at `/`, and the state that it draws.

Its files are read once, when the server starts. They ask no other origin, and the browser is told to allow none.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bedplate.runtime.engine import resident_bytes
from bedplate.serve.api import get
from bedplate.serve.catalog import Base
from bedplate.serve.errors import ApiError
from bedplate.serve.server import Server

Json = dict[str, Any]
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
        known = {
            "process": resident_bytes(),
            "waiting": len(server.places.waiting),
            "bases": [_state(base) for base in server.catalog.bases],
        }
        return JSONResponse(known, headers={"Cache-Control": "no-store"})

    return [
        Route("/", page),
        Route("/page/{name:path}", file),
        get("/v1/bedplate/state", state, "What is in memory, and which answers are computed"),
    ]


def _read(path: Path) -> _File:
    content = path.read_bytes()
    return _File(content, _TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def _sent(request: Request, file: _File) -> Response:
    headers = {**_HEADERS, "ETag": file.tag}
    if request.headers.get("if-none-match") == file.tag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


def _state(base: Base) -> Json:
    """memory: bytes, of what is loaded.  rows: tokens that steps have computed."""
    memory, activity = asdict(base.engine.memory()), asdict(base.engine.activity())
    del memory["process"]  # of all bases together
    return {"name": base.name, "memory": memory, **activity}
