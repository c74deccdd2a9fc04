"""The parts of loading adapters while a server runs, without a server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from fsspec.implementations.memory import MemoryFileSystem

import bedplate
from bedplate.assemble import packer
from bedplate.bundle.overlay import Overlay
from bedplate.errors import AdapterError, MemoryFullError, NameTakenError, NotFoundError, RunError
from bedplate.runtime.engine import Engine
from bedplate.serve import live_sources, packing
from bedplate.serve.errors import ApiError
from bedplate.serve.live_sources import Sources
from bedplate.serve.packing import Packing
from bedplate.serve.room import Room


class TestAnOverlay:
    @pytest.fixture
    def overlay(self, toy_bundle: bedplate.Bundle) -> Overlay:
        return Overlay.open(toy_bundle.path, check=False)

    def test_keeps_what_was_attached_and_hidden(self, overlay: Overlay) -> None:
        entry = overlay.adapters["all2"]
        overlay.attach("more", entry)
        overlay.detach("all")
        overlay.attach("all8", entry, replace=True)
        overlay.refresh()
        assert overlay.adapters.keys() == {"all2", "all8", "more"}
        assert overlay.adapters["all8"] is entry is overlay.adapters["more"]
        assert overlay.manifest.adapters.keys() == {"all", "all2", "all8"}, "it says what is on disk"
        overlay.detach("all8")
        assert "all8" not in overlay.adapters
        overlay.attach("all", entry)
        overlay.detach("all")
        assert "all" not in overlay.adapters
        with pytest.raises(NotFoundError):
            overlay.detach("all")

    def test_what_is_refused(self, overlay: Overlay) -> None:
        entry = overlay.adapters["all"]
        with pytest.raises(NameTakenError, match="already been loaded"):
            overlay.attach("all2", entry)
        with pytest.raises(AdapterError, match="cannot be the name"):
            overlay.attach("base", entry)
        overlay.attach("one", entry, most=1)
        overlay.attach("one", entry, most=1, replace=True)
        with pytest.raises(AdapterError, match="the most"):
            overlay.attach("two", entry, most=1)


class TestFixed:
    @pytest.fixture
    def engine(self, toy_bundle: bedplate.Bundle) -> Iterator[Engine]:
        with Engine(Overlay.open(toy_bundle.path, check=False), threads=1) as engine:
            yield engine

    def test_sessions_have_the_weights_that_the_first_one_found(self, engine: Engine) -> None:
        assert isinstance(engine.bundle, Overlay)
        overlay = engine.bundle
        expected = {name: engine.session(name).generate("ab", max_tokens=9) for name in ("all", "all2")}
        fixed = engine.fixed("all")
        assert not fixed.is_loaded
        assert fixed.session().generate("ab", max_tokens=9) == expected["all"]
        overlay.attach("all", overlay.adapters["all2"], replace=True)
        assert fixed.session(cache_salt="a").generate("ab", max_tokens=9) == expected["all"]
        assert engine.fixed("all").session().generate("ab", max_tokens=9) == expected["all2"]
        overlay.detach("all")
        assert fixed.session().generate("ab", max_tokens=9) == expected["all"]
        assert fixed.tokenizer.encode("ab")
        with pytest.raises(NotFoundError):
            engine.fixed("all").session().generate("ab", max_tokens=9)
        session = fixed.session()
        session.use("all2")
        assert session.generate("ab", max_tokens=9) == expected["all2"], "it was told to"

    def test_a_tokenizer_of_other_files_than_the_weights(self, engine: Engine) -> None:
        """Between the two, another adapter took the name."""
        fixed = engine.fixed("all")
        fixed._seen = engine.tokenizer
        assert fixed.session().generate("ab", max_tokens=1), "it does the same"
        fixed = engine.fixed("all")
        fixed._seen = type(engine.tokenizer)(
            engine.bundle.tokenizer_file, chat_template="other", special_tokens={}, end_ids=(1,)
        )
        with pytest.raises(RunError, match="replaced while the request began"):
            fixed.session().generate("ab", max_tokens=1)


class TestThePacker:
    def test_says_what_is_wrong(
        self, toy_bundle: bedplate.Bundle, toy_adapters: dict[str, Path], tmp_path: Path
    ) -> None:
        work = Packing(60)
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        try:
            with pytest.raises(AdapterError, match="no such file or folder"):
                work.pack(toy_bundle.path, tmp_path / "none", "x", tmp_path / "a")
            assert work._process is not None
            os.kill(work._process.pid, signal.SIGKILL)
            work._process.wait()
            work.pack(toy_bundle.path, toy_adapters["all"], "x", tmp_path / "b")
            assert list(bedplate.Bundle.open(tmp_path / "b").adapters) == ["x"]
        finally:
            work.close()
        with pytest.raises(AdapterError, match="failed"):
            work.pack(toy_bundle.path, toy_adapters["all"], "y", tmp_path / "b")

    @pytest.mark.parametrize(
        ("script", "said"),
        [
            ("import time; input(); time.sleep(60)", r"took more than 0\.5 s"),
            ("input()", "failed"),
            ("print('no JSON'); input()", "failed"),
        ],
    )
    def test_that_hangs_or_ends_is_started_again(
        self, script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(packing, "_COMMAND", [sys.executable, "-c", script])
        work = Packing(0.5)
        for _ in range(2):
            with pytest.raises(AdapterError, match=said):
                work.pack(tmp_path, tmp_path, "x", tmp_path)
            assert work._process is None
        work.close()

    def test_without_a_package(
        self,
        toy_bundle: bedplate.Bundle,
        toy_adapters: dict[str, Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setitem(sys.modules, "bedplate.assemble.add", None)
        request = {
            "bundle": str(toy_bundle.path),
            "source": str(toy_adapters["all"]),
            "name": "x",
            "staging": str(tmp_path),
        }
        assert packer._answer(request)["hint"] == "pip install 'bedplate[build]'"

    def test_ends_with_the_server(self, toy_bundle: bedplate.Bundle, toy_adapters: dict[str, Path]) -> None:
        """Which imports nothing that builds bundles. Killed, it takes the process beside it along."""
        script = """
