"""A program in memory, and its failures in our words."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bedplate import _native
from bedplate.bundle.usage import program_keys
from bedplate.errors import RunError
from bedplate.runtime.shared_weights import DataFile, Use, keep, share

_HINT = "bedplate verify BUNDLE checks every file, and that programs and data files fit each other"
_HINTS = {
    "AccessFailed": "check that the file is there and that you may read it",
    "OperatorMissing": "the program needs an operator that this runtime does not have: build the bundle again",
}


@contextlib.contextmanager
def native_errors(where: Path) -> Iterator[None]:
    """Turns NativeError into RunError."""
    try:
        yield
    except _native.NativeError as error:
        code, text = error.args
        raise RunError(text, where=where, hint=_HINTS.get(code, _HINT)) from error


@dataclass(frozen=True, kw_only=True)
class Limits:
    """max_seq_len: how many tokens one step takes.  max_logits_len: how many, if the step returns the logits of all.
    max_context: how many positions a session can hold.
    """

    max_seq_len: int
    max_logits_len: int
    max_context: int


@dataclass(frozen=True, kw_only=True)
class LoadedProgram:
    """serial: no two loads of a process have the same; keys and values computed by one are no other's.
    kv_bytes: size of a session's keys and values.
    growth: bytes by which the process's resident memory grew while `forward` was loaded; what is mapped from a file of
    packed weights comes when it is used.
    uses: data files whose packed weights it shares with other programs; None: it shares none.
    """

    path: Path
    native: _native.Program
    uses: tuple[Use, ...] | None  # after `native`, so that they end after it
    serial: int
    limits: Limits
    kv_bytes: int
    growth: int


def load_program(
    path: Path,
    data: list[Path],
    activations: _native.Activations,
    *,
    serial: int,
    weight_cache: bool,
    packed_cache: Path | None,
) -> LoadedProgram:
    """Load `forward` of a .pte with its data files.

    weight_cache: weights that several programs name are packed once. packed_cache: a file of such. Neither serves a
    program whose files hold other bytes under a key than those of a program that is loaded.

    BundleError: a data file is damaged.  RunError: a file is missing, the program is damaged, or it names what
    no data file holds.
    """
    files = _data_files(path, data)
    uses = share(files) if weight_cache else None
    before = resident_bytes()
    packed = str(packed_cache) if packed_cache is not None and uses is not None else ""
    try:
        with native_errors(path):
            native = _native.Program(
                str(path), [str(file) for file in data], activations, uses is not None, packed
            )
            native.load("forward")
            kv_bytes, constants = native.kv_bytes("forward"), native.constants()
    except BaseException:
        keep(uses or ())
        raise
    growth = max(0, resident_bytes() - before)
    try:
        limits = Limits(
            max_seq_len=int(constants["get_max_seq_len"][0]),
            max_logits_len=int(constants.get("get_max_logits_len", constants["get_max_seq_len"])[0]),
            max_context=int(constants["get_max_context_len"][0]),
        )
    except (KeyError, IndexError) as error:
        raise RunError("it does not say how long its input may be", where=path, hint=_HINT) from error
    return LoadedProgram(
        path=path,
        native=native,
        uses=uses,
        serial=serial,
        limits=limits,
        kv_bytes=kv_bytes,
        growth=growth,
    )


def _data_files(path: Path, data: list[Path]) -> list[DataFile]:
    """Every constant that the program names must be there before XNNPACK begins to pack: when it gives up half
    way, its weight cache never frees what the half-loaded program shares with others.
    """
    try:
        files = [DataFile.at(file) for file in data]
        held = frozenset[str]().union(*(file.keys for file in files))
        missing = program_keys(path) - held
    except OSError as error:
        what = f"it cannot be read: {error.strerror}"
        raise RunError(what, where=error.filename, hint=_HINTS["AccessFailed"]) from error
    if missing:
        what = f"no data file holds {len(missing)} of its constants, {min(missing)} among them"
        hint = f"{_HINT}; it was given {', '.join(map(str, data))}"
        raise RunError(what, where=path, hint=hint)
    return files


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
