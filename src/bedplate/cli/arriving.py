"""Lines of a file that somebody may still write to: whoever reads them can ask whether the next one is there."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from typing import BinaryIO

_CHUNK = 1 << 16


class Arriving(Iterator[tuple[int, bytes]]):
    """The lines that are not empty, with their numbers.

    file: nobody else reads it.  handle: its handle. None: it has none.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._number = file, 0
        self._poll = select.poll()
        self.handle: int | None
        try:
            self.handle = file.fileno()
            self._poll.register(self.handle, select.POLLIN)
        except OSError:  # it is in memory
            self.handle = None
        self._lines: list[bytes] = []  # whole ones, the next is the last
        self._begun: list[bytes] = []  # pieces of a line that has no end yet
        self._ended = False

    @property
    def is_there(self) -> bool:
        """Whether the next line, or the end, can be read without waiting."""
        while not self._skip_empty() and not self._ended:
            if self.handle is not None and not self._poll.poll(0):
                return False
            self._read()
        return True

    def __next__(self) -> tuple[int, bytes]:
        while not self._skip_empty():
            if self._ended:
                raise StopIteration
            self._read()
        self._number += 1
        return self._number, self._lines.pop()

    def _skip_empty(self) -> bool:
        """Whether there is a line that is not empty."""
        while self._lines and not self._lines[-1].strip():
            self._lines.pop()
            self._number += 1
        return bool(self._lines)

    def _read(self) -> None:
        """The caller has taken all whole lines."""
        data = self._file.read(_CHUNK) if self.handle is None else os.read(self.handle, _CHUNK)
        *whole, rest = data.split(b"\n")
        if whole:
            whole[0] = b"".join([*self._begun, whole[0]])
            self._begun = []
        self._begun.append(rest)
        if not data:
            self._ended = True
            whole = [b"".join(self._begun)]
        self._lines = whole[::-1]
