"""The ingress: it takes requests, and passes each on to a replica that has its adapter."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, NamedTuple

from prometheus_client import CONTENT_TYPE_LATEST
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bedplate.deploy.node_bundle import name_of
from bedplate.deploy.ray.forwarded import REPLICA, Call, Head, adapters_of
from bedplate.deploy.ray.options import RayOptions
from bedplate.deploy.ray.together import together
from bedplate.serve import stream
from bedplate.serve.errors import ApiError
from bedplate.serve.guard import Guard, cross_origin
from bedplate.serve.settings import Settings

logger = logging.getLogger("bedplate.deploy")
_LOST = (RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError, OutOfMemoryError)
_TRIES = 5
_METRICS_SECONDS = 5.0


_OF_ONE_REPLICA = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")


class Ingress:
    """The deployment that Ray's proxies call. Who may not come in, or sends too much, reaches no replica."""

    def __init__(self, replicas: DeploymentHandle, options: RayOptions) -> None:
        self._replicas, self._base = replicas, options.name or name_of(options.bundle)
        settings = options.server()
        self._app: ASGIApp = Guard(self._answer, _Guarded(settings))
        for one in cross_origin(settings):  # a browser asks without a key
            self._app = one.cls(self._app, *one.args, **one.kwargs)

    async def __call__(self, request: Request) -> Response:
        return _Answer(self._app)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, path = Request(scope, receive), scope["path"]
        if path in _OF_ONE_REPLICA:
            message = "Adapters come from the folder that the server was given: put it there, or remove it."
            raise ApiError(403, message)
        try:
            body = await request.body()
        except ClientDisconnect:
            raise ApiError(499, "The client is gone.") from None  # nobody reads it
        call = Call(
            method=request.method,
            path=path,
            query=scope["query_string"],
            headers=[(bytes(name), bytes(value)) for name, value in scope["headers"]],
            client=scope.get("client"),
            body=body,
            adapters=adapters_of(body, self._base),
        )
        answer = await self._metrics(call) if path == "/metrics" else _Forwarded(self._replicas, call)
        await answer(scope, receive, send)

    async def _metrics(self, call: Call) -> Response:
        """Of all replicas that answer in time, each with a label. All in the form that `together` reads, whatever
        else the scraper takes.
        """
        headers = [(name, value) for name, value in call.headers if name != b"accept"]
        call = call._replace(headers=headers)
        answers = self._replicas.broadcast("whole", call)
        found = await answers.results_async(timeout_s=_METRICS_SECONDS, return_exceptions=True)
        texts = dict[str, str]()
        for answer in found:
            if isinstance(answer, BaseException):
                continue
            head, body = answer
            if head.status != 200:
                return Response(
                    body, head.status, {name.decode(): value.decode() for name, value in head.headers}
                )
            texts[dict(head.headers)[REPLICA].decode()] = body.decode()
        return Response(together(texts), media_type=CONTENT_TYPE_LATEST)


class _Guarded(NamedTuple):
    """What `Guard` asks of a server. Ray itself ends the requests of one that stops."""

    settings: Settings
    draining: bool = False

    def headers(self, scope: Scope) -> dict[str, str]:
        """None: the replica that answers tells the rate, which it counts for itself."""
        return {}


class _Answer(Response):
    """What the guarded application says. If it breaks off, so does this: the guard only stops."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ended = True

        async def say(message: Message) -> None:
            nonlocal ended
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        await self._app(scope, receive, say)
        if not ended:
            raise ConnectionError("the answer is not complete")


class _Forwarded(Response):
    """The answer of a replica. If the replica is lost before it has begun to answer, another one is asked.

    What keeps a stream open while nothing is said is no beginning.
    """

    def __init__(self, replicas: DeploymentHandle, call: Call) -> None:
        super().__init__()
        self._replicas, self._call = replicas, call
        self._head: Head | None = None  # that was sent
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        for left in reversed(range(_TRIES)):
            try:
                await self._pass_on(send)
                return
            except _LOST as error:
                logger.warning("A replica is lost: %s", type(error).__name__)
                lost = ApiError(
                    503, "The replica that answers is lost.", kind="server_error", code="replica_lost"
                )
                if self._begun or left == 0:
                    await self._fail(lost, scope, receive, send)
                    return
            except BackPressureError:
                full = ApiError(
                    429, "Too many requests wait.", kind="rate_limit_error", headers={"Retry-After": "1"}
                )
                await self._fail(full, scope, receive, send)
                return
            except DeploymentUnavailableError:
                await self._fail(
                    ApiError(503, "No replica can run.", kind="server_error"), scope, receive, send
                )
                return

    async def _pass_on(self, send: Send) -> None:
        head: Head | None = None
        async with aclosing(self._parts()) as parts:
            async for part in parts:
                if isinstance(part, Head):
                    head = part
                    continue
                assert head is not None, "it comes first"
                await self._open(head, send)
                self._begun = self._begun or _says_something(part)
                await send({"type": "http.response.body", "body": part, "more_body": True})
        if head is not None:
            await self._open(head, send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _parts(self) -> AsyncGenerator[Head | bytes]:
        adapter = self._call.adapters[0] if self._call.adapters else ""
        handle = self._replicas.options(stream=True, multiplexed_model_id=adapter)
        answer = handle.respond.remote(self._call)
        try:
            async for part in answer:
                yield part
        finally:
            answer.cancel()  # if it has ended, this does nothing

    async def _open(self, head: Head, send: Send) -> None:
        if self._head is None:
            self._head = head
            await send({"type": "http.response.start", "status": head.status, "headers": head.headers})

    async def _fail(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        if self._head is None:
            await _refusal(error, self._call.path)(scope, receive, send)
            return
        is_stream = any(value.startswith(b"text/event-stream") for name, value in self._head.headers)
        if not is_stream:
            raise ConnectionError(error.message)  # the client sees that the answer is not complete
        event = _error_event(self._call.path, error)
        await send({"type": "http.response.body", "body": event.encode(), "more_body": False})


def _says_something(part: bytes) -> bool:
    """Whether it is more than comments."""
    return any(event and not event.startswith(b":") for event in part.split(b"\n\n"))


def _refusal(error: ApiError, path: str) -> Response:
    return JSONResponse(error.body_at(path), status_code=error.status, headers=error.headers)


def _error_event(path: str, error: ApiError) -> str:
    """An error that comes after the status, as the API of a path says it."""
    if path.endswith("/messages"):
        said: dict[str, Any] = {"type": "api_error", "message": error.message}
        return stream.data({"type": "error", "error": said}, "error")
    if path.endswith("/responses"):
        said = {"type": "error", "code": error.code, "message": error.message, "param": None}
        return stream.data(said, "error")
    return stream.data(error.body())
