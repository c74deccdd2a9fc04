"""What of a bundle is in memory: the foundation once, adapters beside it, and how much all may take."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bedplate import _native
from bedplate.bundle.store import AdapterEntry, Bundle
from bedplate.errors import BedplateError, BundleError, MemoryFullError, NotFoundError
from bedplate.runtime import arguments
from bedplate.runtime.loading import load_adapter, load_foundation
from bedplate.runtime.prefix_cache import PrefixCache
from bedplate.runtime.process import Process
from bedplate.runtime.sums import Sums
from bedplate.runtime.tokenizer import Tokenizer
from bedplate.runtime.weights import Precision, Weights
from bedplate.spec import ModelSpec

if TYPE_CHECKING:
    from bedplate.runtime.template_guard import Templates

# What tells a file from any that stood, or will stand, under its name. None: there is none.
_State = tuple[int, int, int, int] | None


class Form(NamedTuple):
    """How weights are loaded. memory_bytes: for adapters, keys and values. None: no limit."""

    threads: int
    max_context: int
    precision: Precision
    cache_bytes: int
    memory_bytes: int | None


@dataclass(kw_only=True)
class _Adapter:
    """What is loaded of an adapter. It is known by its entry, and by the state of the file of its weights.

    reading: held while its files are read. Who has it may take the lock of all, and never the other way round.
    """

    entry: AdapterEntry
    state: _State
    weights: Weights | None = None
    tokenizer: Tokenizer | None = None
    reading: threading.RLock = field(default_factory=threading.RLock)


class Loaded:
    """You can call it from any thread of the process that made it. Everything is loaded when it is first used. Who
    wants what is loaded does not wait while an adapter is read.

    in_use: names of the adapters that sessions use, which stay.  templates: render chat templates, if this process
    does not.
    """

    def __init__(
        self,
        bundle: Bundle,
        spec: ModelSpec,
        form: Form,
        in_use: Callable[[], Collection[str]],
        templates: Templates | None = None,
    ) -> None:
        self.bundle, self._spec, self._form, self._in_use = bundle, spec, form, in_use
        self.tokenizer = Tokenizer.of_bundle(bundle, templates)
        self.process = Process()
        self.meter = _native.Meter()  # of keys and values
        self.base: Weights | None = None
        self._foundation = bundle.foundation_sha256
        self._adapters: dict[str, _Adapter] = {}  # least recently used first
        # Also those that only generations use.
        self._alive: weakref.WeakSet[_native.Adapter] = weakref.WeakSet()
        self._coming = 0  # bytes of adapters that are being read
        self._sums = Sums()
        self._own_lock = threading.RLock()
        self._room = threading.RLock()  # while memory is counted and taken, never while something loads

    @property
    def _lock(self) -> threading.RLock:
        self.process.check()  # before anything waits for a lock that nobody may give up
        return self._own_lock

    @property
    def adapters(self) -> dict[str, int]:
        """How many bytes each loaded adapter has. It waits for nothing."""
        there = self._adapters.copy()
        return {name: one.weights.nbytes for name, one in there.items() if one.weights is not None}

    def check(self, name: str | None) -> None:
        """NotFoundError: the bundle has no adapter of this name (None is the base). RunError: the name is not text."""
        _check_name(name)
        if name is None or name in self.bundle.adapters:
            return
        with suppress(BedplateError):  # which another process may have added
            self.bundle.refresh()
        if name not in self.bundle.adapters:
            raise self._unknown(name)

    def _unknown(self, name: str) -> NotFoundError:
        known = ", ".join(sorted(self.bundle.adapters)) or "none"
        return NotFoundError(f"no adapter {name!r}", where=self.bundle.path, hint=f"the bundle has: {known}")

    def tokenizer_of(self, name: str | None) -> Tokenizer:
        """The tokenizer of the base (None) or of an adapter, which can have further tokens and its own chat template.

        NotFoundError: there is no such adapter.  RunError: its chat template cannot be read.
        """
        self.check(name)
        if name is None:
            return self.tokenizer
        with self._lock:
            adapter = self._adapter(name)
        if adapter.tokenizer is not None:
            return adapter.tokenizer
        with adapter.reading:
            if adapter.tokenizer is None:
                try:
                    adapter.tokenizer = self.tokenizer.of_adapter(self.bundle, name)
                except KeyError:  # it has gone just now
                    raise self._unknown(name) from None
            return adapter.tokenizer

    def load_for_text(self, adapters: Mapping[str, float]) -> tuple[Weights, Tokenizer]:
        """Weights and tokenizer of the same adapters, also where another takes the name of one meanwhile."""
        # Of several, each has the base's tokenizer.
        name = next(iter(adapters)) if len(adapters) == 1 else None
        while True:
            weights = self.load_all(adapters, meanwhile=self.tokenizer.open)
            tokenizer = self.tokenizer_of(name)
            tokenizer.open()
            if name is None:
                return weights, tokenizer
            with self._lock:
                now = self._adapter(name).weights
            if now is not None and now.adapter is weights.adapter:
                return weights, tokenizer

    def load(self, name: str | None) -> Weights:
        """The weights of the base (None) or of an adapter, see `Engine.load`."""
        return self._load(name, meanwhile=None)

    def load_all(self, adapters: Mapping[str, float], meanwhile: Callable[[], None] | None = None) -> Weights:
        """What adapters come to, each with its scale. UnsupportedError: they cannot be used so."""
        if len(adapters) < 2:
            name, scale = next(iter(adapters.items()), (None, 1.0))
            return self._load(name, meanwhile).scaled(scale)
        parts = {
            name: (self._load(name, meanwhile, beside=adapters), scale) for name, scale in adapters.items()
        }
        base = self._load(None, None)
        with self._lock:
            return self._sums.of(base, parts)

    def _load(
        self, name: str | None, meanwhile: Callable[[], None] | None, beside: Collection[str] = ()
    ) -> Weights:
        """meanwhile: what else to do while the base is read, if it is not there yet.  beside: adapters that are not
        dropped for this one.
        """
        self.check(name)
        base = self._load_base(meanwhile)
        return base if name is None else self._load_adapter(base, name, beside)

    def _load_base(self, meanwhile: Callable[[], None] | None) -> Weights:
        with self._lock:
            if self.base is None:
                self._check_foundation()
                self.base = load_foundation(
                    self.bundle,
                    self._spec,
                    threads=self._form.threads,
                    max_context=self._form.max_context,
                    precision=self._form.precision,
                    meter=self.meter,
                    cache_bytes=self._form.cache_bytes,
                    meanwhile=meanwhile,
                )
            return self.base

    def trial(self, drafts: Bundle, name: str) -> tuple[Weights, Weights]:
        """The base, and an adapter of a bundle that has the same foundation. It is in no list, and goes when nobody
        holds it. Its tokenizer and chat template are read, too.

        BundleError: its files are damaged.  RunError: its chat template or its tokenizer cannot be read.
        """
        base = self._load_base(None)
        tokenizer = self.tokenizer.of_adapter(drafts, name)
        tokenizer.check()
        return base, load_adapter(base, drafts, name, self._spec)

    def _load_adapter(self, base: Weights, name: str, beside: Collection[str]) -> Weights:
        with self._lock:
            adapter = self._adapter(name)
        if (weights := adapter.weights) is not None:
            return weights
        with adapter.reading:
            if (weights := adapter.weights) is not None:
                return weights  # another thread has just read it
            with self._lock:
                self._check_foundation()
            with self._coming_bytes(0 if adapter.state is None else adapter.state[2], beside):
                weights = self._read_adapter(base, name)
            assert weights.adapter is not None
            with self._lock, self._room:
                self._make_room(weights.nbytes, beside)
                self._alive.add(weights.adapter)
                # If it was unloaded meanwhile, only its caller has it.
                if self._adapters.get(name) is adapter and self.base is base:
                    adapter.weights = weights
            return weights

    @contextmanager
    def _coming_bytes(self, nbytes: int, beside: Collection[str]) -> Iterator[None]:
        """Memory is kept for an adapter while it is read: its file says about how much it will take."""
        with self._lock, self._room:
            self._make_room(nbytes, beside)
            self._coming += nbytes
        try:
            yield
        finally:
            with self._room:
                self._coming -= nbytes

    def _read_adapter(self, base: Weights, name: str) -> Weights:
        before = self.bundle.adapters.get(name)
        try:
            return load_adapter(base, self.bundle, name, self._spec)
        except (BundleError, NotFoundError, FileNotFoundError, KeyError) as error:
            self.bundle.refresh()
            now = self.bundle.adapters.get(name)
            if now is None:
                raise self._unknown(name) from error
            if now == before:
                raise
        return load_adapter(base, self.bundle, name, self._spec)  # another process has replaced it

    def _adapter(self, name: str) -> _Adapter:
        """What is loaded of an adapter: nothing, if the file behind its name has changed since then.

        NotFoundError: it is gone.
        """
        there, entry = self._adapters.get(name), self.bundle.adapters.get(name)
        if there is not None and there.entry == entry and there.state == _state(there.entry.weights):
            self._adapters[name] = self._adapters.pop(name)
            return there
        if there is not None or entry is None:
            self.unload(name)
            self.bundle.refresh()
            entry = self.bundle.adapters.get(name)
        if entry is None:
            raise self._unknown(name)
        self._adapters[name] = _Adapter(entry=entry, state=_state(entry.weights))
        return self._adapters[name]

    def reserve(self, parts: Sequence[tuple[_native.Kv, int, int]]) -> None:
        """Take memory for positions [begin, end) of keys and values. MemoryFullError: there is none."""
        if self._form.memory_bytes is None or not any(kv.growth(begin, end) for kv, begin, end in parts):
            return
        while not self._take(parts):
            with self._lock:  # of adapters, which may have to go
                self._make_room(sum(kv.growth(begin, end) for kv, begin, end in parts))

    def _take(self, parts: Sequence[tuple[_native.Kv, int, int]]) -> bool:
        """Take memory for positions, if there is room without dropping anything."""
        with self._room:
            growth = sum(kv.growth(begin, end) for kv, begin, end in parts)
            if self._form.memory_bytes is not None and self._taken() + growth > self._form.memory_bytes:
                return False
            for kv, begin, end in parts:
                kv.reserve(begin, end)
            return True

    def _make_room(self, nbytes: int, kept: Collection[str] = ()) -> None:
        """Drop what is needed least, if there is no room. The caller holds the lock. MemoryFullError: not enough is
        left.

        kept: adapters that stay, beside those that sessions use.
        """
        if self._form.memory_bytes is None:
            return
        cache = PrefixCache(0) if self.base is None else self.base.cache
        used = {*kept, *self._in_use()}
        idle = {
            name: one.weights.nbytes
            for name, one in self._adapters.items()
            if one.weights is not None and name not in used
        }
        over = self._taken() + nbytes - self._form.memory_bytes
        if over > cache.own_nbytes + sum(idle.values()):
            raise self._full(nbytes)
        if over > 0:
            over -= cache.evict(over)
        for name, size in idle.items():
            if over > 0:
                self.unload(name)
                over -= size

    def _full(self, nbytes: int) -> MemoryFullError:
        return MemoryFullError(
            f"the engine's memory is full: {nbytes:,} bytes more than the {self._taken():,} that are in use would "
            f"be more than memory_bytes, {self._form.memory_bytes:,}",
            hint="reset sessions that you no longer need, or give the engine more memory_bytes",
        )

    def _taken(self) -> int:
        return self.meter.nbytes + self._coming + sum(adapter.nbytes for adapter in self._alive)

    def _check_foundation(self) -> None:
        if self.bundle.foundation_sha256 != self._foundation:
            hint = "open the bundle again, and make a new engine with it"
            raise BundleError(
                "the bundle was replaced after the engine was made", where=self.bundle.path, hint=hint
            )

    def unload(self, name: str | None = None) -> None:
        """Unload weights, if they are loaded. If the base is unloaded (None), so are all adapters. The memory is free
        when the generations that use it have ended.
        """
        _check_name(name)  # the adapter itself may have been removed
        with self._lock:
            if name is None:
                self._adapters.clear()
                self.base = None
            else:
                self._adapters.pop(name, None)


def _state(file: Path) -> _State:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _check_name(name: str | None) -> None:
    if name is not None:
        arguments.instance("the adapter's name", name, str, "give text, or None for the base")
