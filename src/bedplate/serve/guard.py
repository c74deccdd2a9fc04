"""What stands before all routes: who may come in, how long and how much a client may send, and what is said and
logged when a route fails.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import Callable
from typing import Protocol
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bedplate.serve.errors import ApiError, failed
from bedplate.serve.keys import key_in
from bedplate.serve.settings import Settings

_BODIES = 32  # so many of the largest ones may be held at once, with those of requests that wait
_PROBES = ("/health", "/ready", "/metrics")  # gateways ask them without a key, also while it ends
_PAGE = "/page/"  # its files hold no secret: the page itself asks for a key


class Guarded(Protocol):
    """What it asks of a server. draining: it is told to end."""

    @property
    def draining(self) -> bool: ...

    @property
    def settings(self) -> Settings: ...

    def headers(self, scope: Scope) -> dict[str, str]:
        """What each answer to a request has."""
        ...


def cross_origin(settings: Settings) -> list[Middleware]:
    """What stands before it, so that pages of allowed sites may ask, and may read each answer and its headers."""
    if not settings.allow_origins:
        return []
    every = ["*"]
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=settings.allow_origins,
            allow_headers=every,
            allow_methods=every,
            expose_headers=every,
        )
    ]


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, server: Guarded) -> None:
        self._app, self._server = app, server
        self._held = 0  # bytes of all bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said, body = _Said(scope, send, self._server), _Body(receive, self._server.settings, self._hold)
        try:
            self._check(scope)
            await self._app(scope, body.receive, said.send)
        except ApiError as error:
            await said.error(error)
        except asyncio.CancelledError:
            if not self._server.draining:
                raise
            await said.error(_stops())
        except Exception as error:
            await said.error(failed(error))
        finally:
            self._held -= body.count

    def _hold(self, count: int) -> None:
        """ApiError: with so many bytes more, bodies take too much memory."""
        self._held += count
        if self._held > _BODIES * self._server.settings.max_body:
            message, retry = "The bodies of all requests take too much memory.", {"Retry-After": "5"}
            raise ApiError(503, message, kind="server_error", code="overloaded", headers=retry)

    def _check(self, scope: Scope) -> None:
        """ApiError: this request may not come in."""
        headers, path, settings = Headers(scope=scope), scope["path"], self._server.settings
        _check_site(headers, self._server)
        if path in _PROBES:
            return
        if self._server.draining:
            raise _stops()
        if settings.keys is not None and path != "/" and not path.startswith(_PAGE):
            given = key_in(scope["headers"])
            name = None if given is None else settings.keys.name_of(given)
            if name is None:
                raise _no_key(given)
            scope.setdefault("state", {})["key"] = name
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > settings.max_body:
            raise _too_long(settings.max_body)


def is_loopback(host: str) -> bool:
    """Whether it is a name or an address of this machine that no other one reaches."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _check_site(headers: Headers, server: Guarded) -> None:
    """A page of another site must not use a server that its reader's browser reaches."""
    settings, host = server.settings, headers.get("host", "")
    if "*" in settings.allow_origins:
        return
    origin = headers.get("origin")
    if origin is not None and _host_of(origin) != host and origin not in settings.allow_origins:
        raise ApiError(403, "Pages of other sites may not use this server.", code="origin_not_allowed")
    # Whoever owns a name can let it mean this machine: then their page has the same origin.
    if settings.keys is None and is_loopback(settings.host):
        name = _name_of(f"//{host}")
        known = {_name_of(one) for one in settings.allow_origins} - {""}
        if not is_loopback(name) and name not in known:
            raise ApiError(
                403, "This server is not known by the name of the request.", code="host_not_allowed"
            )


def _host_of(url: str) -> str | None:
    """Its host and port. None: this is no URL."""
    try:
        return urlsplit(url).netloc
    except ValueError:
        return None


def _name_of(url: str) -> str:
    """Of its host. Empty: it has none, or is no URL."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


class _Body:
    """What the client sends. ApiError: it is too long, or comes too slowly.

    count: bytes so far.  hold: is told of all.
    """

    def __init__(self, receive: Receive, settings: Settings, hold: Callable[[int], None]) -> None:
        self._receive, self._most, self._hold = receive, settings.max_body, hold
        self._until = asyncio.get_running_loop().time() + settings.client_timeout
        self.count, self._whole = 0, False

    async def receive(self) -> Message:
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            close = {"Connection": "close"}
            raise ApiError(408, "The body of the request came too slowly.", headers=close) from None
        self._whole = not message.get("more_body", False)
        length = len(message.get("body", b""))
        self.count += length
        self._hold(length)
        if self.count > self._most:
            raise _too_long(self._most)
        return message


class _Said:
    """What the client is told."""

    def __init__(self, scope: Scope, send: Send, server: Guarded) -> None:
        self._scope, self._send, self._server, self._begun = scope, send, server, False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begun = True
            told = self._server.headers(self._scope)
            more = [(name.encode(), value.encode()) for name, value in told.items()]
            message = {**message, "headers": [*message.get("headers", ()), *more]}
        await self._send(message)

    async def error(self, error: ApiError) -> None:
        """If something has been said, the answer just breaks off: the client must not take it for a whole one."""
        if self._begun:
            return
        body = json.dumps(error.body_at(self._scope["path"])).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
        encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": error.status, "headers": encoded})
        await self._send({"type": "http.response.body", "body": body})


def _stops() -> ApiError:
    headers = {"Retry-After": "5", "Connection": "close"}
    return ApiError(
        503, "The server is about to stop.", kind="server_error", code="stopping", headers=headers
    )


def _no_key(given: bytes | None) -> ApiError:
    message = (
        "There is no API key: send it as `Authorization: Bearer KEY`." if given is None else "Wrong API key."
    )
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _too_long(most: int) -> ApiError:
    return ApiError(413, f"The body has more than {most} bytes.", code="body_too_large")
