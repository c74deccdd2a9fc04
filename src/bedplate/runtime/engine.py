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
from bedplate.runtime import arguments
from bedplate.runtime.packed_weights import PackedWeights
from bedplate.runtime.programs import Limits, LoadedProgram, load_program, resident_bytes
from bedplate.runtime.session import Session
from bedplate.runtime.tokenizer import Tokenizer

_MOST_THREADS = 4096  # no processor has more; of a number out of all reason the system would make what it can


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Memory in bytes.

    process: resident memory of the process.  activations: memory that all programs share.  kv: keys and values of all
    sessions.  programs: by name (`base` or the adapter's), how much the process grew when the program was loaded.
    Packed weights that are mapped from a file do not count.
    """

    process: int
    activations: int
    kv: int
    programs: dict[str, int]


class Engine:
    """Runs a bundle: sessions on the base or on any adapter, in one process.

    threads: how many threads compute, for all engines of the process. None: one for each physical core.
    weight_cache: weights that several programs use are packed once. If False, each program packs its own.
    packed_cache: a folder for the packed weights of the foundation (some MB more than the foundation has). The first
        process writes them. Later processes map them instead of packing. You can delete them at any time.

    The steps of all sessions take turns. You can call a session from any thread.
    RunError: an argument has a wrong type or value, the tokenizer cannot be read, the process cannot have so many
    threads, or the folder cannot be used.
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
        arguments.instance("bundle", bundle, Bundle, "give an open bundle: Bundle.open(path)")
        count = _thread_count(threads)
        arguments.flag("weight_cache", weight_cache)
        if packed_cache is not None:
            arguments.instance("packed_cache", packed_cache, (str, Path), "give the path of a folder")
            if not weight_cache:
                hint = "leave out weight_cache=False, or leave out packed_cache"
                raise RunError("packed_cache needs the weight cache", hint=hint)
        self.bundle = bundle
        # Before the tokenizer: they are hashed while that is read.
        self._packed_weights = None if packed_cache is None else PackedWeights(Path(packed_cache), bundle)
        self.tokenizer = Tokenizer.of_bundle(bundle)
        self._tokenizers: dict[str | None, Tokenizer] = {None: self.tokenizer}
        self._weight_cache = weight_cache
        self._activations = _native.Activations()
        self._programs: dict[str | None, LoadedProgram] = {}
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._lock = threading.Lock()
        _set_threads(count)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unload everything. If a session is used again, it loads what it needs."""
        with self._lock:
            self._programs.clear()
            if self._packed_weights is not None:
                self._packed_weights.close()

    def session(self, adapter: str | None = None) -> Session:
        """Start a new conversation with the base (None) or an adapter. NotFoundError: there is no such adapter."""
        self.check_adapter(adapter)
        session = Session(self, adapter)
        self._sessions.add(session)
        return session

    def check_adapter(self, name: str | None) -> None:
        """NotFoundError: the bundle has no adapter of this name (None is the base). RunError: the name is not text."""
        _check_name(name)
        if name is not None and name not in self.bundle.adapters:
            known = ", ".join(sorted(self.bundle.adapters)) or "none"
            hint = f"the bundle has: {known}"
            raise NotFoundError(f"no adapter {name!r}", where=self.bundle.path, hint=hint)

    def tokenizer_of(self, name: str | None) -> Tokenizer:
        """The tokenizer of the base (None) or of an adapter, which can have a chat template of its own.

        NotFoundError: there is no such adapter.  RunError: its chat template cannot be read.
        """
        self.check_adapter(name)
        with self._lock:
            if name not in self._tokenizers:
                self._tokenizers[name] = self.tokenizer.of_adapter(self.bundle, name)
            return self._tokenizers[name]

    def load(self, name: str | None = None) -> LoadedProgram:
        """Load the base (None) or an adapter, if it is not loaded.

        NotFoundError: there is no such adapter.  RunError: its program cannot be loaded. All others still work.
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
                "another bundle is loaded, and its files hold other bytes under the same keys",
                where=self.bundle.foundation,
                hint="bedplate verify BUNDLE tells which bundle is wrong; or use one process for each bundle",
            )

    def unload(self, name: str | None = None) -> None:
        """Unload a program, if it is loaded. Its memory is free when the generations that use it have ended."""
        _check_name(name)  # the adapter itself may have been removed
        with self._lock:
            self._programs.pop(name, None)
            if name is not None:
                self._tokenizers.pop(name, None)

    def limits(self, name: str | None = None) -> Limits:
        """How much text a program takes. This loads the program."""
        return self.load(name).limits

    def memory(self) -> MemoryUse:
        """How much memory is in use now, and how much each program added when it was loaded."""
        with self._lock:
            programs = {name or "base": program.growth for name, program in self._programs.items()}
        return MemoryUse(
            process=resident_bytes(),
            activations=self._activations.resident,
            kv=sum(session.kv_bytes for session in self._sessions),
            programs=programs,
        )


def _check_name(name: str | None) -> None:
    if name is not None:
        arguments.instance("the adapter's name", name, str, "give text, or None for the base")


def _thread_count(threads: int | None) -> int:
    if threads is None:
        return physical_cores()
    count = arguments.integer("threads", threads, least=1)
    if count > _MOST_THREADS:
        raise RunError(
            f"threads is {count}", hint=f"give at most {_MOST_THREADS}; one for each physical core is best"
        )
    return count


def _set_threads(count: int) -> None:
    try:
        _native.set_threads(count)
    except _native.NativeError as error:
        hint = (
            "the first engine of a process decides how many threads there can be: at least one for each core"
        )
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
