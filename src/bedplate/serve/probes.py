"""`/health`, `/ready`, `/metrics`: what orchestrators and gateways ask."""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bedplate.serve.api import TEXT, Api, get
from bedplate.serve.described import Health
from bedplate.serve.server import Server


def routes(server: Server) -> list[Api]:
    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(request: Request) -> Response:
        if server.unready is None:
            return JSONResponse({"status": "ok"})
        return JSONResponse(unavailable(server.unready), status_code=503)

    async def metrics(request: Request) -> Response:
        text, kind = await run_in_threadpool(server.metrics.text, request.headers.get("accept", ""))
        return Response(text, media_type=kind)

    return [
        get("/health", health, "Whether the process answers", said=Health, is_open=True),
        get(
            "/ready", ready, "Whether requests are answered at once", said=Health, errors={503}, is_open=True
        ),
        get("/metrics", metrics, "Metrics, as Prometheus reads them", media=(TEXT,), is_open=True),
    ]


def unavailable(why: str) -> dict[str, object]:
    """As llama.cpp's server says it."""
    return {"error": {"message": why, "type": "unavailable_error", "param": None, "code": 503}}
