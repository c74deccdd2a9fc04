"""Programs of a bundle, loaded into one process: the foundation once, each adapter beside it."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from bedplate import _native
from bedplate.bundle.store import Bundle
from bedplate.errors import NotFoundError, RunError
from bedplate.runtime.packed_weights import PackedWeights
from bedplate.runtime.programs import Limits, LoadedProgram, load_program, resident_bytes
from bedplate.runtime.session import Session
from bedplate.runtime.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes.  process: all that is resident.  activations: what all programs share.  kv: of all sessions.
    programs: by adapter name, `base` for none: growth of the process while it was loaded, without what it maps from a
    file of packed weights.
    """

    process: int
    activations: int
    kv: int
    programs: dict[str, int]


class Engine:
    """Runs a bundle: sessions on the base or on any adapter, in one process.

    threads: of the whole process, for all engines; None: one for each physical core.
    weight_cache: weights that several programs name are packed once. Off, each packs its own.
    packed_cache: a folder for the foundation's packed weights, some MB more than the foundation has: the first process
    writes them, every later one maps them in place of packing. Delete what is in it at any time.

    Steps of all sessions take turns; any thread may ask for one.
    RunError: the tokenizer cannot be read, the process has not so many threads, or the folder cannot be used.
    """

    _serials = itertools.count()

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        weight_cache: bool = True,
        packed_cache: str | Path | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise RunError(f"threads is {threads}", hint="at least 1")
        if packed_cache is not None and not weight_cache:
            raise RunError(
                "packed weights on disk without a weight cache", hint="they are what that cache holds"
            )
        self.bundle = bundle
        # Before the tokenizer: they are hashed while that is read.
        self._packed_weights = None if packed_cache is None else PackedWeights(Path(packed_cache), bundle)
        self.tokenizer = Tokenizer.of_bundle(bundle)
        self._tokenizers: dict[str, Tokenizer] = {}
        self._weight_cache = weight_cache
        self._activations = _native.Activations()
        self._programs: dict[str | None, LoadedProgram] = {}
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._lock = threading.Lock()
        _set_threads(threads or physical_cores())

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unload everything. A session that is used again loads what it needs again."""
        with self._lock:
            self._programs.clear()
            if self._packed_weights is not None:
                self._packed_weights.close()

    def session(self, adapter: str | None = None) -> Session:
        """A new conversation on the base (None) or an adapter. NotFoundError: no such adapter."""
        self.check_adapter(adapter)
        session = Session(self, adapter)
        self._sessions.add(session)
        return session

    def check_adapter(self, name: str | None) -> None:
        """NotFoundError: the bundle has no adapter of this name (None is the base)."""
        if name is not None and name not in self.bundle.adapters:
            known = ", ".join(sorted(self.bundle.adapters)) or "none"
            hint = f"the bundle has: {known}"
            raise NotFoundError(f"no adapter {name!r}", where=self.bundle.path, hint=hint)

    def tokenizer_of(self, adapter: str | None) -> Tokenizer:
        """The tokenizer with the chat settings of an adapter (None: of the base).

        NotFoundError: no such adapter.
        """
        self.check_adapter(adapter)
        if adapter is None:
            return self.tokenizer
        if adapter not in self._tokenizers:
            self._tokenizers[adapter] = self.tokenizer.for_adapter(self.bundle, adapter)
        return self._tokenizers[adapter]

    def load(self, name: str | None = None) -> LoadedProgram:
        """Load the base (None) or an adapter, unless it is loaded.

        NotFoundError: no such adapter.  RunError: its program cannot be loaded; all others go on working.
        """
        self.check_adapter(name)
        with self._lock:
            if name not in self._programs:
                path, data = self.bundle.base_program, [self.bundle.foundation]
                if name is not None:
                    path = self.bundle.adapters[name].program
                    data.append(self.bundle.adapters[name].weights)
                self._programs[name] = self._load(path, data)
            return self._programs[name]

    def _load(self, path: Path, data: list[Path]) -> LoadedProgram:
        packed = None if self._packed_weights is None else self._packed_weights.path(self._pack)
        return self._load_with(path, data, packed)

    def _load_with(self, path: Path, data: list[Path], packed_cache: Path | None) -> LoadedProgram:
        return load_program(
            path,
            data,
            self._activations,
            serial=next(self._serials),
            weight_cache=self._weight_cache,
            packed_cache=packed_cache,
        )

    def _pack(self, file: Path) -> None:
        program = self._load_with(self.bundle.base_program, [self.bundle.foundation], file)
        if program.uses is None:
            raise RunError(
                "a program of another bundle is loaded whose files hold other bytes under the same keys",
                where=self.bundle.foundation,
                hint="bedplate verify BUNDLE tells which of the bundles is wrong; or use a process for each",
            )

    def unload(self, name: str | None = None) -> None:
        """Forget a program, if loaded. Its memory is free when the generations that use it have ended."""
        with self._lock:
            self._programs.pop(name, None)

    def limits(self, name: str | None = None) -> Limits:
        """How much text a program takes. Loads it."""
        return self.load(name).limits

    def memory(self) -> MemoryUse:
        """What is in memory now, and what each program added when it was loaded."""
        with self._lock:
            programs = {name or "base": program.growth for name, program in self._programs.items()}
        return MemoryUse(
            process=resident_bytes(),
            activations=self._activations.resident,
            kv=sum(session.kv_bytes for session in self._sessions),
            programs=programs,
        )


def _set_threads(count: int) -> None:
    try:
        _native.set_threads(count)
    except _native.NativeError as error:
        hint = "the first engine of a process decides how many there can be, at least one for each core"
        raise RunError(error.args[1], hint=hint) from error


def physical_cores() -> int:
    """Cores that this process may use; hardware threads of one share its arithmetic, so count once."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            package, core = ((topology / file).read_text() for file in ("physical_package_id", "core_id"))
        except OSError:
            package, core = "", str(cpu)
        cores.add((package, core))
    return len(cores)
