"""A browser's tab with the page, and what it did."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def expect(thing: Any) -> Any:
    """What of the page is to be so, soon."""
    from playwright.sync_api import expect

    return expect(thing)


class Tab:
    """asked: all addresses.  errors: what the console shows of them."""

    def __init__(self, context: Any, address: str) -> None:
        self.context, self.page = context, context.new_page()
        self.address, self.asked = address, list[str]()
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._said)

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def open(self) -> None:
        self.page.goto(self.address)
        expect(self.page.get_by_role("region", name="Column A")).to_be_visible()

    def column(self, letter: str) -> Any:
        return self.page.get_by_role("region", name=f"Column {letter}", exact=True)

    def ask(self, prompt: str, most: int | None = None) -> None:
        """Ask all columns, and wait for their answers."""
        if most is not None:
            self.set("Most tokens", str(most))
        field = self.page.get_by_label("Prompt for all columns")
        field.fill(prompt)
        field.press("Enter")
        self.ended()

    def ended(self) -> None:
        expect(self.page.locator(".answer").first).to_be_visible()
        expect(self.page.locator(".running")).to_have_count(0, timeout=20_000)

    def set(self, label: str, value: str) -> None:
        field = self.page.get_by_label(label)
        if not field.is_visible():
            self.page.locator(".settings summary").click()
        field.fill(value)

    def texts(self, letter: str) -> list[str]:
        return [one.text_content() for one in self.column(letter).locator(".text").all()]

    def compare(self) -> None:
        self.page.get_by_role("button", name="Compare", exact=True).click()


@contextmanager
def opened(browser: Any, address: str, **options: Any) -> Iterator[Tab]:
    """It must ask nobody but the server, and nothing may go wrong. options: of the browser's context."""
    context = browser.new_context(**options)
    tab = Tab(context, address)
    try:
        yield tab
    finally:
        context.close()
    origins = {f"{url.scheme}://{url.netloc}" for url in map(urlsplit, tab.asked)}
    assert tab.errors == [] and origins == {address}


def state(address: str) -> Any:
    with urllib.request.urlopen(f"{address}/v1/bedplate/state") as said:
        return json.load(said)
