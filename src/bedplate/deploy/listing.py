"""What a store of adapters has, looked at again and again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping

from starlette.concurrency import run_in_threadpool

from bedplate.deploy.adapter_store import AdapterStore, Found
from bedplate.serve.errors import ApiError

logger = logging.getLogger("bedplate.deploy")
_AGAIN = 0.5  # seconds: names that nobody knows do not make it look more often


class Listing:
    """The adapters of a store (None: there is none), as they were some seconds ago. One event loop uses it.

    taken: names that mean something else. Adapters that are called so are left out.
    every: seconds between looks.  stale: after so many without a look that succeeded, nothing is known.
    """

    def __init__(
        self, store: AdapterStore | None, taken: Collection[str], *, every: float, stale: float
    ) -> None:
        self._store, self._taken, self._every, self._stale = store, taken, every, stale
        self.found: Mapping[str, Found] = {}
        self._looked = self._tried = -float("inf")
        self._looking: asyncio.Task[None] | None = None

    async def follow(self, changed: Callable[[], object]) -> None:
        """Look again and again. changed: is called after each look."""
        while True:
            await self.look()
            changed()
            await asyncio.sleep(self._every)

    async def get(self, name: str) -> Found | None:
        """An adapter of the store. One that is not known is looked for now. None: the store has none of this name.

        ApiError: the store could not be looked at for long.
        """
        if self._store is None or name in self._taken:
            return None
        came = time.monotonic()
        while name not in self.found and self._tried < came:
            await asyncio.sleep(self._tried + _AGAIN - time.monotonic())
            await self.look()
        if time.monotonic() > self._looked + self._stale:
            message = "The adapters cannot be looked at now."
            raise ApiError(503, message, kind="server_error", headers={"Retry-After": "5"})
        return self.found.get(name)

    def learn(self, one: Found) -> None:
        """One was looked at by itself."""
        self.found = {**self.found, one.name: one}

    async def look(self) -> None:
        """Look now, or wait for a look that has begun. A look that fails is in the log."""
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())
        await asyncio.shield(self._looking)

    async def _look(self) -> None:
        self._tried = begun = time.monotonic()
        try:
            if self._store is not None:
                found = await run_in_threadpool(self._store.list)
                for name in found.keys() & set(self._taken) - self.found.keys():
                    logger.warning("The adapter %s is left out: the bundle has one of this name.", name)
                self.found = {name: one for name, one in found.items() if name not in self._taken}
            self._looked = begun
        except Exception as error:  # of any file system
            logger.warning("The adapters cannot be looked at: %s", error)
        finally:
            self._looking = None
