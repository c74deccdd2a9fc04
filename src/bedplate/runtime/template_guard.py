"""Chat templates that are rendered in processes of their own, so that none can take all time or memory."""

from __future__ import annotations

import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import Any, NamedTuple

from bedplate.errors import RunError
from bedplate.runtime.process import Process

SECONDS = 2.0  # of a processor, for one text
_PATIENCE = 5 * SECONDS  # the machine may have other work
_PAUSE = 10.0  # seconds in which a template that took too long is not tried again
_MOST_BYTES = 256 << 20  # of an answer: no character of a text takes more than 12
_MODULE = "bedplate.runtime.template_process"
_HINT = "mend the template of the model, and build the bundle again"


class Templates:
    """A few processes, which start when they are needed. You can call it from any thread.

    seconds: of a processor, that a template may take for one text.
    """

    def __init__(self, *, seconds: float = SECONDS, processes: int = 2) -> None:
        self._idle: queue.LifoQueue[_Process] = queue.LifoQueue()
        self._count, self._own = processes, Process()
        for _ in range(processes):
            self._idle.put(_Process(seconds))

    def ask(self, source: str, values: Mapping[str, Any] | None) -> Any:
        """See `template_process`. RunError: the template is malformed, fails, or takes too much.

        BusyError: others take all processes.
        """
        self._own.check()  # the pipes are those of the process that was forked, which would read what is answered here
        try:
            process = self._idle.get(timeout=_PATIENCE)
        except queue.Empty:
            raise BusyError("other chat templates take all the time", hint="try again later") from None
        try:
            said = process.ask(pickle.dumps((source, values)))
        finally:
            self._idle.put(process)
        if "what" in said:
            raise RunError(said["what"], hint=said["hint"])
        return said

    def close(self) -> None:
        """End the processes, when they have nothing to do. Those that are needed again start again."""
        taken = [self._idle.get() for _ in range(self._count)]
        for one in taken:
            one.end()
            self._idle.put(one)


class GuardedTemplate:
    """As `ChatTemplate`. RunError: the template is malformed."""

    def __init__(self, source: str, templates: Templates) -> None:
        self.source, self._templates = source, templates
        self._again = 0.0  # when it may be tried
        self.names: set[str] = set(self._ask(None)["names"])

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, special_tokens: Mapping[str, str], **values: Any
    ) -> str:
        """See `ChatTemplate.render`. RunError: it also takes too much time or memory, or did so a moment ago."""
        text: str = self._ask({"messages": messages, "special_tokens": dict(special_tokens), **values})[
            "text"
        ]
        return text

    def _ask(self, values: Mapping[str, Any] | None) -> Any:
        if time.monotonic() < self._again:
            raise TooMuchError("the chat template took too much time or memory a moment ago", hint=_HINT)
        try:
            return self._templates.ask(self.source, values)
        except TooMuchError:
            self._again = time.monotonic() + _PAUSE
            raise


class BusyError(RunError):
    """Other templates take all the time. In a moment it can be otherwise."""


class TooMuchError(RunError):
    """A template took too much time or memory."""


class _Process:
    """One process. One thread uses it at a time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._running: _Running | None = None

    def ask(self, asked: bytes) -> Any:
        running = self._running
        if running is None:
            running = self._running = _start(self._seconds)
            weakref.finalize(self, _end, running)
        late = False
        try:
            running.connection.send_bytes(asked)
            if running.connection.poll(_PATIENCE):
                return json.loads(running.connection.recv_bytes(_MOST_BYTES))
            late = True
        except (OSError, EOFError, ValueError):
            with suppress(subprocess.TimeoutExpired):
                running.process.wait(1)  # it is about to end
        self.end()
        if late or running.process.returncode == -signal.SIGPROF:
            what = f"the chat template takes more than {self._seconds:g} seconds for a text"
        else:
            what = "the chat template takes too much memory, or ends its process"
        raise TooMuchError(what, hint=_HINT)

    def end(self) -> None:
        if self._running is not None:
            _end(self._running)
            self._running = None


class _Running(NamedTuple):
    process: subprocess.Popen[bytes]
    connection: Connection


def _start(seconds: float) -> _Running:
    own, other = Pipe()
    with other:
        # It knows no secrets of this process, and Ctrl-C is not for it.
        environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "LC_ALL": "C.UTF-8"}
        if (zone := os.environ.get("TZ")) is not None:
            environment["TZ"] = zone
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", _MODULE, str(other.fileno()), str(seconds)],
            pass_fds=[other.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    return _Running(process, own)


def _end(running: _Running) -> None:
    """It may have ended. In a process that was forked it is no child, and goes on."""
    running.connection.close()
    if running.process.poll() is None:
        running.process.kill()
        running.process.wait()
