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
ALONE = 3  # tries, while nothing else runs, after which there is no hope


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
        self._begun, self._ended = 0, 0  # answers

    async def enter(
        self,
        begin: Callable[[], Awaitable[_T]],
        *,
        holding: bool,
        again: bool = False,
        seconds: float | None = None,
    ) -> _T:
        """begin(), as soon as it finds memory. holding: whether others may wait for what this request holds.
        again: it had begun, and gave up what it had: so it waits until another one has ended.  seconds: that it waits
        at most, if this is less than for all.

        MemoryFullError: others took all of it for too long.  RunError: there is not enough for this one alone.
        """
        ended = self._ended if again else -1
        if not again and (not self._line or holding):
            try:
                return await self._begin(begin)
            except MemoryFullError:
                pass
        wait = self.seconds if seconds is None else min(self.seconds, seconds)
        me, until, alone = object(), time.monotonic() + wait, 0
        self._line.insert(0 if holding else len(self._line), me)
        try:
            while True:
                await self._wait()
                late = time.monotonic() >= until
                if not late and (self._line[0] is not me or (self._ended == ended and self._engine.running)):
                    continue
                try:
                    return await self._begin(begin)
                except MemoryFullError as error:
                    alone = 0 if self._engine.running else alone + 1
                    if time.monotonic() > until and not alone:
                        raise
                    if alone == ALONE:
                        raise too_large() from error
        finally:
            self._line.remove(me)
            self._wake()

    async def _begin(self, begin: Callable[[], Awaitable[_T]]) -> _T:
        begun = await begin()
        self._begun += 1
        return begun

    def mark(self) -> int | None:
        """Of an answer that has begun, for `was_alone`. None: others run beside it."""
        return self._begun if self._engine.running <= 1 else None

    def was_alone(self, mark: int | None) -> bool:
        """Whether nothing ran beside an answer, which runs no more, since its mark."""
        return mark == self._begun and not self._engine.running

    def left(self) -> None:
        """An answer has ended."""
        self._ended += 1
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(_POLL_SECONDS):
                await self._changed.wait()
        except TimeoutError:
            pass


def too_large() -> RunError:
    """There is not enough memory for a request, even if it has all of it."""
    hint = "shorten it, or start the server with more --memory"
    return RunError("the request needs more memory than the server has", hint=hint)
