"""A bundle in one process: the foundation's weights once, each adapter's beside them, and steps of many sessions."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from bedplate import _native
from bedplate.bundle.store import Bundle
from bedplate.errors import BundleError, NotFoundError, RunError
from bedplate.runtime import arguments, session_file
from bedplate.runtime.cores import physical_cores
from bedplate.runtime.held import Held
from bedplate.runtime.model_spec import read_spec
from bedplate.runtime.prefix_cache import PrefixCache
from bedplate.runtime.session import Host, Session
from bedplate.runtime.sums import Sums
from bedplate.runtime.tokenizer import Tokenizer
from bedplate.runtime.weights import PRECISIONS, Limits, Precision, Weights, load_adapter, load_foundation
from bedplate.spec import ModelSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MOST_THREADS = 1024  # no processor has more; of a number out of all reason the system would make what it can
# The longest run of rows that one step takes. Longer prompts go in several; more than this gains no speed.
MAX_ROWS = 256
CACHE_BYTES = 256 << 20
# What tells a file from any that stood, or will stand, under its name. None: there is none.
_State = tuple[int, int, int, int] | None


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Memory in bytes.

    process: resident memory of the process.  foundation: its weights, 0 if they are not loaded.  adapters: by name,
    the weights of each loaded adapter.  kv: keys and values of all sessions, shared ones once.  cache: those that only
    the cache holds.
    """

    process: int
    foundation: int
    adapters: dict[str, int]
    kv: int
    cache: int


@dataclass(kw_only=True)
class _Adapter:
    """What is loaded of an adapter. state: of the file of its weights, by which it is known."""

    state: _State
    weights: Weights | None = None
    tokenizer: Tokenizer | None = None


