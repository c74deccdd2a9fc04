"""A bundle with adapters that are not in its folder, and without some that are: for a process that serves it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

from bedplate.bundle.entries import AdapterEntry
from bedplate.bundle.manifest import AdapterRecord, Manifest, is_adapter_name
from bedplate.bundle.store import Bundle
from bedplate.errors import AdapterError, NameTakenError, NotFoundError


class Overlay(Bundle):
    """An open bundle whose `adapters` this process changes for itself alone. Nothing is written into the bundle.

    `manifest` says what is on disk. `refresh` reads it again, and keeps what was attached and hidden. An attached
    adapter comes before one of the same name on disk. You can call it from any thread.
    """

    def __init__(self, path: Path, document: Manifest, adapters: Mapping[str, AdapterEntry]) -> None:
        self._attached: dict[str, AdapterEntry] = {}
        self._hidden: dict[str, AdapterRecord] = {}
        self._on_disk: Mapping[str, AdapterEntry] = {}
        self._lock = threading.Lock()
        super().__init__(path, document, adapters)

    def _show(self, document: Manifest, adapters: Mapping[str, AdapterEntry]) -> None:
        with self._lock:
            self.manifest, self._on_disk = document, adapters
            self._put_together()

    def _put_together(self) -> None:
        # What took the name of a hidden one on disk is another adapter, which nobody has hidden.
        self._hidden = {
            name: record
            for name, record in self._hidden.items()
            if name in self._on_disk and self._on_disk[name].record == record
        }
        shown = {name: entry for name, entry in self._on_disk.items() if name not in self._hidden}
        self.adapters = {**shown, **self._attached}

    @property
    def attached(self) -> Mapping[str, AdapterEntry]:
        """The adapters that are not on disk."""
        return self._attached

    def check_free(self, name: str, *, replace: bool = False, most: int | None = None) -> None:
        """AdapterError: this cannot be the name of an adapter, or there are too many.  NameTakenError: the name is in
        use.
        """
        if not is_adapter_name(name):
            hint = "use letters, digits, '.', '_' and '-', first a letter or digit; 'base' is the model"
            raise AdapterError(f"{name!r} cannot be the name of an adapter", hint=hint)
        if not replace and name in self.adapters:
            hint = "unload it first, or load this one in its place: load_inplace"
            raise NameTakenError(f"the adapter {name!r} has already been loaded", hint=hint)
        if most is not None and len(self._attached.keys() - {name}) >= most:
            raise AdapterError(f"there are {most} adapters, which is the most", hint="unload one first")

    def attach(
        self, name: str, entry: AdapterEntry, *, replace: bool = False, most: int | None = None
    ) -> None:
        """Have an adapter under a name, from now on. Its files must stay as they are.

        replace: in place of the one that has the name.  most: adapters that can be attached.
        AdapterError, NameTakenError: see `check_free`.
        """
        with self._lock:
            self.check_free(name, replace=replace, most=most)
            self._attached = {**self._attached, name: entry}
            self._put_together()

    def detach(self, name: str) -> None:
        """Have no adapter under a name any more. One on disk is hidden, until it is another one, or is added again.

        NotFoundError: there is none.
        """
        with self._lock:
            if name not in self.adapters:
                raise NotFoundError(f"no adapter {name!r}")
            self._attached = {one: entry for one, entry in self._attached.items() if one != name}
            if name in self._on_disk:
                self._hidden[name] = self._on_disk[name].record
            self._put_together()
