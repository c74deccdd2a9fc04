"""uvicorn's connection, with bounds on what a client may do to it: it has a time to send a request, and to take what
it is sent, and what is kept of it is bounded.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from bedplate.serve.settings import Settings

_HEAD = 64 << 10  # bytes of a request before its body


class Connection(HttpToolsProtocol):
    """settings: of the server."""

    settings: Settings

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._received = 0
        self._in_head = True
        self._timer: asyncio.TimerHandle | None = None
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        super().data_received(data)
        # Frames around the pieces of a body count too, and what comes after a refusal.
        most = _HEAD if self._in_head else _HEAD + 2 * self.settings.max_body
        if self._received > most:
            self.transport.abort()

    def on_message_begin(self) -> None:
        self._received, self._in_head = 0, True
        self._start_timer()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        if not self.flow.write_paused:
            self._stop_timer()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._start_timer()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._start_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self._in_head:
            self._stop_timer()

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(self.settings.client_timeout, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def connection(settings: Settings) -> type[Connection]:
    """uvicorn makes one for each client."""
    return type("Connection", (Connection,), {"settings": settings})
