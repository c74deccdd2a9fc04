"""A Ray of one machine that serves, asked by OpenAI's own client."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import openai

MESSAGES: list[Any] = [{"role": "user", "content": "the fox"}]
CONTEXT = 32768  # an answer takes seconds
START_SECONDS, END_SECONDS = 120, 60


class Node(NamedTuple):
    """process: all of Ray comes from it.  store: its folder of adapters.
    adapters: folders of PEFT.  expected: what an engine says.
    """

    process: subprocess.Popen[str]
    client: openai.OpenAI
    store: Path
    adapters: dict[str, Path]
    expected: Callable[[str | None, int], str]

    def ask(self, model: str, tokens: int = 6) -> tuple[str, str]:
        """Which replica answers, and what."""
        raw = self.client.chat.completions.with_raw_response.create(model=model, **wanted(tokens))
        return raw.headers["x-bedplate-replica"], raw.parse().choices[0].message.content or ""

    def put(self, source: str, name: str) -> None:
        """Put an adapter into the store, in one step."""
        shutil.copytree(self.adapters[source], self.store / ".new")
        if (self.store / name).exists():
            (self.store / name).rename(self.store / ".old")
        (self.store / ".new").rename(self.store / name)
        shutil.rmtree(self.store / ".old", ignore_errors=True)

    def replicas(self) -> list[int]:
        """Their processes."""
        parents: dict[int, int] = {}
        found: list[int] = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if (folder / "cmdline").read_bytes().startswith(b"ray::ServeReplica:bedplate:replicas"):
                    found.append(int(folder.name))
            except OSError:
                continue  # it has ended
        return [pid for pid in found if self.process.pid in _above(pid, parents)]

    def is_idle(self) -> bool:
        """None of its replicas computes, or starts."""
        try:
            before = {pid: ticks(pid) for pid in self.replicas()}
            time.sleep(0.5)
            return all(ticks(pid) - before[pid] < 15 for pid in before)
        except OSError:
            return False  # one has ended

    def busiest(self) -> int:
        """The process that computes most."""
        before = {pid: ticks(pid) for pid in self.replicas()}
        time.sleep(0.3)
        return max(before, key=lambda pid: ticks(pid) - before[pid])


def _above(pid: int, parents: dict[int, int]) -> Iterator[int]:
    while pid in parents:
        yield pid
        pid = parents[pid]


def ticks(pid: int) -> int:
    """Of the processor, that a process has used."""
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(stat[11]) + int(stat[12])


def wanted(tokens: int) -> dict[str, Any]:
    return {
        "messages": MESSAGES,
        "max_tokens": tokens,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }


def until(true: Callable[[], bool], seconds: float) -> float:
    """How long it took."""
    begun = time.monotonic()
    while not true():
        assert time.monotonic() < begun + seconds, "it takes too long"
        time.sleep(0.05)
    return time.monotonic() - begun


@contextmanager
def ray_running(folder: Path, port: int, options: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """A Ray that serves. When the block ends, so does all of it."""
    # Only whoever has the token may tell Ray's processes what to do, on all the ports that they listen at.
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, str(Path(__file__).with_name("ray_node.py")), str(port), json.dumps(options)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
            env={**os.environ, **own},
        )
    killer = threading.Timer(START_SECONDS, process.kill)  # which ends all that it has started
    killer.start()
    try:
        assert process.stdout is not None and process.stdin is not None
        while not (line := process.stdout.readline()).startswith('{"ready"'):
            assert line, (folder / "log").read_text()
        killer.cancel()
        yield process
        process.stdin.close()
        assert process.wait(END_SECONDS) == 0
    finally:
        killer.cancel()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
