"""uvicorn's connection, with bounds on what a client may do to it: it has a time to send a request, and to take what
it is sent, and what is kept of it is bounded. A client that would rather speak another protocol is answered in this
one.
"""

from __future__ import annotations

import asyncio

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from bedplate.serve.settings import Settings

_HEAD = 64 << 10  # bytes of a request before its body
_PIECE = 4096  # bytes that are read at once: where a request begins among them, all are counted as its own


class Connection(HttpToolsProtocol):
    """settings: of the server."""

    settings: Settings

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._received = self._reading = 0
        self._in_head = True
        self._timer: asyncio.TimerHandle | None = None
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        at = 0
        while at < len(data) and not self.transport.is_closing():
            # Frames around the pieces of a body count too, and what comes after a refusal.
            left = _HEAD - self._received + (0 if self._in_head else 2 * self.settings.max_body)
            if left <= 0:
                self.transport.abort()
                return
            piece = data[at : at + min(_PIECE, left)]
            self._reading = len(piece)
            self._received += self._reading
            at += self._reading
            self._read(piece)

    def _read(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            rest = data[upgrade.args[0] :]
            plain = self._without_upgrade()
            self.parser = httptools.HttpRequestParser(self)  # the other one ends where its protocol does
            self._read(plain + rest)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def _without_upgrade(self) -> bytes:
        """The head of the request, as a client sends it that knows this protocol alone."""
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b" % (name, value) for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def on_message_begin(self) -> None:
        self._received, self._in_head = self._reading, True
        self._start_timer()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # what follows a body is not to change what was asked
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._is_read_again:
            return
        self._in_head = False
        if not self.flow.write_paused:
            self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self._is_read_again:
            super().on_message_complete()

    @property
    def _is_read_again(self) -> bool:
        """Whether the request asks for another protocol, of which the parser takes its body. CONNECT is refused."""
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

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
