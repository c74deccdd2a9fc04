"""A live server in a thread of the tests, on a free port."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import bedplate
from bedplate.bundle.overlay import Overlay
from bedplate.serve.app import create_app
from bedplate.serve.catalog import Base
from bedplate.serve.process import Process, listen
from bedplate.serve.server import Server
from bedplate.serve.settings import Settings


class Live(NamedTuple):
    """A server that runs."""

    address: str
    server: Server
    process: Process

    @property
    def engine(self) -> bedplate.Engine:
        """Of its first bundle."""
        return self.server.catalog.bases[0].engine


@contextmanager
def serving(
    bundles: Mapping[str, bedplate.Bundle], settings: Settings | None = None, **engine: Any
) -> Iterator[str]:
    """Serve bundles by the names of their bases. Gives the address."""
    with running(bundles, settings, **engine) as live:
        yield live.address


@contextmanager
def running(
    bundles: Mapping[str, bedplate.Bundle], settings: Settings | None = None, **engine: Any
) -> Iterator[Live]:
    """As `serving`. Gives all of it."""
    bases = [
        Base(name, bedplate.Engine(Overlay.open(bundle.path, check=False), **{"threads": 1, **engine}))
        for name, bundle in bundles.items()
    ]
    app = create_app(bases, replace(settings or Settings(), port=0))
    sockets = listen(app.state.server.settings)
    server = Process(app, app.state.server)
    thread = threading.Thread(target=server.run, args=(sockets,))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            thread.join(0.01)
        yield Live(f"http://127.0.0.1:{sockets[0].getsockname()[1]}", app.state.server, server)
    finally:
        server.should_exit = True
        thread.join()
