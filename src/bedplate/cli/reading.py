"""Text that comes in: from stdin and from the command line. What cannot be read as text is refused in words."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from typing import BinaryIO

from bedplate.errors import RunError
from bedplate.runtime import arguments

_BOM = "\N{BYTE ORDER MARK}"


def standard_input() -> BinaryIO:
    """Stdin as bytes. RunError: it is closed."""
    if sys.stdin is None:
        raise RunError("stdin is closed", hint="do not close stdin, or give the prompt with -p")
    return sys.stdin.buffer


def decode(data: bytes) -> str:
    """Text from stdin, without a byte order mark, each line ended by a line feed.

    RunError: it is not text in the encoding of stdin, which is UTF-8 nearly everywhere.
    """
    try:
        text = data.decode(sys.stdin.encoding)
    except UnicodeDecodeError as error:
        what = f"the input is not text in {error.encoding.upper()} (byte {error.start})"
        raise RunError(what, where="stdin", hint="give text in that encoding") from None
    return io.StringIO(text.removeprefix(_BOM), newline=None).read()


def check_texts(options: Mapping[str, str | list[str] | None]) -> None:
    """RunError: an option of the command line holds bytes that are no text."""
    for name, value in options.items():
        for text in [value] if isinstance(value, str) else value or ():
            arguments.text(name, text)
