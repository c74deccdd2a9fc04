"""What compiling made, on disk, by fingerprint: so that a structure is lowered once on a machine.

An entry is one safetensors file: a program, the constants that go with it, and facts about them as JSON. It appears
by rename, so builds that share a cache cannot damage it; whichever comes last writes the same bytes. A damaged entry
counts as absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from bedplate.constants import Constant

_SUFFIX = ".unit"
_DRAFT = ".draft-"


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
    """A folder of entries. `default()` is the user's cache folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def default(cls) -> UnitCache:
        return cls(Path(platformdirs.user_cache_dir("bedplate")) / "units")

    def load(self, kind: str, fingerprint: str) -> Entry | None:
        """The entry, or None if there is none or it is damaged."""
        path = self._path(kind, fingerprint)
        try:
            with safe_open(path, framework="np") as file:
                header = json.loads(file.metadata()["bedplate"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        if header["sha256"] != _digest(arrays):
            return None
        fixed = {
            name: Constant(**{**fields, "shape": tuple(fields["shape"])}, name=name, data=arrays[name])
            for name, fields in header["fixed"].items()
        }
        return Entry(program=arrays["program"].tobytes(), fixed=fixed, facts=header["facts"])

    def has(self, kind: str, fingerprint: str) -> bool:
        """Whether there is an entry, damaged or not."""
        return self._path(kind, fingerprint).exists()

    def store(self, kind: str, fingerprint: str, entry: Entry) -> None:
        """Write an entry: whole or not at all."""
        arrays = {name: constant.data for name, constant in entry.fixed.items()}
        arrays["program"] = np.frombuffer(entry.program, np.uint8)
        fixed = {
            name: {"key": c.key, "dtype": c.dtype, "shape": c.shape, "is_tensor": c.is_tensor}
            for name, c in entry.fixed.items()
        }
        header = json.dumps({"facts": entry.facts, "fixed": fixed, "sha256": _digest(arrays)}, sort_keys=True)
        data = save(arrays, {"bedplate": header})
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=_DRAFT, delete=False) as file:
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                Path(file.name).replace(self._path(kind, fingerprint))
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise

    def entries(self) -> list[EntryInfo]:
        """What is there, by name."""
        found = []
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            kind, _, fingerprint = path.stem.partition("-")
            size = path.stat().st_size
            found.append(EntryInfo(kind=kind, fingerprint=fingerprint, nbytes=size, path=path))
        return found

    def clear(self) -> int:
        """Remove all entries; return how many bytes that freed."""
        freed = 0
        drafts = self.folder.glob(f"{_DRAFT}*")  # of writers that were killed
        for path in [*drafts, *(entry.path for entry in self.entries())]:
            freed += path.stat().st_size
            path.unlink(missing_ok=True)
        return freed

    def _path(self, kind: str, fingerprint: str) -> Path:
        return self.folder / f"{kind}-{fingerprint}{_SUFFIX}"


def _digest(arrays: Mapping[str, NDArray[np.uint8]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + b"\0")
        digest.update(hashlib.sha256(arrays[name].data).digest())
    return digest.hexdigest()
