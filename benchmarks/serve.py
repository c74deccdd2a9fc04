"""What the server must show under load, in one run.

    python benchmarks/serve.py FOLDER [--seconds N] [--minutes N] [--peer PYTHON --adapter ADAPTER.gguf]

models.py has made FOLDER. The model is SmolLM2-135M with eight adapters, made of the example `extract`: B is scaled by
another number in each. Where a row says so, it is the one of 1B parameters and random weights, and answers are drawn.
The server is `bedplate serve` in a process of its own, with 2 threads. Clients ask what `extract.heldout.jsonl` asks,
greedily, with 64 tokens at most.

PYTHON: of an environment with `llama-cpp-python[server]`. ADAPTER: what llama.cpp's converter made of `extract`.
Prints a Markdown table, and writes the figures under the machine's name into serve.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from typing import Any

from engine import EXAMPLES
from models import ADAPTERS
from runtime import Figures, machine
from safetensors.numpy import load_file, save_file

import bedplate

HERE = Path(__file__).parent
EXTRACT = EXAMPLES / "adapters" / "extract"
NAMES = [f"extract{number}" for number in range(ADAPTERS)]
CLIENTS, MOST_TOKENS, KNOWN = 8, 64, 20
LONG = 1500  # tokens of a conversation
LARGE = [f"a{number}" for number in range(ADAPTERS)]
DRAWN = {"min_tokens": MOST_TOKENS, "temperature": 1, "seed": 1}  # random weights never end by themselves

SERVE = [sys.executable, "-c", "from bedplate.cli.main import main; main()", "serve"]
PORT = ["--threads", 2, "--port"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--adapter", type=Path)
    options = parser.parse_args()
    folder = options.folder.absolute() / "135M"
    bundle = served(folder)
    found: Figures = {}
    with serving([*SERVE, bundle, *PORT]) as server:
        for name, models in (("one", NAMES[:1]), ("eight", NAMES)):
            found[f"{name}_turns"] = throughput(server, models, options.seconds, turns=True)
            found[f"{name}_at_once"] = throughput(server, models, options.seconds, turns=False)
        found |= follow_up(server)
        found |= soak(server, expected(bundle), 60 * options.minutes)
    with serving([*SERVE, options.folder.absolute() / "1B" / "bundle", *PORT]) as server:
        for name, models in (("one", LARGE[:1]), ("eight", LARGE)):
            found[f"{name}_turns_1b"] = throughput(server, models, options.seconds, turns=True, **DRAWN)
            found[f"{name}_at_once_1b"] = throughput(server, models, options.seconds, turns=False, **DRAWN)
    if options.peer:
        command = [options.peer, "-m", "llama_cpp.server", "--model", folder / "q4_0.gguf", "--n_ctx", 4096]
        more = [
            "--lora_path",
            options.adapter.absolute(),
            "--n_threads",
            2,
            "--chat_format",
            "chatml",
            "--port",
        ]
        with serving([*command, *more]) as server:
            found["peer"] = throughput(server, ["peer"], options.seconds, turns=False)
            found["peer_turns"] = throughput(server, ["peer"], options.seconds, turns=True)
    keep(found)
    print(table(found))


def served(folder: Path) -> Path:
    """The bundle of the eight adapters, made when it is first asked for."""
    path = folder / "served.bundle"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            draft = Path(shutil.copytree(folder / "bundle", Path(scratch) / "bundle"))
            bundle = bedplate.Bundle.open(draft)
            for name in list(bundle.adapters):
                bundle.remove(name)
            for number, name in enumerate(NAMES):
                made = Path(shutil.copytree(EXTRACT, Path(scratch) / name))
                tensors = load_file(made / "adapter_model.safetensors")
                scaled = {
                    key: value * (1 - number / 100) if "lora_B" in key else value
                    for key, value in tensors.items()
                }
                save_file(
                    {key: value.astype("float32") for key, value in scaled.items()},
                    made / "adapter_model.safetensors",
                )
                bundle.add(made, name=name, programs=False)
            draft.rename(path)
    return path


@dataclass
class Server:
    """A server that runs."""

    port: int
    process: subprocess.Popen[bytes]

    def connect(self) -> HTTPConnection:
        return HTTPConnection("127.0.0.1", self.port, timeout=600)

    @property
    def resident_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS:")) * 1024 / 1e6


@contextmanager
def serving(command: Sequence[object]) -> Iterator[Server]:
    """A server, once it answers. The port is the last word of its command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([*map(str, command), str(port)], stdout=subprocess.DEVNULL)
    try:
        server = Server(port, process)
        while True:
            if process.poll() is not None:
                raise SystemExit("the server did not start")
            try:
                connection = server.connect()
                connection.request("GET", "/v1/models")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        process.wait(30)


