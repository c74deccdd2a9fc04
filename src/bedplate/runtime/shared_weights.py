"""Which data files the programs of this process share packed weights of, so that a key means one thing to all of them.

XNNPACK's cache of packed weights serves the whole process and goes by key alone: if two files hold different bytes
under one key, whoever is loaded second would compute with the weights of the first. So before a program joins the
cache, its files are compared with those in use that hold some of the same keys.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from bedplate.bundle.ptd import Entry, read_ptd

_BLOCK = 1 << 20

Version = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A data file as it was when it was opened: a file that has changed since is another one."""

    path: Path
    version: Version

    @classmethod
    def at(cls, path: Path) -> DataFile:
        """Raises OSError."""
        return cls(path=path, version=_version(path.stat()))

    @property
    def keys(self) -> frozenset[str]:
        """BundleError: it is damaged.  NotFoundError: it is not there."""
        return _keys(self)


class Use:
    """Held by a program as long as its weights may be in the cache."""

    def __init__(self, file: DataFile) -> None:
        self.file = file
        self.keys = file.keys


_uses: weakref.WeakSet[Use] = weakref.WeakSet()
_kept: set[Use] = set()
_lock = threading.Lock()


def share(files: Sequence[DataFile]) -> tuple[Use, ...] | None:
    """Uses of files whose weights may go to the cache; None: one holds other bytes under a key that is in use.

    BundleError: a file is damaged.
    """
    uses = tuple(Use(file) for file in files)
    with _lock:
        in_use = {use.file: use.keys for use in [*_uses, *_kept]}
        for use in uses:
            for other, keys in in_use.items():
                if other.version != use.file.version and not _agree(use, other, keys):
                    return None
        _uses.update(uses)
    return uses


def keep(uses: Sequence[Use]) -> None:
    """What a load that failed has packed stays in the cache for good."""
    _kept.update(uses)


def _agree(use: Use, other: DataFile, keys: frozenset[str]) -> bool:
    return use.keys.isdisjoint(keys) or _equal(use.file, other)


@functools.lru_cache(maxsize=256)
def _equal(one: DataFile, other: DataFile) -> bool:
    """Whether both hold the same bytes under each key that both hold. False as well if one is no longer there."""
    try:
        with one.path.open("rb") as first, other.path.open("rb") as second:
            held, theirs = _entries(one), _entries(other)
            equal = all(
                _same_bytes(first, held[key], second, theirs[key]) for key in held.keys() & theirs.keys()
            )
            return equal and all(
                _version(os.fstat(file.fileno())) == data.version
                for file, data in ((first, one), (second, other))
            )
    except OSError:
        return False


def _same_bytes(first: BinaryIO, one: Entry, second: BinaryIO, other: Entry) -> bool:
    return one[2:] == other[2:] and all(
        a == b for a, b in zip(_blocks(first, one), _blocks(second, other), strict=True)
    )


def _blocks(file: BinaryIO, entry: Entry) -> Iterator[bytes]:
    for start in range(0, entry.nbytes, _BLOCK):
        yield os.pread(file.fileno(), min(_BLOCK, entry.nbytes - start), entry.offset + start)


@functools.lru_cache(maxsize=64)  # the foundation's, at every load of an adapter
def _keys(file: DataFile) -> frozenset[str]:
    return frozenset(_entries(file))


def _entries(file: DataFile) -> Mapping[str, Entry]:
    return read_ptd(file.path).entries


def _version(status: os.stat_result) -> Version:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
