"""A process beside the server that packs adapters. The server itself imports nothing that builds bundles."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from bedplate.errors import AdapterError

# -P: the folder that the server was started in has no part in what is imported.
_COMMAND = [sys.executable, "-P", "-m", "bedplate.assemble.packer"]
_NICE = 10  # answers come first


class Packing:
    """It starts the process when it is first needed, and again if it has ended. You can call it from any thread.

    seconds: that one adapter may take.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._lock = threading.Lock()

    def pack(self, bundle: Path, source: Path, name: str, staging: Path) -> None:
        """Pack an adapter as the only one of a bundle at `staging`, an empty folder: see `assemble.packer`.

        AdapterError: what is wrong with it.
        """
        request = {"bundle": str(bundle), "source": str(source), "name": name, "staging": str(staging)}
        with self._lock:
            try:
                answer = self._ask(request)
            except (OSError, ValueError, TimeoutError) as error:
                self._end()
                what = f"took more than {self._seconds:g} s" if isinstance(error, TimeoutError) else "failed"
                raise AdapterError(f"packing the adapter {what}", hint="try again") from error
        if answer:
            raise AdapterError(answer["what"], hint=answer["hint"])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._closed:
            raise ValueError("the server ends")
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._process = _started()
        process, until = self._process, time.monotonic() + self._seconds
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(request).encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise TimeoutError
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                raise ValueError("the process has ended")
            answer += piece
        found: dict[str, Any] = json.loads(answer)
        return found

    def close(self) -> None:
        """End the process. What is being packed fails, and nothing more is packed."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()
        with self._lock:
            self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


def _started() -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C is for the server. When that has gone, the process has no input, and ends.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(
        _COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        env=environment,
        start_new_session=True,
    )
    os.setpriority(os.PRIO_PROCESS, process.pid, _NICE)
    return process
