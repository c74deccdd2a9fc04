"""Adapters as they are when they are first used, for all sessions of one request."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from bedplate.errors import ReplacedError
from bedplate.runtime import arguments
from bedplate.runtime.held import Held
from bedplate.runtime.session import Host, Session
from bedplate.runtime.tokenizer import Tokenizer
from bedplate.runtime.weights import Weights


class Fixed:
    """The base, one adapter, or several. `Engine.fixed` makes it. You can call it from any thread.

    It loads them when its first session does. From then on, all its sessions have the same weights and tokenizer,
    whatever takes the names meanwhile. The memory is free when it and its sessions are forgotten.
    """

    def __init__(
        self, host: Host, adapters: Mapping[str, float], tokenizer_of: Callable[[str | None], Tokenizer]
    ) -> None:
        self.adapters = dict(adapters)
        self._engine, self._tokenizer_of = host, tokenizer_of
        self._seen: Tokenizer | None = None
        self._found: tuple[Weights, Tokenizer] | None = None
        self._lock = threading.RLock()

    @property
    def is_loaded(self) -> bool:
        return self._found is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """Of its one adapter, else of the base. NotFoundError: there is no such adapter."""
        if self._found is not None:
            return self._found[1]
        if self._seen is None:
            name = next(iter(self.adapters)) if len(self.adapters) == 1 else None
            self._seen = self._tokenizer_of(name)
        return self._seen

    def session(self, *, cache_salt: str = "") -> Session:
        """A new conversation. What is wrong with the adapters, its first call raises."""
        host = self._engine._replace(load=self._load, load_for_text=self._load_for_text)
        session = Session(host, self.adapters, Held(arguments.text("cache_salt", cache_salt)))
        host.adopt(session)
        return session

    def _load(self, adapters: Mapping[str, float]) -> Weights:
        return self._load_for_text(adapters)[0]

    def _load_for_text(self, adapters: Mapping[str, float]) -> tuple[Weights, Tokenizer]:
        if adapters != self.adapters:  # of a session that was told to use others
            return self._engine.load_for_text(adapters)
        self._engine.scheduler.process.check()  # before it waits for a lock that nobody may give up
        with self._lock:
            if self._found is None:
                found = self._engine.load_for_text(adapters)
                if self._seen is not None and not self._seen.is_as(found[1]):
                    raise ReplacedError("the adapter was replaced while the request began", hint="ask again")
                self._found = found
            return self._found
