"""Lines that a user types: with editing and a history on a terminal, plainly from elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import platformdirs
from rich.markup import escape

from bedplate.cli.output import stderr
from bedplate.cli.reading import decode, standard_input
from bedplate.errors import RunError

_FEWEST = 1000  # entries that a history keeps when it has become twice as long


class Lines(Protocol):
    """interactive: a person types them.  complete: gives what the beginning of a line can become, for the Tab key."""

    interactive: bool
    complete: Callable[[str], list[str]]

    def read(self, prompt: str) -> str:
        """The next line. EOFError: there is none.  RunError: it is not text.  KeyboardInterrupt: Ctrl-C on an empty
        line.
        """

    def remember(self, text: str) -> None:
        """Put a text into the history."""


def terminal_or_stdin(*, keep_history: bool) -> Lines:
    """RunError: stdin is closed."""
    standard_input()
    if sys.stdin.isatty() and sys.stdout is not None and sys.stdout.isatty():
        with contextlib.suppress(ImportError):  # a Python can be without it
            return _Edited(keep_history)
    return _Plain()


class _Plain:
    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty()
        self.complete: Callable[[str], list[str]] = lambda text: []

    def read(self, prompt: str) -> str:
        if self.interactive:
            stderr.print(f"[bold]{escape(prompt)}[/] ", end="")
        data = standard_input().readline()
        if not data:
            raise EOFError
        return decode(data).rstrip("\n")

    def remember(self, text: str) -> None:
        pass


class _Edited:
    interactive = True

    def __init__(self, keep_history: bool) -> None:
        import readline

        self._readline: Any = readline
        self.complete: Callable[[str], list[str]] = lambda text: []
        self._history = _History.of_user() if keep_history else None
        for text in [] if self._history is None else self._history.texts():
            self._add(text)
        readline.set_auto_history(False)  # a text can have several lines
        readline.set_completer_delims(" ")
        readline.set_completer(self._completion)
        if "libedit" in (readline.__doc__ or ""):
            readline.parse_and_bind("bind ^I rl_complete")
        else:
            readline.parse_and_bind("tab: complete")
            readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one text

    def read(self, prompt: str) -> str:
        while True:
            try:
                # Between \1 and \2: what takes no room on the screen.
                return input(f"\1\x1b[1m\2{prompt}\1\x1b[0m\2 ")
            except UnicodeDecodeError as error:
                what = f"the line is not text in {error.encoding.upper()}"
                raise RunError(what, where="stdin", hint="give text in that encoding") from None
            except KeyboardInterrupt:
                sys.stdout.write("\n")
                if not self._readline.get_line_buffer():
                    raise
            except EOFError:
                sys.stdout.write("\n")
                raise

    def remember(self, text: str) -> None:
        self._add(text)
        if self._history is not None:
            self._history.add(text)

    def _add(self, text: str) -> None:
        with contextlib.suppress(ValueError):  # readline cannot show it
            self._readline.add_history(text)

    def _completion(self, word: str, at: int) -> str | None:
        begin = self._readline.get_line_buffer()[: self._readline.get_endidx()]
        found = self.complete(begin)
        return found[at] if at < len(found) else None


class _History:
    """The texts of earlier chats, in a file that only its user can read: a line of JSON for each."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @classmethod
    def of_user(cls) -> _History | None:
        """None: the user has no folder for it, or it cannot be written."""
        folder = Path(platformdirs.user_state_dir("bedplate"))
        if not folder.is_absolute():
            return None
        history = cls(folder / "chat_history")
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            history._shorten()
        except OSError as error:
            stderr.print(f"[bold yellow]note:[/] no history: {escape(str(error))}")
            return None
        return history

    def texts(self) -> list[str]:
        found = []
        for line in self._path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                text = json.loads(line)
                if isinstance(text, str):
                    found.append(text)
        return found

    def add(self, text: str) -> None:
        with contextlib.suppress(OSError), self._open("ab") as file:
            file.write(json.dumps(text).encode() + b"\n")

    def _shorten(self) -> None:
        with self._open("a+b") as file:
            file.seek(0)
            lines = file.readlines()
            if len(lines) > 2 * _FEWEST:
                file.truncate(0)
                file.writelines(lines[-_FEWEST:])

    def _open(self, mode: str) -> Any:
        def opener(path: str, flags: int) -> int:
            handle = os.open(path, flags, 0o600)
            os.fchmod(handle, 0o600)  # also where it was made by other hands
            return handle

        return open(self._path, mode, opener=opener)
