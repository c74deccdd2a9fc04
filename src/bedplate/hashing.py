"""SHA-256 of bytes and of files.

OpenSSL, which `hashlib` loads, is fast for many bytes. For few, it takes longer to load than they take, and 3 MB.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from io import FileIO
from pathlib import Path

_CHUNK = 1 << 18  # of a file: what stays in a core's cache
_LONG_CHUNK = 1 << 22  # while another thread has the GIL, each chunk waits for it
_OWN = "_sha2" if sys.version_info >= (3, 12) else "_sha256"


def sha256_file(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return sha256_of(file, _LONG_CHUNK)


def sha256_of(file: FileIO, chunk_size: int | None = None) -> str:
    """Of an open file, from where it stands."""
    import hashlib

    digest, size = hashlib.sha256(), os.fstat(file.fileno()).st_size
    chunk = memoryview(bytearray(min(chunk_size or _CHUNK, size + 1)))
    while count := file.readinto(chunk):
        digest.update(chunk[:count])
    return digest.hexdigest()


def sha256_of_few(data: bytes) -> str:
    """Of less than a megabyte, without OpenSSL if this Python can do it itself."""
    try:
        module = import_module(_OWN)
    except ModuleNotFoundError:
        module = import_module("hashlib")
    digest: str = module.sha256(data).hexdigest()
    return digest
