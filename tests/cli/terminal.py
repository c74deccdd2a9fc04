"""The command line in a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path

DRIVER = Path(__file__).with_name("slow_chat.py")
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|[\x01\x02\x07\r]")


class Terminal:
    """A process with a terminal of its own, 100 characters wide."""

    def __init__(self, args: Sequence[object], **env: str) -> None:
        self._fd, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, str(DRIVER), *map(str, args)],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env={**os.environ, "TERM": "xterm", **env},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(inner)
        self._seen = ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def until(self, text: str, *, seconds: float = 60) -> str:
        """What the terminal shows up to a text, without what was seen before."""
        end = time.monotonic() + seconds
        while text not in (shown := _ESCAPES.sub("", self._seen)):
            assert time.monotonic() < end, shown
            if select.select([self._fd], [], [], 0.1)[0]:
                self._seen += self._read()
        before, _, self._seen = shown.partition(text)
        return before + text

    def end(self, *, seconds: float = 60) -> int:
        """The exit code. What is still shown is in `rest`."""
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < end, self.rest
            if select.select([self._fd], [], [], 0.1)[0]:
                self._seen += self._read()
        while select.select([self._fd], [], [], 0)[0] and (data := self._read()):
            self._seen += data
        return self.process.returncode

    def _read(self) -> str:
        try:
            return os.read(self._fd, 65536).decode()
        except OSError:  # the other end is closed
            return ""

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._fd)

    @property
    def rest(self) -> str:
        return _ESCAPES.sub("", self._seen)
