"""SHA-256 of files."""

from __future__ import annotations

import hashlib
import os
from io import FileIO
from pathlib import Path

_CHUNK = 1 << 22  # long enough that a second thread rarely waits for the GIL


def sha256_file(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return sha256_of(file)


def sha256_of(file: FileIO) -> str:
    """Of an open file, from where it stands."""
    digest, size = hashlib.sha256(), os.fstat(file.fileno()).st_size
    chunk = memoryview(bytearray(min(_CHUNK, size + 1)))
    while count := file.readinto(chunk):
        digest.update(chunk[:count])
    return digest.hexdigest()
