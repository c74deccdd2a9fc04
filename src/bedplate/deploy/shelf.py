"""Adapters that come and go beside those of a bundle: each version of one is an adapter of the bundle.

A name means its newest version. Requests keep the versions that they began with, and a version is dropped when it is
no longer meant and the last request that holds it has ended.
"""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import bedplate
from bedplate.bundle import manifest
from bedplate.bundle.entries import AdapterFacts
from bedplate.bundle.manifest import ADAPTER_INFO, AdapterInfo, AdapterRecord
from bedplate.deploy.adapter_store import Found


@dataclass(eq=False)
class _Version:
    """local: its name in the bundle.  stamp: of the files that it came from.  holds: of requests.  meant: by its
    name.
    """

    local: str
    stamp: str
    holds: int = 0
    meant: bool = True


class Shelf:
    """The adapters of one engine, whose bundle nobody else writes. You can call it from any thread.

    own: those that the bundle has from the start. No other can have their names.
    """

    def __init__(self, bundle: bedplate.Bundle, engine: bedplate.Engine) -> None:
        self.own = frozenset(bundle.adapters)
        self._bundle, self._engine = bundle, engine
        self._versions: dict[str, _Version] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """Of the adapters that were put here."""
        return list(self._versions)

    def stamp(self, name: str) -> str | None:
        """Of the version that the name means. None: there is none."""
        version = self._versions.get(name)
        return None if version is None else version.stamp

    def put(self, found: Found, folder: Path) -> None:
        """Pack an adapter, if it is not, and have its name mean it. After an error, the name means what it did.

        folder: has its files. Raises what `Bundle.add` raises.
        """
        name = found.name
        assert name not in self.own
        local = next(local for at in self._numbers if (local := f"{name}.{at}") not in self.own)
        if found.record is None:
            # Its effect is not measured: that would load the foundation once more.
            self._bundle.add(folder, name=local, programs=False, allow_noop=True)
        else:
            self._bundle.add_adapters({local: partial(_copy, found.record, folder, local)})
        with self._lock:
            before = self._versions.get(name)
            self._versions[name] = _Version(local, found.stamp)
        self._no_longer_meant(before)

    def drop(self, name: str) -> None:
        """The name means nothing any more, or the bundle's own adapter is unloaded. The memory is free when no request
        holds it.
        """
        with self._lock:
            before = self._versions.pop(name, None)
        if name in self.own:
            self._engine.unload(name)
        self._no_longer_meant(before)

    @contextmanager
    def hold(self, name: str) -> Iterator[str | None]:
        """What a name means now, as a name in the bundle, which can be used while the block runs. None: nothing."""
        with self._lock:
            version = self._versions.get(name)
            if version is not None:
                version.holds += 1
        if version is None:
            yield name if name in self.own else None
            return
        try:
            yield version.local
        finally:
            self._release(version)

    def _no_longer_meant(self, version: _Version | None) -> None:
        if version is not None:
            with self._lock:
                version.meant = False
                gone = version.holds == 0
            if gone:
                self._remove(version)

    def _release(self, version: _Version) -> None:
        with self._lock:
            version.holds -= 1
            gone = not version.meant and version.holds == 0
        if gone:
            self._remove(version)

    def _remove(self, version: _Version) -> None:
        self._bundle.remove_adapter(version.local)
        self._engine.unload(version.local)


def _copy(record: AdapterRecord, folder: Path, name: str, out: Path) -> AdapterFacts:
    """Write an adapter that is packed, under another name."""
    where = folder / ADAPTER_INFO
    info = manifest.load(AdapterInfo, where.read_bytes(), str(where))
    for file in record.files.keys() - {ADAPTER_INFO}:
        shutil.copyfile(folder / file, out / file)
    return AdapterFacts(info=replace(info, name=name), special_tokens=record.special_tokens)
