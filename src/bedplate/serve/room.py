"""Requests that wait until the engine has memory for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from bedplate.errors import MemoryFullError, RunError
from bedplate.runtime.engine import Engine

_T = TypeVar("_T")
_POLL_SECONDS = 0.1  # memory is free a moment after an answer has ended
_ALONE = 3  # tries, while nothing else runs, after which there is no hope


class Room:
    """Of one engine. Who waits goes in turn, so that no stream of small requests keeps a large one waiting; first
    those that have begun, as they hold memory that others wait for.

    seconds: that one waits at most.
    """

    def __init__(self, engine: Engine, seconds: float = 30.0) -> None:
        self.seconds = seconds
        self._engine = engine
        self._line: list[object] = []
        self._changed = asyncio.Event()

    async def enter(self, begin: Callable[[], Awaitable[_T]], *, holding: bool) -> _T:
        """begin(), as soon as it finds memory. holding: whether others may wait for what this request holds.

        MemoryFullError: others took all of it for too long.  RunError: there is not enough for this one alone.
        """
        if not self._line or holding:
            try:
                return await begin()
            except MemoryFullError:
                pass
        me, until, alone = object(), time.monotonic() + self.seconds, 0
        self._line.insert(0 if holding else len(self._line), me)
        try:
            while True:
                await self._wait()
                if self._line[0] is not me and time.monotonic() < until:
                    continue
                try:
                    return await begin()
                except MemoryFullError as error:
                    alone = 0 if self._engine.running else alone + 1
                    if time.monotonic() > until and not alone:
                        raise
                    if alone == _ALONE:
                        hint = "shorten it, or start the server with more --memory"
                        message = "the request needs more memory than the server has"
                        raise RunError(message, hint=hint) from error
        finally:
            self._line.remove(me)
            self.left()

    def left(self) -> None:
        """An answer has ended."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(_POLL_SECONDS):
                await self._changed.wait()
        except TimeoutError:
            pass
