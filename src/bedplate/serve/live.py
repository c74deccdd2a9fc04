"""Adapters that are loaded and unloaded while the server runs."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path

from bedplate.bundle import integrity, manifest
from bedplate.bundle.manifest import ADAPTER_INFO, ADAPTER_PROGRAMS, MANIFEST, Manifest
from bedplate.bundle.overlay import Overlay
from bedplate.bundle.store import AdapterEntry, Bundle
from bedplate.errors import AdapterError, BedplateError, NameTakenError
from bedplate.serve.catalog import Base, Catalog, Origin
from bedplate.serve.errors import ApiError, unknown_model
from bedplate.serve.live_sources import Sources, copy_files
from bedplate.serve.packing import Packing
from bedplate.serve.settings import Settings

_POLL_SECONDS = 1.0


class Live:
    """Its methods block: call them in a thread, and `load` from one at a time.

    NotFoundError, RunError: the settings name folders that are not there, or no beginnings of URLs.
    """

    def __init__(self, catalog: Catalog, settings: Settings) -> None:
        self._catalog, self._settings = catalog, settings
        self._closing = threading.Event()
        self._sources = Sources(
            settings.allow_adapters_from,
            most_bytes=settings.max_adapter_bytes,
            seconds=settings.adapter_seconds,
            closing=self._closing,
        )
        self._packing = Packing(settings.adapter_seconds)
        self._one = threading.Lock()  # of who loads
        self._changing = threading.Lock()  # what a name stands for
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._watcher = threading.Thread(target=self._watch, name="bedplate-watch", daemon=True)

    def start(self) -> None:
        """Look at the bundles from time to time, if the settings say so."""
        if self._settings.watch:
            self._watcher.start()

    def close(self) -> None:
        """End what runs beside the server, and remove what it wrote."""
        self._closing.set()
        if self._settings.watch:
            self._watcher.join()
        self._packing.close()
        with self._one:
            if self._folder is not None:
                self._folder.cleanup()

    def load(self, name: str, place: str, *, base_model: str | None, replace: bool) -> None:
        """Have an adapter under a name. Requests that have begun end with what they began with.

        ApiError: why there is none. Everything is then as it was.
        """
        self._sources.check_any()
        base = self._base(base_model)
        with self._one, _said(name):
            overlay = self._overlay(base, name, replace=replace)
            staging = Path(tempfile.mkdtemp(dir=self._staging()))
            try:
                drafts = self._staged(overlay, name, place, staging)
                entry = self._tried(base, drafts)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise
            # Whoever reads its files has the entry.
            weakref.finalize(entry, shutil.rmtree, staging, ignore_errors=True)
            with self._changing:
                overlay.attach(name, entry, replace=replace, most=self._settings.max_adapters)
                base.origins[name] = Origin(root=place, created=int(time.time()))
            base.engine.unload(name)  # what had the name: its memory is free when the last request ends

    def unload(self, name: str, *, base_model: str | None) -> None:
        """Have no adapter under a name any more. Requests that have begun end with it.

        ApiError: there is none, or this server changes no adapters.
        """
        self._sources.check_any()
        having = [
            base
            for base in self._catalog.bases
            if name in base.engine.bundle.adapters and base_model in (None, base.name)
        ]
        if not having:
            known = [one for base in self._catalog.bases for one in base.engine.bundle.adapters]
            raise unknown_model(name, known, param="lora_name")
        if len(having) > 1:
            raise _which_base(having)
        (base,) = having
        with _said(name):
            with self._changing:
                _overlay_of(base).detach(name)
                base.origins.pop(name, None)
            base.engine.unload(name)

    def _base(self, name: str | None) -> Base:
        bases = self._catalog.bases
        found = [base for base in bases if name in (None, base.name)]
        if not found:
            raise unknown_model(str(name), [base.name for base in bases], param="base_model")
        if len(found) > 1:
            raise _which_base(found)
        return found[0]

    def _overlay(self, base: Base, name: str, *, replace: bool) -> Overlay:
        """What an adapter is attached to, if it can be: before anything is read."""
        overlay = _overlay_of(base)
        overlay.check_free(name, replace=replace, most=self._settings.max_adapters)
        for other in self._catalog.bases:
            if name == other.name or (other is not base and name in other.engine.bundle.adapters):
                raise NameTakenError(f"another model is called {name!r}", hint="choose another name")
        return overlay

    def _staging(self) -> str:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="bedplate-serve-", ignore_cleanup_errors=True)
        return self._folder.name

    def _staged(self, overlay: Overlay, name: str, place: str, staging: Path) -> Bundle:
        """A bundle that has this adapter alone, in a folder that is ours."""
        # A download that takes too long is left alone: it may still write there.
        with tempfile.TemporaryDirectory(dir=self._staging(), ignore_cleanup_errors=True) as download:
            source = self._sources.get(place, Path(download))
            if (source / ADAPTER_INFO).is_file():
                return _packed(overlay, source, staging)
            self._packing.pack(overlay.path, source, name, staging)
        drafts = Bundle.open(staging, check=False)
        if drafts.foundation_sha256 != overlay.foundation_sha256:
            raise AdapterError("the bundle was replaced by another one", hint="start the server again")
        return drafts

    def _tried(self, base: Base, drafts: Bundle) -> AdapterEntry:
        ((name, entry),) = drafts.adapters.items()
        if not base.engine.try_adapter(drafts, name):
            raise AdapterError("it changes nothing", hint="was it saved before it was trained?")
        return entry

    def _watch(self) -> None:
        seen = {base: _state(base) for base in self._catalog.bases}
        while not self._closing.wait(_POLL_SECONDS):
            for base, before in seen.items():
                now = _state(base)
                if now != before:
                    seen[base] = now
                    # What cannot be read now, as while a bundle is replaced, is read when it changes again.
                    with suppress(BedplateError, OSError):
                        _refresh(base)


_UNREADABLE = (PermissionError, IsADirectoryError, NotADirectoryError, shutil.SpecialFileError)


class _said:  # noqa: N801
    """What is wrong with an adapter is said to whoever asked for it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, BedplateError):
            param = "lora_name" if isinstance(error, NameTakenError) else "lora_path"
            hint = "" if error.hint is None else f" (hint: {error.hint})"
            raise ApiError(400, f"LoRA adapter {self._name!r}: {error.what}{hint}", param=param) from error
        if isinstance(error, _UNREADABLE):
            what = f"LoRA adapter {self._name!r}: a file of it cannot be read: {type(error).__name__}"
            raise ApiError(400, what, param="lora_path") from error


