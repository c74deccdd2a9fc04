"""Adapters of a store that an engine has now."""

from __future__ import annotations

import shutil
import tempfile
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import bedplate
from bedplate.bundle.entries import AdapterEntry
from bedplate.bundle.overlay import Overlay
from bedplate.bundle.store import Bundle
from bedplate.deploy.adapter_store import Found
from bedplate.errors import AdapterError
from bedplate.serve.packing import Packing

_PACKING_SECONDS = 120.0


class Shelf:
    """An adapter is here while it is kept, or a request holds it. You can call it from any thread.

    own: adapters that the bundle has. No other can have their names.  folder: for files, which nobody else has.
    """

    def __init__(self, bundle: Overlay, engine: bedplate.Engine, folder: Path) -> None:
        self.own = frozenset(bundle.adapters)
        self._bundle, self._engine, self._folder = bundle, engine, folder
        self._packing = Packing(_PACKING_SECONDS)
        self._stamps: dict[str, str] = {}
        self._kept: set[str] = set()
        self._holds: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """Of the adapters that were put here."""
        return list(self._stamps)

    def stamp(self, name: str) -> str | None:
        """Of an adapter that is here. None: it is not."""
        return self._stamps.get(name)

    def put(self, found: Found, folder: Path) -> None:
        """Pack an adapter, if it is not packed, and have it here in place of the one of its name. Requests that run go
        on with what they began with. After an error, all is as it was.

        folder: has its files.
        AdapterError, BundleError, UnsupportedError: it cannot be used, or changes nothing.
        """
        assert found.name not in self.own
        staging = Path(tempfile.mkdtemp(dir=self._folder))
        try:
            entry = self._staged(found, folder, staging)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        weakref.finalize(entry, shutil.rmtree, staging, ignore_errors=True)  # whoever reads its files has it
        with self._lock:
            self._bundle.attach(found.name, entry, replace=True)
            self._stamps[found.name] = found.stamp
        self._engine.unload(found.name)

    def _staged(self, found: Found, folder: Path, staging: Path) -> AdapterEntry:
        name, bundle = found.name, self._bundle
        if found.record is None:
            self._packing.pack(bundle.path, folder, name, staging)
            drafts = Bundle.open(staging, check=False)
        else:
            shutil.copytree(folder, staging / name)
            entry = AdapterEntry.of(name, staging / name, bundle.foundation_sha256, found.record)
            drafts = Bundle(
                bundle.path, replace(bundle.manifest, adapters={name: found.record}), {name: entry}
            )
        if not self._engine.try_adapter(drafts, name):
            raise AdapterError("it changes nothing", hint="was it saved before it was trained?")
        return drafts.adapters[name]

    def keep(self, name: str) -> None:
        """Have it stay, also when no request holds it."""
        with self._lock:
            self._kept.add(name)

    def drop(self, name: str) -> None:
        """Keep it no longer. Its memory is free when no request holds it."""
        with self._lock:
            self._kept.discard(name)
            gone = self._tidy(name)
        if gone:
            self._engine.unload(name)

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """While the block runs, it stays."""
        with self._lock:
            self._holds[name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._holds[name] -= 1
                gone = self._tidy(name)
            if gone:
                self._engine.unload(name)

    def _tidy(self, name: str) -> bool:
        """Whether it is to be unloaded. The caller holds the lock, which nobody has while something loads."""
        if self._holds[name]:
            return False
        del self._holds[name]
        if name in self._kept:
            return False
        if self._stamps.pop(name, None) is not None:
            self._bundle.detach(name)
        return True

    def close(self) -> None:
        """End what runs beside."""
        self._packing.close()