import json, os, signal, sys, tempfile
from pathlib import Path
from bedplate.serve.packing import Packing
import bedplate.serve.app
work = Packing(60)
with tempfile.TemporaryDirectory() as staging:
    work.pack(Path(sys.argv[1]), Path(sys.argv[2]), "x", Path(staging))
wrong = {"torch", "executorch", "bedplate.assemble", "bedplate.model", "bedplate.quantize"} & sys.modules.keys()
print(json.dumps([work._process.pid, sorted(wrong)]), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
        command = [sys.executable, "-c", script, str(toy_bundle.path), str(toy_adapters["all"])]
        done = subprocess.run(command, capture_output=True, text=True)
        pid, wrong = json.loads(done.stdout)
        assert (done.returncode, wrong) == (-signal.SIGKILL, [])
        until = time.monotonic() + 10
        while runs(pid) and time.monotonic() < until:
            time.sleep(0.05)
        assert not runs(pid)


def runs(pid: int) -> bool:
    """Whether a process runs. One that has ended may wait for who asks how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_sources_that_an_operator_cannot_allow(tmp_path: Path) -> None:
    for place in ("s3://bucket/../other", "local:///etc", "s3://", "a::s3://bucket", "s3://bucket?x=1"):
        with pytest.raises(RunError, match="is no beginning of a URL"):
            Sources([place], most_bytes=1, seconds=1, closing=threading.Event())
    with pytest.raises(NotFoundError, match="no such folder"):
        Sources([str(tmp_path / "none")], most_bytes=1, seconds=1, closing=threading.Event())


class Web(BaseHTTPRequestHandler):
    """Of one adapter, among links to what is elsewhere, and of folders that redirect."""

    FILES: ClassVar = {
        "/good/adapter/adapter_config.json": b"{}",
        "/good/adapter/weights.safetensors": b"weights" * 99,
        "/good/secret": b"secret",
        "/secret": b"secret",
    }
    LINKS = (
        "../secret",
        "../../secret",
        "/secret",
        "//127.0.0.1/secret",
        "%2e%2e/secret",
        "?C=N;O=D",
        "deep/",
    )

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        folder = "".join(f'<a href="{name}">' for name in ("adapter_config.json", *self.LINKS))
        pages = {"/good/adapter/": f"{folder}<a href='weights.safetensors'>", "/good/moved/": folder}
        if self.path in pages:
            self.answer(200, pages[self.path].encode(), "text/html")
        elif self.path in self.FILES:
            self.answer(200, self.FILES[self.path], "application/octet-stream")
        elif self.path.startswith("/good/moved"):
            self.answer(302, b"not here", "text/plain")
        else:
            self.answer(404, b"", "text/plain")

    def answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if status == 302:
            self.send_header("Location", "/secret")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """It says nothing."""


@pytest.fixture
def web() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Web) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}/good"
        server.shutdown()
        serving.join()


def test_a_page_of_links_leads_nowhere_else(web: str, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    sources = Sources([web], most_bytes=1 << 20, seconds=20, closing=threading.Event())
    found = sources.get(f"{web}/adapter", tmp_path / "adapter")
    assert {file.name: file.read_bytes() for file in found.iterdir()} == {
        "adapter_config.json": b"{}",
        "weights.safetensors": b"weights" * 99,
    }
    for place in ("moved", "moved/on", "none"):
        with pytest.raises(ApiError) as caught:
            sources.get(f"{web}/{place}", tmp_path / place)
        assert caught.value.status == 404
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"secret" in file.read_bytes()]


def test_names_that_a_listing_has_of_another_folder() -> None:
    names = [
        "b/a/x",
        "/b/a/y",
        "b/a",
        "b/a/",
        "b/a/..",
        "b/a/../z",
        "b/ab/x",
        "c/b/a/x",
        "b/a/%2e%2e",
        "b/a/c/x",
    ]
    assert list(live_sources._wanted(names, "/b/a/", None)) == ["b/a/x", "/b/a/y"]


def test_a_download_that_hangs_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one begins."""
    memory, hanging, closing = MemoryFileSystem(), threading.Event(), threading.Event()
    memory.pipe("/live-parts/adapter/adapter_config.json", b"{}")
    ls = MemoryFileSystem.ls

    def hangs(system: MemoryFileSystem, path: str, **options: bool) -> object:
        if path.endswith("/hangs"):
            hanging.wait(60)
        return ls(system, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "ls", hangs)
    sources = Sources(["memory://live-parts"], most_bytes=99, seconds=0.3, closing=closing)
    for name in ("one", "two"):
        with pytest.raises(ApiError, match="takes too long") as caught:
            sources.get("memory://live-parts/hangs", tmp_path / name)
        assert caught.value.status == 400
    found = sources.get("memory://live-parts/adapter", tmp_path / "good")
    assert [file.name for file in found.iterdir()] == ["adapter_config.json"]
    patient = Sources(["memory://live-parts"], most_bytes=99, seconds=600, closing=closing)
    threading.Timer(0.3, closing.set).start()
    with pytest.raises(ApiError, match="shutting down") as caught:
        patient.get("memory://live-parts/hangs", tmp_path / "three")
    assert caught.value.status == 503
    hanging.set()


class FakeEngine:
    running = 1


def full() -> MemoryFullError:
    return MemoryFullError("full")


class TestRoom:
    """Who waits for memory."""

    def room(self, seconds: float = 30) -> Room:
        return Room(FakeEngine(), seconds)  # type: ignore[arg-type]

    def test_those_that_wait_go_in_turn(self) -> None:
        async def run() -> None:
            room, free, order = self.room(), 0, list[str]()

            async def begin(name: str, needs: int) -> None:
                nonlocal free
                if needs > free:
                    raise full()
                free -= needs
                order.append(name)

            async def enter(name: str, needs: int, *, holding: bool = False) -> None:
                await room.enter(lambda: begin(name, needs), holding=holding)

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(enter("large", 3))
                await asyncio.sleep(0)
                tasks.create_task(enter("small", 1))
                await asyncio.sleep(0)
                tasks.create_task(enter("begun", 2, holding=True))
                await asyncio.sleep(0)
                for _ in range(6):
                    free += 1
                    room.left()
                    await asyncio.sleep(0.02)
            assert order == ["begun", "large", "small"]

        asyncio.run(run())

    def test_who_is_cancelled_keeps_nobody_waiting(self) -> None:
        async def run() -> None:
            room, free = self.room(), False

            async def begin() -> str:
                if not free:
                    raise full()
                return "begun"

            first = asyncio.create_task(room.enter(begin, holding=False))
            second = asyncio.create_task(room.enter(begin, holding=False))
            await asyncio.sleep(0.01)
            first.cancel()
            free = True
            room.left()
            assert await second == "begun"

        asyncio.run(run())

    def test_there_is_an_end(self) -> None:
        async def never() -> None:
            raise full()

        with pytest.raises(MemoryFullError):
            asyncio.run(self.room(0.2).enter(never, holding=False))
        with pytest.raises(MemoryFullError):  # the request has less time
            asyncio.run(asyncio.wait_for(self.room().enter(never, holding=False, seconds=0.2), 10))