def _packed(overlay: Overlay, source: Path, staging: Path) -> Bundle:
    """A bundle that has an adapter of another bundle, of the same foundation, alone."""
    file, name = source.parent.parent / MANIFEST, source.name
    record = None
    with suppress(OSError):
        record = manifest.load(Manifest, file.read_bytes(), MANIFEST).adapters.get(name)
    if record is None:
        hint = "give its folder in a bundle, or the folder that it was packed from"
        raise AdapterError("the adapter is packed, and in no bundle that lists it", hint=hint)
    if record.foundation != overlay.foundation_sha256:
        hint = "give the folder that it was packed from"
        raise AdapterError("the adapter is packed for another foundation", hint=hint)
    needed = {one: info for one, info in record.files.items() if one not in ADAPTER_PROGRAMS.values()}
    folder = staging / name
    folder.mkdir()
    with suppress(FileNotFoundError, *_UNREADABLE):  # which the check tells of
        copy_files(source, needed, folder)
    integrity.check_files(folder, needed, hashes=True)
    record = dataclasses.replace(record, files=needed)
    entry = AdapterEntry.of(name, folder, overlay.foundation_sha256, record)
    document = dataclasses.replace(overlay.manifest, adapters={name: record})
    return Bundle(overlay.path, document, {name: entry})


def _refresh(base: Base) -> None:
    """Have the adapters that are on disk now. What had gone needs no memory."""
    bundle = base.engine.bundle
    before = bundle.adapters
    bundle.refresh()
    for name, entry in before.items():
        if bundle.adapters.get(name) != entry:
            base.engine.unload(name)


def _overlay_of(base: Base) -> Overlay:
    bundle = base.engine.bundle
    assert isinstance(bundle, Overlay), "a bundle that is served is opened so"
    return bundle


def _state(base: Base) -> tuple[int, int, int] | None:
    try:
        found = (base.engine.bundle.path / MANIFEST).stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _which_base(bases: list[Base]) -> ApiError:
    names = ", ".join(base.name for base in bases)
    return ApiError(400, f"Say which base: base_model is one of {names}.", param="base_model")
