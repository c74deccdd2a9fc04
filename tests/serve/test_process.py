"""How a server listens."""

from __future__ import annotations

import socket
from contextlib import ExitStack

from bedplate.serve.process import listen
from bedplate.serve.settings import Settings


def test_what_is_short_is_sent_at_once() -> None:
    """asyncio turns Nagle's algorithm off only for sockets that name their protocol. With it, each answer on a
    connection that is kept open would come 40 ms later.
    """
    with ExitStack() as stack:
        (server,) = listen(Settings(port=0))
        stack.callback(server.close)
        server.listen()
        stack.enter_context(socket.create_connection(server.getsockname()))
        accepted, _ = server.accept()
        stack.callback(accepted.close)
        assert accepted.proto == socket.IPPROTO_TCP