def questions() -> list[list[Any]]:
    lines = (EXAMPLES / "data" / "extract.heldout.jsonl").read_text().splitlines()
    return [json.loads(line)["messages"][:1] for line in lines]


def ask(
    connection: HTTPConnection, model: str, messages: list[Any], salt: str | None, **options: Any
) -> tuple[str, int]:
    """Text and tokens of an answer."""
    body = {"model": model, "messages": messages, "max_tokens": MOST_TOKENS, "temperature": 0, **options}
    if salt is not None:
        body["cache_salt"] = salt
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    said = json.loads(response.read())
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {said}")
    return said["choices"][0]["message"]["content"], said["usage"]["completion_tokens"]


def throughput(
    server: Server, models: Sequence[str], seconds: float, *, turns: bool, **options: Any
) -> float:
    """Tokens/s of all clients together. No prompt is found in a cache. turns: one client asks what all would."""
    asked, clients = questions(), 1 if turns else CLIENTS
    counts = [0] * clients

    def client(number: int, until: float, run: int) -> None:
        connection, at = server.connect(), number
        while time.perf_counter() < until:
            salt = None if models == ["peer"] else f"{run}-{at}"
            _, tokens = ask(connection, models[at % len(models)], asked[at % len(asked)], salt, **options)
            counts[number] += tokens
            at += clients

    def all_clients(seconds: float, run: int) -> float:
        begin = time.perf_counter()
        threads = [threading.Thread(target=client, args=(n, begin + seconds, run)) for n in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - begin

    all_clients(3, 0)  # everything is loaded
    counts[:] = [0] * clients
    took = all_clients(seconds, time.monotonic_ns())
    return sum(counts) / took


def expected(bundle: Path) -> dict[tuple[str, int], str]:
    """Answers of an engine that does one thing at a time, and keeps nothing."""
    with bedplate.Engine(bedplate.Bundle.open(bundle), threads=2, cache_bytes=0) as engine:
        return {
            (name, at): engine.session(name).generate(messages, max_tokens=MOST_TOKENS)
            for name in NAMES
            for at, messages in enumerate(questions()[:KNOWN])
        }


@dataclass
class Count:
    """Of a client."""

    answers: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)


def soak(server: Server, known: dict[tuple[str, int], str], seconds: float) -> Figures:
    """Eight clients on eight adapters. How many answers are others than alone, errors, and the server's memory."""
    asked, until = questions(), time.perf_counter() + seconds
    counts = [Count() for _ in range(CLIENTS)]

    def client(number: int) -> None:
        connection, count, at = server.connect(), counts[number], number
        while time.perf_counter() < until:
            at = (at + 7) % KNOWN
            try:
                text, _ = ask(connection, NAMES[number], asked[at], None)
            except Exception as error:
                count.errors.append(repr(error))
                connection = server.connect()
            else:
                count.answers += 1
                count.wrong += text != known[NAMES[number], at]

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    memory = [0.0]
    while time.perf_counter() < until:
        time.sleep(seconds / 20)
        memory.append(server.resident_mb)
    for thread in threads:
        thread.join()
    print([error for count in counts for error in count.errors[:2]], file=sys.stderr)
    return {
        "soak_seconds": seconds,
        "soak_answers": sum(count.answers for count in counts),
        "soak_wrong": sum(count.wrong for count in counts),
        "soak_errors": sum(len(count.errors) for count in counts),
        "soak_first_mb": memory[len(memory) // 4],
        "soak_last_mb": memory[-1],
    }


def follow_up(server: Server) -> Figures:
    """Milliseconds to the first token of a question after a long conversation, and of the same whole one, cold."""
    text = "\n".join(messages[0]["content"] for messages in questions())
    connection = server.connect()
    connection.request("POST", "/tokenize", json.dumps({"model": NAMES[0], "prompt": text}), {})
    tokens = json.loads(connection.getresponse().read())["tokens"]
    connection.request("POST", "/detokenize", json.dumps({"model": NAMES[0], "tokens": tokens[:LONG]}), {})
    long = json.loads(connection.getresponse().read())["prompt"]
    times: dict[str, list[float]] = {"cold": [], "warm": []}
    for number in range(3):
        salt = f"follow-up {number}"
        first, _ = ask(connection, NAMES[0], [{"role": "user", "content": long}], salt)
        talk = [
            {"role": "user", "content": long},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "And the first of them?"},
        ]
        warm, answer = first_token(connection, talk, salt)
        cold, same = first_token(connection, talk, f"{salt}, cold")
        if answer != same:
            raise SystemExit("the cache changes an answer")
        times["warm"].append(warm)
        times["cold"].append(cold)
    return {f"follow_up_{name}_ms": 1000 * median(found) for name, found in times.items()}


