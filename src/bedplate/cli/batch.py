"""Many prompts at once: JSON lines in, JSON lines out, in the same order."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bedplate.bundle import files
from bedplate.cli.arriving import Arriving
from bedplate.cli.output import print_json_line, stderr, stdout
from bedplate.cli.reading import standard_input
from bedplate.cli.requests import Answer, Defaults, Request, answered, checked, json_object
from bedplate.cli.unfinished import Unfinished, unfinished
from bedplate.errors import BedplateError, RunError
from bedplate.runtime import arguments

if TYPE_CHECKING:
    from bedplate.runtime.engine import Engine


class _Line(NamedTuple):
    """A line of the input. id: its own, or its number in the file."""

    id: str | int
    where: str
    data: bytes
    request: Request | BedplateError


class _Count:
    """What has been done. show: gets how many lines that are."""

    def __init__(self, show: Callable[[int], None]) -> None:
        self.lines = self.kept = self.wrong = self.tokens = 0
        self._show, self._start = show, time.perf_counter()

    def add(self, record: dict[str, Any], *, kept: bool = False) -> None:
        self.lines += 1
        self.kept += kept
        self.wrong += "error" in record
        self.tokens += 0 if kept else record.get("generated_tokens", 0)
        self._show(self.lines)

    def print(self) -> None:
        seconds = time.perf_counter() - self._start
        kept = f", {self.kept} of them before" if self.kept else ""
        speed = f"{self.tokens / seconds:,.0f} tokens/s"
        stderr.print(f"{self.lines} lines{kept}, {self.tokens:,} tokens in {seconds:.1f} s, {speed}")


def run_file(
    engine: Engine, file: str, output: Path | None, defaults: Defaults, *, parallel: int, key: bytes
) -> None:
    """Answer the lines of a file (`-`: of stdin), so many at a time.

    output: None: stdout.  key: what the answers depend on beside the lines. The answers of a run that was interrupted
    count for the same lines with the same key.
    RunError: a line has no answer. All others have theirs.
    """
    arguments.integer("parallel", parallel, least=1)
    checked(defaults.generation)
    shown = output is not None or not stdout.is_terminal
    with _opened(file) as arriving, _counted(file, shown=shown) as count:
        lines = _lines(file, arriving, defaults)
        answer = functools.partial(_records, engine, parallel=parallel, is_there=lambda: arriving.is_there)
        if output is None:
            for _, record in answer(lines):
                count.add(record)
                print_json_line(record)
        else:
            _check_other(output, arriving)
            with unfinished(output) as part:
                digest = functools.partial(_digest, hashlib.sha256(key).digest())
                rest = _without_kept(part, lines, digest, count)
                for line, record in answer(rest):
                    count.add(record)
                    part.write(digest(line), record)
    count.print()
    if count.wrong:
        what = f"{count.wrong} of {count.lines} lines have no answer"
        raise RunError(what, where=file, hint='the field "error" of their records says why')


@contextmanager
def _opened(file: str) -> Iterator[Arriving]:
    if file == "-":
        yield Arriving(standard_input())
    else:
        with Path(file).open("rb") as opened:
            yield Arriving(opened)


def _check_other(output: Path, lines: Arriving) -> None:
    """RunError: the answers would take the place of the prompts."""
    if lines.handle is not None and files.is_at(lines.handle, output):
        raise RunError("it is the file of the prompts", where=output, hint="name another file")


def _lines(file: str, numbered: Iterator[tuple[int, bytes]], defaults: Defaults) -> Iterator[_Line]:
    name = "stdin" if file == "-" else file
    for number, data in numbered:
        id: str | int = number
        request: Request | BedplateError
        try:
            fields = json_object(data)
            if fields.get("id") is not None:
                id = _id(fields["id"])
            request = defaults.request(fields)
        except BedplateError as error:
            request = error
        yield _Line(id, f"{name}:{number}", data, request)


def _id(value: Any) -> str | int:
    hint = "give text or a whole number"
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise RunError(f"id is {arguments.shown(value)}", hint=hint)
    return arguments.text("id", value) if isinstance(value, str) else value


def _without_kept(
    part: Unfinished, lines: Iterator[_Line], digest: Callable[[_Line], str], count: _Count
) -> Iterator[_Line]:
    """The lines whose answers are not there yet. From the first line that is another one, no answer counts."""
    for at, (known, record) in enumerate(part.found):
        line = next(lines, None)
        if line is None or digest(line) != known:
            part.cut(at)
            return chain([] if line is None else [line], lines)
        count.add(record, kept=True)
    return lines


def _digest(key: bytes, line: _Line) -> str:
    return hashlib.sha256(repr((key, line.where, line.data)).encode()).hexdigest()


def _records(
    engine: Engine, lines: Iterator[_Line], *, parallel: int, is_there: Callable[[], bool]
) -> Iterator[tuple[_Line, dict[str, Any]]]:
    """The record of each line, in the order of the lines. is_there: whether the next line is."""
    open_lines: dict[int, _Line] = {}

    def requests() -> Iterator[Request | BedplateError]:
        for at, line in enumerate(lines):
            open_lines[at] = line
            yield line.request

    ready: dict[int, tuple[_Line, dict[str, Any]]] = {}  # not the answers, whose sessions take memory
    following = 0
    for at, answer in answered(engine, requests(), parallel, is_there=is_there):
        line = open_lines.pop(at)
        ready[at] = line, _record(line, answer)
        while following in ready:
            yield ready.pop(following)
            following += 1


def _record(line: _Line, answer: Answer) -> dict[str, Any]:
    if answer.error is not None:
        error = answer.error
        where = line.where if error.where is None else f"{line.where}: {error.where}"
        return {"id": line.id, "error": {"what": error.what, "where": where, "hint": error.hint}}
    assert isinstance(answer.request, Request) and answer.session is not None, "it has no error"
    stats = answer.session.last
    assert stats is not None, "it has ended"
    return {
        "id": line.id,
        "text": answer.text,
        "finish_reason": stats.finish_reason,
        "prompt_tokens": stats.prompt_tokens,
        "generated_tokens": stats.generated_tokens,
        "adapter": answer.request.adapter,
        "scale": answer.request.scale,
        "seed": stats.seed,
    }


@contextmanager
def _counted(file: str, *, shown: bool) -> Iterator[_Count]:
    """Counts, with a bar on a terminal. shown: whether it has the terminal for itself."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns,
        console=stderr,
        transient=True,
        disable=not (shown and stderr.is_terminal),
        redirect_stdout=False,  # it is data, and stays where it goes
    ) as bar:
        is_known = not bar.disable and file != "-" and Path(file).is_file()  # a pipe can be read once only
        total = None
        if is_known:
            with _opened(file) as lines:
                total = sum(1 for _ in lines)
        task = bar.add_task("answers", total=total)
        yield _Count(lambda lines: bar.update(task, completed=lines))
