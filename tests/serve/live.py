"""A live server in a thread of the tests, on a free port."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import uvicorn

import bedplate
from bedplate.bundle.overlay import Overlay
from bedplate.serve.app import create_app
from bedplate.serve.catalog import Base
from bedplate.serve.settings import Settings


@contextmanager
def serving(
    bundles: Mapping[str, bedplate.Bundle], settings: Settings | None = None, **engine: Any
) -> Iterator[str]:
    """Serve bundles by the names of their bases. Gives the address."""
    bases = [
        Base(name, bedplate.Engine(Overlay.open(bundle.path, check=False), **{"threads": 1, **engine}))
        for name, bundle in bundles.items()
    ]
    app = create_app(bases, settings or Settings())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", http="httptools"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            thread.join(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
