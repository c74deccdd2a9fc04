"""A replica: the foundation, some adapters, and the application of `bedplate serve`."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path

from ray import serve
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

import bedplate
from bedplate.bundle import files
from bedplate.bundle.overlay import Overlay
from bedplate.deploy.adapter_store import AdapterStore, Found
from bedplate.deploy.catalog import StoreCatalog
from bedplate.deploy.listing import Listing
from bedplate.deploy.node_bundle import cache_folder, local_bundle, name_of
from bedplate.deploy.ray.forwarded import ADAPTERS, REPLICA, Call, Head, answered
from bedplate.deploy.ray.options import RayOptions
from bedplate.deploy.shelf import Shelf
from bedplate.errors import AdapterError, BedplateError, BundleError, CheckpointError, UnsupportedError
from bedplate.serve.app import create_app
from bedplate.serve.catalog import Base
from bedplate.serve.errors import ApiError, of_bedplate


class Replica:
    """The deployment. Its adapters are Ray's multiplexed models, so that Ray knows which replica has which."""

    async def __init__(self, options: RayOptions) -> None:  # type: ignore[misc]  # Ray awaits it
        self._options = options
        self._held = AsyncExitStack()
        bundle, folder = await run_in_threadpool(self._open)
        engine = bedplate.Engine(bundle, **options.engine())
        await run_in_threadpool(engine.load)
        self._shelf, self._folder = Shelf(bundle, engine, folder), folder
        self._held.callback(self._shelf.close)
        self._store = None
        if options.adapters is not None:
            foundation = bundle.foundation_sha256
            self._store = await run_in_threadpool(AdapterStore, options.adapters, foundation, options.storage)
        self._listing = Listing(
            self._store, self._shelf.own, every=options.refresh_seconds, stale=options.stale_seconds
        )
        await self._listing.look()
        base = Base(options.name or name_of(options.bundle), engine)
        self._app = create_app([base], options.server(), self._catalog)
        self._app.user_middleware.append(Middleware(_WithAdapters, self))  # after those that check keys
        await self._held.enter_async_context(self._app.router.lifespan_context(self._app))
        following = asyncio.create_task(self._listing.follow(self._drop_removed))
        self._held.callback(following.cancel)
        self._locks: dict[str, asyncio.Lock] = {}
        self._broken: dict[str, tuple[str, BedplateError]] = {}  # stamp and error

        async def load(name: str) -> _Resident:
            await self._put(name)
            return _Resident(self._shelf, name)

        self._load = serve.multiplexed(max_num_models_per_replica=options.adapters_per_replica)(load)

    def _open(self) -> tuple[Overlay, Path]:
        """The bundle, and a folder for what this replica writes, of which a killed one leaves nothing for long."""
        options, cache = self._options, cache_folder(self._options.cache)
        bundle = Overlay.open(local_bundle(options.bundle, cache, options.storage), check=False)
        if options.adapters == options.bundle:  # it follows what is added there
            for name in bundle.adapters:
                bundle.detach(name)
        return bundle, self._held.enter_context(files.workspace(cache, "replica"))

    def _catalog(self, bases: Sequence[Base]) -> StoreCatalog:
        own = sorted(self._shelf.own)
        folder = None if self._store is None else self._store.folder
        return StoreCatalog(bases[0], own, self._listing, url=self._options.bundle, folder=folder)

    async def __del__(self) -> None:
        await self._held.aclose()

    async def respond(self, call: Call) -> AsyncGenerator[Head | bytes]:
        """The answer to a request: its head, with who answers, and then its body as it comes."""
        own = (REPLICA, serve.get_replica_context().replica_id.unique_id.encode())
        async with aclosing(answered(self._app, call)) as answer:
            async for part in answer:
                yield Head(part.status, [*part.headers, own]) if isinstance(part, Head) else part

    async def whole(self, call: Call) -> tuple[Head, bytes]:
        """The answer to a request, at once."""
        head, *body = [part async for part in self.respond(call)]
        assert isinstance(head, Head), "it comes first"
        return head, b"".join(part for part in body if isinstance(part, bytes))

    @asynccontextmanager
    async def holding(self, names: Sequence[str]) -> AsyncIterator[None]:
        """While the block runs, adapters are there, those that exist."""
        async with AsyncExitStack() as held:
            for name in names:
                if name in self._shelf.own or await self._listing.get(name) is not None:
                    held.enter_context(self._shelf.hold(name))
                    resident = await self._load(name)
                    if resident.is_kept:  # Ray may have taken its place for others meanwhile
                        self._shelf.keep(name)  # again, if it has been removed and put back
                    await self._put(name)  # it may have changed since it was loaded
            yield

    async def _put(self, name: str) -> None:
        """Have the adapter of the store in the bundle, in its present version."""
        async with self._locks.setdefault(name, asyncio.Lock()):
            found = await self._listing.get(name)
            if found is None or self._shelf.stamp(name) == found.stamp:
                return
            stamp, error = self._broken.get(name, ("", None))
            if error is not None and stamp == found.stamp:
                raise error
            try:
                self._listing.learn(await run_in_threadpool(self._fetch, name))
                self._broken.pop(name, None)
            except BedplateError as error:
                self._broken[name] = found.stamp, error
                raise

    def _fetch(self, name: str) -> Found:
        assert self._store is not None
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            found = self._store.fetch(name, Path(folder))
            if self._shelf.stamp(name) != found.stamp:
                self._shelf.put(found, Path(folder))
        return found

    def _drop_removed(self) -> None:
        for name in self._shelf.names:
            if name not in self._listing.found:
                self._shelf.drop(name)


class _Resident:
    """An adapter that Ray keeps."""

    def __init__(self, shelf: Shelf, name: str) -> None:
        self._shelf, self._name = shelf, name
        self.is_kept = True

    def __del__(self) -> None:
        """Ray calls it when it no longer keeps the adapter, and Python calls it again."""
        if self.is_kept:
            self.is_kept = False
            self._shelf.drop(self._name)


class _WithAdapters:
    """Middleware: a request runs when its adapters are there, and they stay until it has ended."""

    def __init__(self, app: ASGIApp, replica: Replica) -> None:
        self._app, self._replica = app, replica

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        names: list[str] = scope.get(ADAPTERS, [])
        try:
            async with self._replica.holding(names):
                await self._app(scope, receive, send)
        except (ApiError, BedplateError) as error:  # the application handles its own
            said = _said(error)
            body = said.body_at(scope["path"])
            response = JSONResponse(body, status_code=said.status, headers=said.headers)
            await response(scope, receive, send)


def _said(error: ApiError | BedplateError) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, (AdapterError, BundleError, CheckpointError, UnsupportedError)):
        return ApiError(
            400, f"The adapter cannot be used: {error.what}", param="model", code="broken_adapter"
        )
    return of_bedplate(error)
