"""A server of the toy bundle, and clients of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import openai
import pytest
from live import serving
from scripted import save_scripted_model
from shared import Shared
from tab import CHROMIUM, Tab, opened

import bedplate


@pytest.fixture(scope="session")
def address(toy_bundle: bedplate.Bundle) -> Iterator[str]:
    """Of a server of the toy bundle, called `toy`, with the adapters `all`, `all2` and `all8`."""
    with serving({"toy": toy_bundle}) as address:
        yield address


@pytest.fixture(scope="session")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def alone(toy_bundle: bedplate.Bundle) -> Iterator[bedplate.Engine]:
    """An engine beside the server, for what the answers should be."""
    with bedplate.Engine(toy_bundle, threads=1, cache_bytes=0) as engine:
        yield engine


@pytest.fixture(scope="session")
def scripted_address(shared: Shared) -> Iterator[str]:
    """Of a server of the scripted model, called `scripted`."""

    def make(out: Path) -> None:
        with TemporaryDirectory() as folder:
            save_scripted_model(Path(folder) / "model")
            bedplate.build(Path(folder) / "model", out, programs=False, quantize="none", max_context=2048)

    bundle = bedplate.Bundle.open(shared.made("scripted.bundle", make))
    with serving({"scripted": bundle}) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Of one module: while it is there, asyncio has a running loop, which other tests must not see."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (Debian: apt install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: Any, address: str) -> Iterator[Tab]:
    """The page of the toy server. It must have asked nobody else, and nothing may have gone wrong."""
    with opened(browser, address) as tab:
        tab.open()
        yield tab