class Engine:
    """Runs a bundle: sessions on the base or on any adapter, in one process.

    threads: how many threads compute a step. None: one for each physical core.
    kv: how keys and values are stored: `float16`, or `float32`, which is exact and takes twice the memory.
    max_context: how many positions a session can hold. None: as many as the model has. A session takes memory only for
        the positions that it holds.
    cache_bytes: how many bytes of keys and values the engine keeps for prompts that begin alike. 0: none.
    memory_bytes: how many bytes adapters, keys and values may take together. None: no limit. When all are taken,
        cached keys and values are dropped first, then adapters that no session uses. After that, calls are refused.

    The steps of all sessions take turns. You can call a session from any thread.
    The foundation and the tokenizer are loaded when they are first used.
    RunError: an argument has a wrong type or value, or the chat template cannot be read.  BundleError: the manifest
    describes a model that cannot be.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        kv: Precision = "float16",
        max_context: int | None = None,
        cache_bytes: int = CACHE_BYTES,
        memory_bytes: int | None = None,
    ) -> None:
        arguments.instance("bundle", bundle, Bundle, "give an open bundle: Bundle.open(path)")
        self._threads = _thread_count(threads)
        self._kv: Precision = arguments.one_of("kv", kv, PRECISIONS)
        self._spec = read_spec(bundle)
        self.limits = Limits(
            max_rows=MAX_ROWS,
            max_context=_context(self._spec, max_context),
            vocab=self._spec.vocab_size,
        )
        self._cache_bytes = arguments.integer("cache_bytes", cache_bytes, least=0)
        self._memory_bytes = None
        if memory_bytes is not None:
            self._memory_bytes = arguments.integer("memory_bytes", memory_bytes, least=0)
        self.bundle = bundle
        self.tokenizer = Tokenizer.of_bundle(bundle)
        self._foundation = bundle.foundation_sha256
        self._base: Weights | None = None
        self._adapters: dict[str, _Adapter] = {}  # least recently used first
        # Also those that only generations use.
        self._alive: weakref.WeakSet[_native.Adapter] = weakref.WeakSet()
        self._sums = Sums()
        self._meter = _native.Meter()  # of keys and values
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._lock = threading.RLock()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unload everything and end the threads. If a session is used again, it loads what it needs."""
        # A step holds locks of sessions while it waits for the engine's. So this never holds both.
        with self._lock:
            sessions = list(self._sessions)
        for session in sessions:
            session.reset()
        self.unload()

    def session(self, adapter: str | Mapping[str, float] | None = None, *, cache_salt: str = "") -> Session:
        """Start a new conversation with the base (None), with an adapter, or with several at once: a mapping from
        their names to their scales. Raises what `Session.use` raises.

        cache_salt: sessions share cached keys and values only if they have the same. Then nobody else can learn from
        the time that an answer takes what they have asked.
        """
        adapters = arguments.adapters(adapter)
        self._check(adapters)
        session = Session(self._host(), adapters, Held(arguments.text("cache_salt", cache_salt)))
        self._adopt(session)
        return session

    def load_session(self, path: str | Path) -> Session:
        """A session that `Session.save` wrote: it goes on where that one was.

        Only load files that you trust. Each byte is checked against a hash, but whoever makes a file can make its
        hash too. What a file holds never gets into other sessions.
        NotFoundError: there is no such file, or an adapter is not in the bundle.  RunError: the file is damaged, or
        another foundation, another adapter or another form of keys and values computed it.
        """
        host = self._host()
        saved = session_file.load(path, host.load, host.reserve, self.limits.max_context)
        session = Session(host, saved.adapters, saved.held)
        self._adopt(session)
        return session

    def _host(self) -> Host:
        return Host(
            load=self._load_all,
            load_for_text=self._load_for_text,
            check=self._check,
            adopt=self._adopt,
            reserve=self._reserve,
            limits=self.limits,
        )

    def _adopt(self, session: Session) -> None:
        with self._lock:
            self._sessions.add(session)

    def _check(self, adapters: Mapping[str, float]) -> None:
        """Whether a session can use them: see `Session.use`."""
        for name in adapters:
            self.tokenizer_of(name)
        if len(adapters) > 1 or any(scale != 1 for scale in adapters.values()):
            self._load_all(adapters)

    def check_adapter(self, name: str | None) -> None:
        """NotFoundError: the bundle has no adapter of this name (None is the base). RunError: the name is not text."""
        _check_name(name)
        if name is not None and name not in self.bundle.adapters:
            known = ", ".join(sorted(self.bundle.adapters)) or "none"
            hint = f"the bundle has: {known}"
            raise NotFoundError(f"no adapter {name!r}", where=self.bundle.path, hint=hint)

    def tokenizer_of(self, name: str | None) -> Tokenizer:
        """The tokenizer of the base (None) or of an adapter, which can have further tokens and its own chat template.

        NotFoundError: there is no such adapter.  RunError: its chat template cannot be read.
        """
        self.check_adapter(name)
        if name is None:
            return self.tokenizer
        with self._lock:
            adapter = self._adapter(name)
            if adapter.tokenizer is None:
                adapter.tokenizer = self.tokenizer.of_adapter(self.bundle, name)
            return adapter.tokenizer

    def load(self, name: str | None = None) -> Weights:
        """Load the weights of the base (None) or of an adapter, if they are not loaded, and return them.

        NotFoundError: there is no such adapter.  BundleError: its file is damaged, or the bundle was replaced by
        another one. All other adapters still work after a damaged file.
        """
        return self._load(name, meanwhile=None)

    def _load_for_text(self, adapters: Mapping[str, float]) -> tuple[Weights, Tokenizer]:
        """Weights and tokenizer of the same adapters, also where another takes the name of one meanwhile."""
        # Of several, each has the base's tokenizer.
        name = next(iter(adapters)) if len(adapters) == 1 else None
        with self._lock:
            while True:
                weights = self._load_all(adapters, meanwhile=self.tokenizer.open)
                tokenizer = self.tokenizer_of(name)
                tokenizer.open()
                now = None if name is None else self._adapter(name).weights
                if name is None or (now is not None and now.adapter is weights.adapter):
                    return weights, tokenizer

    def _load_all(
        self, adapters: Mapping[str, float], meanwhile: Callable[[], None] | None = None
    ) -> Weights:
        """What adapters come to, each with its scale. UnsupportedError: they cannot be used so."""
        if len(adapters) < 2:
            name, scale = next(iter(adapters.items()), (None, 1.0))
            return self._load(name, meanwhile).scaled(scale)
        with self._lock:
            parts = {
                name: (self._load(name, meanwhile, beside=adapters), scale)
                for name, scale in adapters.items()
            }
            return self._sums.of(self._load(None, None), parts)

    def _load(
        self, name: str | None, meanwhile: Callable[[], None] | None, beside: Collection[str] = ()
    ) -> Weights:
        """meanwhile: what else to do while the base is read, if it is not there yet.  beside: adapters that are not
        dropped for this one.
        """
        self.check_adapter(name)
        with self._lock:
            if self._base is None:
                self._check_foundation()
                self._base = load_foundation(
                    self.bundle,
                    self._spec,
                    threads=self._threads,
                    max_context=self.limits.max_context,
                    precision=self._kv,
                    meter=self._meter,
                    cache_bytes=self._cache_bytes,
                    meanwhile=meanwhile,
                )
            return self._base if name is None else self._load_adapter(self._base, name, beside)

    def _load_adapter(self, base: Weights, name: str, beside: Collection[str]) -> Weights:
        adapter = self._adapter(name)
        if adapter.weights is None:
            self._check_foundation()
            if adapter.state is not None:
                self._make_room(adapter.state[2], beside)  # about what it will take
            weights = load_adapter(base, self.bundle, name, self._spec)
            self._make_room(weights.nbytes, beside)
            assert weights.adapter is not None
            self._alive.add(weights.adapter)
            adapter.weights = weights
        return adapter.weights

    def _adapter(self, name: str) -> _Adapter:
        """What is loaded of an adapter: nothing, if the file behind its name has changed since then.

        NotFoundError: it is gone.
        """
        there = self._adapters.get(name)
        if there is not None and there.state == _state(self.bundle.adapters[name].weights):
            self._adapters[name] = self._adapters.pop(name)
            return there
        if there is not None:
            self.unload(name)
            self.bundle.refresh()
            self.check_adapter(name)
        self._adapters[name] = _Adapter(state=_state(self.bundle.adapters[name].weights))
        return self._adapters[name]

    def _reserve(self, parts: Sequence[tuple[_native.Kv, int, int]]) -> None:
        """Take memory for positions [begin, end) of keys and values. RunError: there is none."""
        if self._memory_bytes is None or not any(kv.growth(begin, end) for kv, begin, end in parts):
            return
        with self._lock:
            self._make_room(sum(kv.growth(begin, end) for kv, begin, end in parts))
            for kv, begin, end in parts:
                kv.reserve(begin, end)

    def _make_room(self, nbytes: int, kept: Collection[str] = ()) -> None:
        """Drop what is needed least, if there is no room. The caller holds the lock. RunError: not enough is left.

        kept: adapters that stay, beside those that sessions use.
        """
        if self._memory_bytes is None:
            return
        cache = PrefixCache(0) if self._base is None else self._base.cache
        used = {*kept, *(name for session in self._sessions for name in session.adapters)}
        idle = {
            name: one.weights.nbytes
            for name, one in self._adapters.items()
            if one.weights is not None and name not in used
        }
        over = self._taken() + nbytes - self._memory_bytes
        if over > cache.own_nbytes + sum(idle.values()):
            raise RunError(
                f"the engine's memory is full: {nbytes:,} bytes more than the {self._taken():,} that are in use would "
                f"be more than memory_bytes, {self._memory_bytes:,}",
                hint="reset sessions that you no longer need, or give the engine more memory_bytes",
            )
        if over > 0:
            over -= cache.evict(over)
        for name, size in idle.items():
            if over > 0:
                self.unload(name)
                over -= size

    def _taken(self) -> int:
        return self._meter.nbytes + sum(adapter.nbytes for adapter in self._alive)

    def _check_foundation(self) -> None:
        if self.bundle.foundation_sha256 != self._foundation:
            hint = "open the bundle again, and make a new engine with it"
            raise BundleError(
                "the bundle was replaced after the engine was made", where=self.bundle.path, hint=hint
            )

    def step(self, parts: Sequence[tuple[Session, Sequence[int]]]) -> NDArray[np.float32]:
        """Append tokens to several sessions in one step. Returns the logits of the last token of each session, float32
        [sessions, vocab].

        vocab: how many tokens the adapter with the most of them has. A row has -inf for those that its own adapter
        does not have. The logits of a session are the same bits as if it ran alone.
        RunError: a session is given twice or belongs to another engine, its context is full, or token ids are not in
        the vocabulary.  BundleError: the file of an adapter is damaged. After an error, no session has changed.
        """
        parts = self._checked_parts(parts)
        with ExitStack() as stack:
            # All callers lock in the same order, so no two wait for each other.
            for session, _ in sorted(parts, key=lambda part: id(part[0])):
                stack.enter_context(session.held())
            return Session.step_together(parts)

    def _checked_parts(self, parts: object) -> list[tuple[Session, Sequence[int]]]:
        hint = "give a list of (session, token ids), each session of this engine at most once"
        listed = list(arguments.instance("parts", parts, (list, tuple), hint))
        for part in listed:
            if not isinstance(part, tuple | list) or len(part) != 2 or not isinstance(part[0], Session):
                raise RunError(f"{part!r} is not a pair of a session and token ids", hint=hint)
        if not listed:
            raise RunError("there are no parts", hint=hint)
        sessions = [session for session, _ in listed]
        with self._lock:
            if not all(one in self._sessions for one in sessions):
                raise RunError("a session belongs to another engine", hint=hint)
        if len(set(map(id, sessions))) < len(sessions):
            raise RunError("a session is given twice", hint=hint)
        return listed

    def unload(self, name: str | None = None) -> None:
        """Unload weights, if they are loaded. If the base is unloaded (None), so are all adapters. The memory is free
        when the generations that use it have ended.
        """
        _check_name(name)  # the adapter itself may have been removed
        with self._lock:
            if name is None:
                self._adapters.clear()
                self._base = None
            else:
                self._adapters.pop(name, None)

    def memory(self) -> MemoryUse:
        """How much memory is in use now. You can ask at any time: it waits for no step and no load."""
        base, adapters = self._base, self._adapters.copy()
        cache = 0 if base is None else base.cache.own_nbytes
        return MemoryUse(
            process=resident_bytes(),
            foundation=0 if base is None else base.decoder.nbytes,
            adapters={name: one.weights.nbytes for name, one in adapters.items() if one.weights is not None},
            kv=max(0, self._meter.nbytes - cache),
            cache=cache,
        )


def _state(file: Path) -> _State:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _check_name(name: str | None) -> None:
    if name is not None:
        arguments.instance("the adapter's name", name, str, "give text, or None for the base")


def _context(spec: ModelSpec, wanted: int | None) -> int:
    most = spec.max_positions
    if wanted is None:
        return most
    count = arguments.integer("max_context", wanted, least=1)
    if count > most:
        raise RunError(f"max_context is {count}", hint=f"the model has {most} positions")
    return count


def _thread_count(threads: int | None) -> int:
    if threads is None:
        return physical_cores()
    count = arguments.integer("threads", threads, least=1)
    if count > _MOST_THREADS:
        raise RunError(
            f"threads is {count}", hint=f"give at most {_MOST_THREADS}; one for each physical core is best"
        )
    return count


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
