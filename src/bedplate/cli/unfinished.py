"""An output that takes long: it grows in a file beside it, from which the next run goes on."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from rich.markup import escape

from bedplate.bundle import files
from bedplate.cli.output import json_line, stderr
from bedplate.errors import RunError

_DIGEST = 64  # characters, before each record


class Unfinished:
    """The file beside. found: digests and records that were there before, up to a line that was not written whole."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._ends = [0]
        self.found: list[tuple[str, dict[str, Any]]] = []
        for line in file:
            try:
                record = json.loads(line[_DIGEST:])
            except ValueError:
                break
            if not line.endswith(b"\n") or not isinstance(record, dict):
                break
            self.found.append((line[:_DIGEST].decode("latin-1"), record))
            self._ends.append(self._ends[-1] + len(line))
        self.cut(len(self.found))

    def cut(self, count: int) -> None:
        """Keep only so many of what was found."""
        del self.found[count:]
        self._file.seek(self._ends[count])
        self._file.truncate()

    def write(self, digest: str, record: dict[str, Any]) -> None:
        """Add a record. It stays, whatever ends this process."""
        # What UTF-8 cannot write (a path can hold it) is then an escape of JSON.
        self._file.write(digest.encode() + json_line(record).encode(errors="backslashreplace"))
        self._file.flush()

    def copy(self, output: Path) -> None:
        """Write the records alone, as a whole or not at all."""
        self._file.seek(0)
        with files.replacing(output) as whole:
            for line in self._file:
                whole.write(line[_DIGEST:])

    def is_empty(self) -> bool:
        return os.fstat(self._file.fileno()).st_size == 0


@contextmanager
def unfinished(output: Path) -> Iterator[Unfinished]:
    """The unfinished output, which becomes `output` when the block ends without an error. RunError: another process
    writes it, or `output` is no place for a file.
    """
    output = output.resolve()
    if output.exists() and not output.is_file():
        raise RunError("it is not a file", where=output, hint="name a file, or leave --output out for stdout")
    part = output.with_name(f"{output.name}.part")
    with files.naming(part), part.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = files.is_at(file.fileno(), part)  # else a run has ended just now
        except BlockingIOError:
            is_free = False
        if not is_free:
            hint = "wait until it has ended, or name another file"
            raise RunError("another run writes this output", where=output, hint=hint)
        file.seek(0)
        found = Unfinished(file)
        try:
            yield found
            found.copy(output)
        except BaseException:
            if not found.is_empty():
                note = f"the answers so far are in {part}: the same command goes on from there"
                stderr.print(f"[bold yellow]note:[/] {escape(note)}")
            else:
                part.unlink()
            raise
        part.unlink()
