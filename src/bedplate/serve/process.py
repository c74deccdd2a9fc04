"""The process that serves: it listens, drains when it is told to end, and says nothing of what was asked."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import uvicorn
from anyio.to_thread import current_default_thread_limiter

from bedplate.errors import RunError
from bedplate.serve.connection import connection
from bedplate.serve.errors import failed
from bedplate.serve.guard import is_loopback
from bedplate.serve.server import Server
from bedplate.serve.settings import Settings

_THREADS = 32  # beside those of answers, which may wait for weights that load
_KEPT = 5  # seconds that a connection is open for a next request
_CONNECTIONS = 1024  # beside those that have a place or wait for one


class Process(uvicorn.Server):
    """Serves an application. server: what its routes share."""

    def __init__(self, app: Any, server: Server) -> None:
        settings = server.settings
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            http=connection(settings),
            ws="none",
            limit_concurrency=_CONNECTIONS + settings.max_running + settings.max_queue,
            timeout_keep_alive=max(1, int(min(_KEPT, settings.client_timeout))),
            timeout_graceful_shutdown=1,  # after the answers have ended, or their time has
            server_header=False,
        )
        super().__init__(config)
        self._server, self._settings = server, settings
        self._drain_until = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        count = _THREADS + self._settings.max_running
        loop.set_default_executor(ThreadPoolExecutor(count, thread_name_prefix="bedplate-serve"))
        current_default_thread_limiter().total_tokens = count  # of Starlette's
        loop.set_exception_handler(_unhandled)
        await super().startup(sockets)
        port = self.servers[0].sockets[0].getsockname()[1]
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        models = [card["id"] for card in self._server.catalog.cards()]
        more = f" and {len(models) - 10} more" if len(models) > 10 else ""
        print(f"serving http://{host}:{port}: {', '.join(models[:10])}{more}", file=sys.stderr, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets running answers end. The second does not."""
        if self._server.draining:
            os._exit(128 + sig)  # whatever threads do
        self._server.draining = True
        self._drain_until = time.monotonic() + self._settings.drain

    async def on_tick(self, counter: int) -> bool:
        if self._server.draining:
            is_over = time.monotonic() >= self._drain_until
            self.should_exit = self.should_exit or is_over or not self.server_state.tasks
        return await super().on_tick(counter)


def run(app: Any, server: Server) -> None:
    """Serve until the process is told to end.

    RunError: the address cannot be listened at, or others reach it and there are no keys.
    """
    sockets = listen(server.settings)
    try:
        Process(app, server).run(sockets)
    finally:
        for one in sockets:
            one.close()


def listen(settings: Settings) -> list[socket.socket]:
    """Sockets that are bound to the server's address. They do not listen yet."""
    try:
        found = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        hint = "give the address of a network interface: 127.0.0.1 for this machine alone, 0.0.0.0 for all"
        raise RunError(f"the host {settings.host!r} is not known", hint=hint) from error
    addresses = {address[0]: family for family, _, _, _, address in found}
    if settings.keys is None and not settings.insecure and not all(map(is_loopback, map(str, addresses))):
        hint = "give --api-key-file FILE, or insist with --insecure: then whoever reaches it can use it"
        raise RunError(f"other machines may reach {settings.host}, and there are no API keys", hint=hint)
    return _bound(addresses, settings)


def _bound(addresses: dict[Any, Any], settings: Settings) -> list[socket.socket]:
    bound: list[socket.socket] = []
    port = settings.port
    try:
        for address, family in addresses.items():
            # Only where the protocol is named does asyncio send at once, and not after 40 ms what is short.
            bound.append(socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP))
            bound[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                bound[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            bound[-1].bind((address, port))
            port = bound[0].getsockname()[1]  # of 0, the system made one
    except OSError as error:
        for one in bound:
            one.close()
        hint = "another process may use it: choose another with --port; 0 takes any free one"
        raise RunError(f"{settings.host}:{port}: {error.strerror}", hint=hint) from error
    return bound


def _unhandled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Of asyncio, where nobody waits for what failed."""
    error = context.get("exception")
    if isinstance(error, BaseException):
        failed(error)
