"""A bundle in one process: the foundation's weights once, each adapter's beside them, and steps of many sessions."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from bedplate import _native
from bedplate.bundle.store import Bundle
from bedplate.errors import RunError
from bedplate.runtime import arguments
from bedplate.runtime.cores import usable_cores
from bedplate.runtime.fixed import Fixed
from bedplate.runtime.held import Held
from bedplate.runtime.loaded import Form, Loaded
from bedplate.runtime.lookup import Habits
from bedplate.runtime.model_spec import read_spec
from bedplate.runtime.scheduler import Scheduler
from bedplate.runtime.session import Host, Session
from bedplate.runtime.tokenizer import Tokenizer
from bedplate.runtime.weights import PRECISIONS, Limits, Precision, Weights
from bedplate.spec import ModelSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bedplate.runtime.activity import Activity, MemoryUse
    from bedplate.runtime.template_guard import Templates

_MOST_THREADS = 1024  # no processor has more; of a number out of all reason the system would make what it can
# The longest run of rows that one step takes. Longer prompts go in several; more than this gains no speed.
MAX_ROWS = 256
CACHE_BYTES = 256 << 20


class Engine:
    """Runs a bundle: sessions on the base or on any adapter, in one process.

    threads: how many threads compute a step. None: one for each physical core that the process may use, and has the
        time of (the quota of its cgroups).
    kv: how keys and values are stored: `float16`, or `float32`, which is exact and takes twice the memory.
    max_context: how many positions a session can hold. None: as many as the model has. A session takes memory only for
        the positions that it holds.
    cache_bytes: how many bytes of keys and values the engine keeps for prompts that begin alike. 0: none.
    memory_bytes: how many bytes adapters, keys and values may take together. None: no limit. When all are taken,
        cached keys and values are dropped first, then adapters that no session uses. After that, calls are refused.

    max_step_rows: how many tokens one step of generations computes, those of all sessions together. Fewer make
        others wait less while a long prompt is read, more can read it faster. While generations run, other calls
        compute no more at a time. None: 48, or 32 if the processor has no AVX-512.
    lookup: whether generations look for what comes next in their own text, and in earlier answers of the same adapters
        and the same salt, to compute several tokens in one step. The text is the same.

    Generations of all sessions are computed together. Other calls take turns. You can call a session from any thread.
    A process that is forked later needs an engine of its own: there, calls of this one raise a RunError.
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
        max_step_rows: int | None = None,
        lookup: bool = True,
        guard_templates: bool = False,
    ) -> None:
        arguments.instance("bundle", bundle, Bundle, "give an open bundle: Bundle.open(path)")
        spec = read_spec(bundle)
        form = Form(
            threads=_thread_count(threads),
            max_context=_context(spec, max_context),
            precision=arguments.one_of("kv", kv, PRECISIONS),
            cache_bytes=arguments.integer("cache_bytes", cache_bytes, least=0),
            memory_bytes=None
            if memory_bytes is None
            else arguments.integer("memory_bytes", memory_bytes, least=0),
        )
        self.limits = Limits(max_rows=MAX_ROWS, max_context=form.max_context, vocab=spec.vocab_size)
        self.bundle, self.memory_bytes = bundle, form.memory_bytes
        self._templates = _templates() if arguments.flag("guard_templates", guard_templates) else None
        self._loaded = Loaded(bundle, spec, form, self._in_use, self._templates)
        most = _step_rows() if max_step_rows is None else max_step_rows
        self._scheduler = Scheduler(arguments.integer("max_step_rows", most, least=1), self._loaded.reserve)
        self._habits = Habits() if arguments.flag("lookup", lookup) else None
        self._own_sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._lock = threading.RLock()  # of the sessions

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the base."""
        return self._loaded.tokenizer

    @property
    def _sessions(self) -> list[Session]:
        self._loaded.process.check()  # before it waits for a lock that nobody may give up
        with self._lock:
            return list(self._own_sessions)

    def _in_use(self) -> set[str]:
        return {name for session in self._sessions for name in session.adapters}

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unload everything and end the threads. If a session is used again, it loads what it needs.

        In a process that was forked after the engine was made, this does nothing.
        """
        if not self._loaded.process.is_current:
            return
        for session in self._sessions:
            session.reset()
        self._scheduler.close()
        if self._templates is not None:
            self._templates.close()
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

    def fixed(self, adapter: str | Mapping[str, float] | None = None) -> Fixed:
        """The base, or adapters, for sessions that belong together: all have the same weights, those of the time when
        the first of them is used. RunError: the argument has a wrong type or value.
        """
        return Fixed(self._host(), arguments.adapters(adapter), self.tokenizer_of)

    def try_adapter(self, drafts: Bundle, name: str) -> bool:
        """Load an adapter of a bundle that has the same foundation, and let it go. Returns whether it changes the
        logits of a short text.

        BundleError: its files are damaged, or were packed against another foundation.  RunError: its chat template or
        its tokenizer cannot be read.
        """
        from bedplate.runtime.effect import has_effect  # which imports numpy

        base, adapted = self._loaded.trial(drafts, name)
        with self._scheduler.turn():
            return has_effect(base, adapted, drafts.adapters[name], read_spec(self.bundle))

    @property
    def running(self) -> int:
        """How many generations have begun, and have not ended."""
        return self._scheduler.running

    def load_session(self, path: str | Path) -> Session:
        """A session that `Session.save` wrote: it goes on where that one was.

        Only load files that you trust. Each byte is checked against a hash, but whoever makes a file can make its
        hash too. What a file holds never gets into other sessions.
        NotFoundError: there is no such file, or an adapter is not in the bundle.  RunError: the file is damaged, or
        another foundation, another adapter or another form of keys and values computed it.
        """
        from bedplate.runtime import session_file

        host = self._host()
        saved = session_file.load(path, host.load, host.reserve, self.limits.max_context)
        session = Session(host, saved.adapters, saved.held)
        self._adopt(session)
        return session

    def _host(self) -> Host:
        self._loaded.process.check()
        return Host(
            load=self._loaded.load_all,
            load_for_text=self._loaded.load_for_text,
            check=self._check,
            adopt=self._adopt,
            reserve=self._loaded.reserve,
            scheduler=self._scheduler,
            limits=self.limits,
            habits=self._habits,
        )

    def _adopt(self, session: Session) -> None:
        self._loaded.process.check()  # before it waits for a lock that nobody may give up
        with self._lock:
            self._own_sessions.add(session)

    def _check(self, adapters: Mapping[str, float]) -> None:
        """Whether a session can use them: see `Session.use`."""
        for name in adapters:
            self._loaded.tokenizer_of(name)
        if len(adapters) > 1 or any(scale != 1 for scale in adapters.values()):
            self._loaded.load_all(adapters)

    def check_adapter(self, name: str | None) -> None:
        """NotFoundError: the bundle has no adapter of this name (None is the base). RunError: the name is not text."""
        self._loaded.check(name)

    def tokenizer_of(self, name: str | None) -> Tokenizer:
        """The tokenizer of the base (None) or of an adapter, which can have further tokens and its own chat template.

        NotFoundError: there is no such adapter.  RunError: its chat template cannot be read.
        """
        return self._loaded.tokenizer_of(name)

    def load(self, name: str | None = None) -> Weights:
        """Load the weights of the base (None) or of an adapter, if they are not loaded, and return them.

        NotFoundError: there is no such adapter.  BundleError: its file is damaged, or the bundle was replaced by
        another one. All other adapters still work after a damaged file.
        """
        return self._loaded.load(name)

    def step(self, parts: Sequence[tuple[Session, Sequence[int]]]) -> NDArray[np.float32]:
        """Append tokens to several sessions in one step. Returns the logits of the last token of each session, float32
        [sessions, vocab].

        vocab: how many tokens the adapter with the most of them has. A row has -inf for those that its own adapter
        does not have. The logits of a session are the same bits as if it ran alone.
        RunError: a session is given twice or belongs to another engine, its context is full, or token ids are not in
        the vocabulary.  BundleError: the file of an adapter is damaged. After an error, no session has changed.
        """
        return Session.step_together(self._checked_parts(parts))

    def _checked_parts(self, parts: object) -> list[tuple[Session, Sequence[int]]]:
        hint = "give a list of (session, token ids), each session of this engine at most once"
        listed = list(arguments.instance("parts", parts, (list, tuple), hint))
        for part in listed:
            if not isinstance(part, tuple | list) or len(part) != 2 or not isinstance(part[0], Session):
                raise RunError(f"{part!r} is not a pair of a session and token ids", hint=hint)
        if not listed:
            raise RunError("there are no parts", hint=hint)
        sessions = [session for session, _ in listed]
        known = set(map(id, self._sessions))
        if not all(id(one) in known for one in sessions):
            raise RunError("a session belongs to another engine", hint=hint)
        if len(set(map(id, sessions))) < len(sessions):
            raise RunError("a session is given twice", hint=hint)
        return listed

    def unload(self, name: str | None = None) -> None:
        """Unload weights, if they are loaded. If the base is unloaded (None), so are all adapters. The memory is free
        when the generations that use it have ended.
        """
        self._loaded.unload(name)

    def memory(self) -> MemoryUse:
        """How much memory is in use now. You can ask at any time: it waits for no step and no load."""
        from bedplate.runtime.activity import MemoryUse, resident_bytes

        self._loaded.process.check()
        base = self._loaded.base
        cache = 0 if base is None else base.cache.own_nbytes
        return MemoryUse(
            process=resident_bytes(),
            foundation=0 if base is None else base.decoder.nbytes,
            adapters=self._loaded.adapters,
            kv=max(0, self._loaded.meter.nbytes - cache),
            cache=cache,
        )

    def activity(self) -> Activity:
        """What is computed now. You can ask at any time: it waits for nothing."""
        from bedplate.runtime.activity import Activity, Running

        going = [(session, running) for session in self._sessions if (running := session.running) is not None]
        return Activity(
            steps=self._scheduler.steps,
            rows=self._scheduler.rows,
            running=[
                Running(
                    adapters=session.adapters,
                    prompt_tokens=one.stats.prompt_tokens,
                    read_tokens=min(len(one.held.tokens), one.stats.prompt_tokens),
                    generated_tokens=one.stats.generated_tokens,
                )
                for session, one in going
            ],
        )


def _templates() -> Templates:
    from bedplate.runtime.template_guard import Templates

    return Templates()


def _context(spec: ModelSpec, wanted: int | None) -> int:
    most = spec.max_positions
    if wanted is None:
        return most
    count = arguments.integer("max_context", wanted, least=1)
    if count > most:
        raise RunError(f"max_context is {count}", hint=f"the model has {most} positions")
    return count


def _step_rows() -> int:
    """Who asks while a prompt is read waits for a step of so many. Without AVX-512 that takes twice as long, and more
    than 32 gain no speed.
    """
    return 48 if _native.instruction_set().startswith("avx512") else 32


def _thread_count(threads: int | None) -> int:
    if threads is None:
        return usable_cores()
    count = arguments.integer("threads", threads, least=1)
    if count > _MOST_THREADS:
        raise RunError(
            f"threads is {count}", hint=f"give at most {_MOST_THREADS}; one for each physical core is best"
        )
    return count
