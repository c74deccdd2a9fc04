"""The files of the page: where they come from, and how they are sent."""

from __future__ import annotations

import hashlib
import json
import urllib.error
import urllib.request
from typing import Any

import pytest

from bedplate.serve.page import FILES


def test_vendored_files_are_as_their_packages_have_them() -> None:
    folder = FILES / "vendor"
    packages = json.loads((folder / "versions.json").read_text("utf-8"))
    listed = {name: one["sha256"] for package in packages for name, one in package["files"].items()}
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    del found["versions.json"]
    assert found == listed
    assert all({"package", "version", "licence", "source", "sha512"} <= set(package) for package in packages)


def test_no_file_asks_elsewhere_or_makes_html_of_text() -> None:
    for path in FILES.iterdir():
        if path.is_file():
            text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
            assert "://" not in text and "HTML =" not in text and "dangerously" not in text, path


def fetch(url: str, **headers: str) -> tuple[int, Any, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as said:
            return said.status, said.headers, said.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def test_files_are_sent_with_a_strict_policy(address: str) -> None:
    for path in ["/", "/page/app.js", "/page/style.css", "/page/icon.svg", "/page/vendor/uplot.js"]:
        status, headers, body = fetch(address + path)
        policy = headers["Content-Security-Policy"]
        assert status == 200 and body and policy.startswith("default-src 'self';") and "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert fetch(address + path, **{"If-None-Match": headers["ETag"]})[0] == 304


@pytest.mark.parametrize(
    "path", ["none.js", "../page.py", "%2e%2e/page.py", "..%2fpage.py", "vendor", "", "/etc/passwd"]
)
def test_there_are_no_other_files(address: str, path: str) -> None:
    status, _, body = fetch(f"{address}/page/{path}")
    assert status == 404 and "no such file" in json.loads(body)["error"]["message"]
