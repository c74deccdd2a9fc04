"""`bedplate serve` as a process: what it needs to start, what it writes, and how it ends."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from raw import ask, chat, open_request, wait_until

import bedplate
from bedplate.serve.process import listen
from bedplate.serve.settings import Settings

MARK = "zanzibar"  # stands in prompts, and must stand in no log
# Steps take longer, so that a signal comes in the midst of an answer. Answers with logprobs fail.
SLOW = """
import sys, time
from bedplate.runtime.scheduler import Scheduler
from bedplate.serve.answers import Choice
step, finish = Scheduler._step, Choice.finish.fget
def slow(self):
    time.sleep(0.03)
    step(self)
Scheduler._step = slow
def failing(choice):
    if choice.options["logprobs"] is not None:
        raise ValueError(choice.text + "zanzi" + "bar")
    return finish(choice)
Choice.finish = property(failing)
from bedplate.cli.main import main
main()
"""


class Started:
    """A server in a process. stderr: a file of what it writes there."""

    def __init__(self, process: subprocess.Popen[bytes], stderr: Path) -> None:
        self.process, self.stderr = process, stderr
        self.address = ""

    @property
    def said(self) -> str:
        return self.stderr.read_text()


@contextmanager
def started(bundle: bedplate.Bundle, folder: Path, *options: str) -> Iterator[Started]:
    stderr = folder / "stderr"
    command = [
        sys.executable,
        "-c",
        SLOW,
        "serve",
        str(bundle.path),
        "--port",
        "0",
        "--threads",
        "1",
        *options,
    ]
    with stderr.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            one = Started(process, stderr)
            wait_until(lambda: "serving" in one.said or process.poll() is not None, seconds=60)
            found = re.search(r"serving (http://\S+): toy, all", one.said)
            assert found is not None, one.said
            one.address = found[1]
            yield one
        finally:
            process.kill()


def test_it_drains_and_exits_with_0(toy_bundle: bedplate.Bundle, tmp_path: Path) -> None:
    with started(toy_bundle, tmp_path) as one, ThreadPoolExecutor(2) as threads:
        long = [
            threads.submit(ask, one.address, chat(max_tokens=30, ignore_eos=True, stream=stream))
            for stream in (False, True)
        ]
        kept = open_request(one.address, chat(max_tokens=40, ignore_eos=True, stream=True))
        assert kept.recv(100)
        one.process.send_signal(signal.SIGTERM)

        def stops() -> bool:
            said = ask(one.address, chat(max_tokens=1))
            return said.status == 503 and said.error["code"] == "stopping" and "retry-after" in said.headers

        wait_until(stops)
        assert long[0].result().body["usage"]["completion_tokens"] == 30
        assert long[1].result().body.endswith(b"[DONE]\n\n")
        said = b""
        while piece := kept.recv(65536):
            said += piece
        assert b"[DONE]" in said
        kept.close()
        assert one.process.wait(20) == 0
        assert one.said.count("\n") == 1, one.said


def test_it_waits_so_long_and_no_longer(toy_bundle: bedplate.Bundle, tmp_path: Path) -> None:
    with started(toy_bundle, tmp_path, "--drain", "0.3") as one, ThreadPoolExecutor(1) as threads:
        whole = threads.submit(ask, one.address, chat(n=64, max_tokens=100, ignore_eos=True))
        wait_until(lambda: ask(one.address, path="/v1/models").status == 200)
        with open_request(one.address, chat(max_tokens=1)):
            one.process.send_signal(signal.SIGTERM)
            assert whole.result().error["code"] == "stopping"
            assert one.process.wait(20) == 0


def test_a_second_signal_ends_it_at_once(toy_bundle: bedplate.Bundle, tmp_path: Path) -> None:
    endless = chat(n=64, stream=True, ignore_eos=True)
    with started(toy_bundle, tmp_path) as one, open_request(one.address, endless) as answer:
        assert answer.recv(100)
        one.process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            one.process.wait(0.5)
        one.process.send_signal(signal.SIGTERM)
        assert one.process.wait(2) == 128 + signal.SIGTERM


def test_nothing_that_is_asked_is_written(toy_bundle: bedplate.Bundle, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": MARK}]
    with started(toy_bundle, tmp_path) as one:
        assert ask(one.address, chat(messages=messages, max_tokens=4)).status == 200
        for stream in (False, True):
            ask(one.address, chat(messages=messages, max_tokens=4, logprobs=True, stream=stream))
        for body in (
            chat(messages=[{"role": MARK, "content": MARK}], max_tokens=1),
            chat(messages=messages, stop=[MARK] * 17),
            chat(messages=messages, model=MARK),
            {MARK: MARK},
            f'{{"{MARK}'.encode(),
        ):
            ask(one.address, body)
            ask(one.address, body, path=f"/v1/{MARK}?{MARK}", headers={MARK: MARK})
        open_request(one.address, chat(messages=messages, stream=True, n=8)).close()
        one.process.send_signal(signal.SIGTERM)
        one.process.wait(20)
        assert MARK not in one.said and one.said.count("failure ") == 2 and "ValueError" in one.said


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["--host", "0.0.0.0"], "--insecure"),
        (["--host", "no.such.host.invalid"], "127.0.0.1"),
        (["--host", "192.0.2.1", "--insecure"], "address"),
        (["--api-key-file", "/nowhere"], "text file"),
    ],
)
def test_what_it_needs_to_start(toy_bundle: bedplate.Bundle, options: list[str], hint: str) -> None:
    _refused(toy_bundle, options, hint)


def test_a_port_that_is_taken(toy_bundle: bedplate.Bundle) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        _refused(toy_bundle, ["--port", str(other.getsockname()[1])], "--port")


def test_what_is_short_is_sent_at_once() -> None:
    """asyncio turns Nagle's algorithm off only for sockets that name their protocol. With it, each answer on a
    connection that is kept open would come 40 ms later.
    """
    with ExitStack() as stack:
        (server,) = listen(Settings(port=0))
        stack.callback(server.close)
        server.listen()
        stack.enter_context(socket.create_connection(server.getsockname()))
        accepted, _ = server.accept()
        stack.callback(accepted.close)
        assert accepted.proto == socket.IPPROTO_TCP


def _refused(bundle: bedplate.Bundle, options: list[str], hint: str) -> None:
    command = [
        sys.executable,
        "-c",
        "from bedplate.cli.main import main; main()",
        "serve",
        str(bundle.path),
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "hint: " in done.stderr and hint in done.stderr, done.stderr
