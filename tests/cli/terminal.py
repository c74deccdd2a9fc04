"""The command line in a terminal."""

from __future__ import annotations

import codecs
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
from collections.abc import Callable, Sequence
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
        self._seen, self._decoder = "", codecs.getincrementaldecoder("utf-8")("replace")

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def until(self, text: str, asking: str = "") -> str:
        """What the terminal shows up to a text, without what was seen before. asking: what is typed for it."""
        self._wait(lambda: text in self.rest, asking)
        before, _, self._seen = self.rest.partition(text)
        return before + text

    def end(self, asking: str = "") -> int:
        """The exit code. What is still shown is in `rest`. asking: what is typed for it."""
        self._wait(lambda: self.process.poll() is not None, asking)
        while self._read(0):
            pass
        return self.process.returncode

    def _wait(self, there: Callable[[], bool], asking: str = "") -> None:
        """asking is typed, and again when nothing comes of it for long: readline forgets a signal that comes between
        what it shows and its waiting for a key.
        """
        self.type(asking)
        silent = 0  # not a time: a machine may stop this process for a while
        while not there():
            if self._read(0.1):
                continue
            silent += 1
            assert silent < 600, self.rest
            if silent % 100 == 0:
                self.type(asking)

    def _read(self, seconds: float) -> bool:
        """Whether something was shown."""
        if not select.select([self._fd], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # the other end is closed
            time.sleep(seconds)
            return False
        self._seen += self._decoder.decode(data)
        return bool(data)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._fd)

    @property
    def rest(self) -> str:
        return _ESCAPES.sub("", self._seen)
