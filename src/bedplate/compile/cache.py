"""Compiled units on disk, by fingerprint. So a structure is lowered only once on a machine.

An entry is one file: 64 hex characters, which are the SHA-256 of all that follows; a line of JSON; and the bytes that
it describes, a program and the constants that go with it. It appears by rename, so builds that share a cache cannot
damage it. The last one writes the same bytes again. A damaged entry counts as absent.

If the cache cannot be read or written, the caller gets a notice and compiles again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

from bedplate.constants import Constant

_SUFFIX = ".unit"
_DRAFT = ".draft-"
_DIGEST_LENGTH = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """program: the bytes of a `.pte`. fixed: constants by symbol. facts: whatever the writer wants to keep (JSON)."""

    program: bytes
    fixed: Mapping[str, Constant]
    facts: Any


@dataclass(frozen=True, kw_only=True)
class EntryInfo:
    kind: str
    fingerprint: str
    nbytes: int
    path: Path


class UnitCache:
    """A folder of entries. None: there is no place for a folder, so nothing is kept.

    notice: called once, if an entry cannot be kept.
    """

    def __init__(self, folder: Path | None, *, notice: Callable[[str], None] = lambda text: None) -> None:
        self.folder = folder
        self._notice = notice
        self._told = False

    @classmethod
    def default(cls, *, notice: Callable[[str], None] = lambda text: None) -> UnitCache:
        """The user's cache folder, if the user has one."""
        folder = Path(platformdirs.user_cache_dir("bedplate")) / "units"
        # A user without a home would get a folder named `~` wherever the command runs.
        return cls(folder if folder.is_absolute() else None, notice=notice)

    def load(self, kind: str, fingerprint: str) -> Entry | None:
        """The entry, or None if there is none, or it is damaged or cannot be read."""
        path = self._path(kind, fingerprint)
        if path is None:
            return None
        try:
            return _decode(path.read_bytes(), kind, fingerprint)
        except OSError:
            return None

    def has(self, kind: str, fingerprint: str) -> bool:
        """Whether there is an entry, damaged or not."""
        path = self._path(kind, fingerprint)
        try:
            return path is not None and path.exists()
        except OSError:
            return False

    def store(self, kind: str, fingerprint: str, entry: Entry) -> None:
        """Write an entry, completely or not at all. If this is not possible, there is a notice and no error."""
        path = self._path(kind, fingerprint)
        if path is None:
            self._tell("this user has no home folder")
            return
        try:
            _write(path, _encode(entry, kind, fingerprint))
        except OSError as error:
            self._tell(f"{path}: {error.strerror}")

    def _tell(self, why: str) -> None:
        if not self._told:
            self._notice(f"compiled units are not kept, so the next command compiles again: {why}")
        self._told = True

    def entries(self) -> list[EntryInfo]:
        """All entries, by name."""
        found = []
        for path in sorted(self._glob(f"*{_SUFFIX}")):
            kind, _, fingerprint = path.stem.partition("-")
            with contextlib.suppress(FileNotFoundError):  # removed by another command just now
                size = path.stat().st_size
                found.append(EntryInfo(kind=kind, fingerprint=fingerprint, nbytes=size, path=path))
        return found

    def clear(self) -> int:
        """Remove all entries. Returns how many bytes this freed. OSError: one cannot be removed."""
        freed = 0
        drafts = self._glob(f"{_DRAFT}*")  # of writers that were killed
        for path in [*drafts, *(entry.path for entry in self.entries())]:
            with contextlib.suppress(FileNotFoundError):
                size = path.stat().st_size
                path.unlink()
                freed += size
        return freed

    def _glob(self, pattern: str) -> list[Path]:
        return [] if self.folder is None else list(self.folder.glob(pattern))

    def _path(self, kind: str, fingerprint: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{kind}-{fingerprint}{_SUFFIX}"


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=_DRAFT, delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _encode(entry: Entry, kind: str, fingerprint: str) -> bytes:
    fixed = [entry.fixed[symbol] for symbol in sorted(entry.fixed)]
    header = {
        "kind": kind,
        "fingerprint": fingerprint,
        "facts": entry.facts,
        "program": len(entry.program),
        "fixed": [
            {
                "key": c.key,
                "name": c.name,
                "dtype": c.dtype,
                "shape": c.shape,
                "layout": c.layout,
                "nbytes": c.nbytes,
            }
            for c in fixed
        ],
    }
    line = json.dumps(header, sort_keys=True).encode() + b"\n"
    content = b"".join([line, entry.program, *(constant.data.tobytes() for constant in fixed)])
    return hashlib.sha256(content).hexdigest().encode() + content


def _decode(data: bytes, kind: str, fingerprint: str) -> Entry | None:
    """What `_encode` was given; None: it is something else, or of another name."""
    content = memoryview(data)[_DIGEST_LENGTH:]
    if data[:_DIGEST_LENGTH] != hashlib.sha256(content).hexdigest().encode():
        return None
    try:
        start = data.index(b"\n", _DIGEST_LENGTH) + 1 - _DIGEST_LENGTH
        header = json.loads(bytes(content[:start]))
        if (header["kind"], header["fingerprint"]) != (kind, fingerprint):
            return None
        program = bytes(content[start : start + header["program"]])
        start += len(program)
        fixed = {}
        for fields in header["fixed"]:
            nbytes, shape = fields.pop("nbytes"), tuple(fields.pop("shape"))
            values = np.frombuffer(content[start : start + nbytes], np.uint8)
            fixed[fields["name"]] = Constant(**fields, shape=shape, data=values)
            start += nbytes
        entry = Entry(program=program, fixed=fixed, facts=header["facts"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return entry if start == len(content) else None
