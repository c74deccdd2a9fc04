"""Counts responses by route and status."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bedplate.serve.watch import Watch


class Counted:
    """Middleware. What no route answers is counted as `other`: paths that clients make up would be without end."""

    def __init__(self, app: ASGIApp, watch: Watch, routes: Sequence[BaseRoute]) -> None:
        self._app, self._watch = app, watch
        self._paths: dict[Any, str] = {
            one.endpoint: one.path_format for one in routes if isinstance(one, Route)
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        def count(status: int) -> None:
            nonlocal begun
            begun = True
            self._watch.answered(self._paths.get(scope.get("endpoint"), "other"), status)

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                count(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, counting)
        except Exception:
            if not begun:  # what is outside says it
                count(500)
            raise