def first_token(connection: HTTPConnection, messages: list[Any], salt: str) -> tuple[float, list[Any]]:
    """When it came, and all tokens with their logprobs."""
    body = {
        "model": NAMES[0],
        "messages": messages,
        "max_tokens": 16,
        "temperature": 0,
        "stream": True,
        "cache_salt": salt,
        "logprobs": True,
        "top_logprobs": 5,
    }
    begin, first, answer = time.perf_counter(), 0.0, list[Any]()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    for line in connection.getresponse():
        if line.startswith(b"data: {"):
            choice = json.loads(line[6:])["choices"][0]
            first = first or (time.perf_counter() - begin if choice["delta"].get("content") else 0.0)
            answer += (choice["logprobs"] or {}).get("content", ())
    return first, answer


def keep(found: Figures) -> None:
    file = HERE / "serve.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    results[machine()] = {"date": time.strftime("%Y-%m-%d"), **found}
    file.write_text(json.dumps(results, indent=2) + "\n")


def table(found: Figures) -> str:
    rows = [
        ("8 clients at once ÷ taking turns, one adapter", "one_at_once", "one_turns", "≥ 3"),
        ("the same, 1B", "one_at_once_1b", "one_turns_1b", "≥ 3"),
        ("8 clients at once ÷ taking turns, eight adapters", "eight_at_once", "eight_turns", "≥ 2"),
        ("the same, 1B", "eight_at_once_1b", "eight_turns_1b", "≥ 2"),
        ("8 clients, one adapter ÷ llama-cpp-python's server", "one_at_once", "peer", "≥ 3"),
        (
            "8 clients, one adapter ÷ llama-cpp-python's server asked by one",
            "one_at_once",
            "peer_turns",
            "≥ 3",
        ),
        (
            "first token of a follow-up after 1,500 tokens ÷ cold",
            "follow_up_warm_ms",
            "follow_up_cold_ms",
            "≤ 0.1",
        ),
    ]
    lines = [f"{time.strftime('%Y-%m-%d')}, {machine()}", "", "| | | goal |", "|---|---|---|"]
    for label, value, other, goal in rows:
        if value in found and other in found:
            ratio = found[value] / found[other]
            lines.append(f"| {label} | {ratio:.3g} ({found[value]:,.4g} : {found[other]:,.4g}) | {goal} |")
    minutes, answers = found["soak_seconds"] / 60, found["soak_answers"]
    same = f"{answers:,.0f} answers, {found['soak_wrong']:.0f} wrong, {found['soak_errors']:.0f} errors"
    lines.append(f"| 8 clients on 8 adapters for {minutes:g} minutes | {same} | 0 wrong, 0 errors |")
    memory = f"{found['soak_first_mb']:.1f} · {found['soak_last_mb']:.1f}"
    lines.append(f"| memory after a quarter of it · at its end, MB | {memory} | flat |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
