"""What goes where: data on stdout, progress and errors on stderr; an error ends with its hint and exit code 2."""

from __future__ import annotations

import codecs
import dataclasses
import errno
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from bedplate.errors import BedplateError

stderr = Console(stderr=True, highlight=False, soft_wrap=True)
stdout = Console(highlight=False, soft_wrap=True)  # never cut: whoever reads it gets all of it

_HINTS = {
    errno.ENOSPC: "free some space, or choose a folder on another disk",
    errno.EDQUOT: "free some space, or choose a folder on another disk",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "check who has permission to read and write there",
    errno.EPERM: "check who has permission to read and write there",
}


def prepare_output() -> None:
    """Make stdout and stderr take any text: what one of them cannot show, it shows as an escape (`\\xe9`)."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started this process
            setattr(sys, name, io.TextIOWrapper(io.FileIO(os.devnull, "w"), encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def reported_errors() -> Iterator[None]:
    """Print what a user can mend in words and end with exit code 2; Ctrl-C ends with 130, a closed pipe in silence."""
    try:
        yield
    except BedplateError as error:
        print_error(error)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        stderr.print("interrupted")
        raise SystemExit(130) from None
    except BrokenPipeError:
        _abandon_stdout()  # the reader (`head`, say) has gone
        raise SystemExit(0) from None
    except OSError as error:
        _abandon_stdout()
        hint = _HINTS.get(error.errno or 0, "check the path and the disk")
        print_error(BedplateError(error.strerror or str(error), where=error.filename, hint=hint))
        raise SystemExit(2) from None


def _abandon_stdout() -> None:
    # What did not get out now must not be tried again by Python at exit, in words of its own.
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_error(error: BedplateError) -> None:
    """What went wrong, where, and what to do, on stderr."""
    where = f"{error.where}: " if error.where else ""
    stderr.print(f"[bold red]error:[/] {escape(where + error.what)}")
    if error.hint:
        stderr.print(f"[bold]hint:[/] {escape(error.hint)}")


class Bars:
    """A `Reporter`: a bar for each stage, on stderr; where there is no terminal, a line for each."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def progress(self, stage: str, done: int, total: int | None) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
            if self._bars.disable:
                stderr.print(f"{stage} …")
        self._bars.update(self._tasks[stage], completed=done, total=total)

    def notice(self, text: str) -> None:
        stderr.print(f"[bold yellow]note:[/] {escape(text)}")


@contextmanager
def progress_bars() -> Iterator[Bars]:
    """Bars that are gone when all is done."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bars:
        yield Bars(bars)


def show_prefill(done: int, total: int) -> None:
    """How much of a long prompt is read, in a line of a terminal that the answer then takes over."""
    if stderr.is_terminal:
        stderr.print(
            f"[dim]reading the prompt: {done} of {total} tokens[/]", end="\r" if done < total else "\r\x1b[K"
        )


def print_json(data: Any) -> None:
    """Data for a script: one JSON document on stdout, all of it ASCII where stdout is not UTF-8."""
    sys.stdout.write(json.dumps(data, indent=2, default=_as_json, ensure_ascii=not _shows_all()) + "\n")


def print_json_line(data: dict[str, Any]) -> None:
    """One of many JSON documents on stdout: a line, at once."""
    sys.stdout.write(json_line(data, ensure_ascii=not _shows_all()))
    sys.stdout.flush()


def json_line(data: dict[str, Any], *, ensure_ascii: bool = False) -> str:
    return json.dumps(data, ensure_ascii=ensure_ascii, allow_nan=False) + "\n"


def _shows_all() -> bool:
    return codecs.lookup(sys.stdout.encoding or "ascii").name == "utf-8"


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table for people, on stdout; columns of numbers (named with a leading `>`) to the right."""
    head = [column.lstrip(">") for column in columns]
    widths = [max(map(len, cells)) for cells in zip(head, *rows, strict=True)]
    stdout.print(f"[bold]{escape(title)}[/]")
    for row in (head, *rows):
        cells = [
            cell.rjust(width) if column.startswith(">") else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        ]
        stdout.print("  ".join(cells).rstrip(), markup=False)


def size(nbytes: int) -> str:
    """Bytes as people read them."""
    return f"{nbytes:,} B" if nbytes < 1_000_000 else f"{nbytes / 1e6:,.1f} MB"


def _as_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(type(value))
