"""SHA-256 of files of any length."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from bedplate import hashing


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 2500])
def test_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """In chunks of which the last is not full."""
    monkeypatch.setattr(hashing, "_CHUNK", 1000)
    data = bytes(i % 251 for i in range(size))
    (tmp_path / "a").write_bytes(data)
    expected = hashlib.sha256(data).hexdigest()
    with (tmp_path / "a").open("rb", buffering=0) as file:
        assert hashing.sha256_of(file) == expected
    monkeypatch.setattr(hashing, "_LONG_CHUNK", 700)
    assert hashing.sha256_file(tmp_path / "a") == expected


@pytest.mark.parametrize("module", [hashing._OWN, "of no Python"])
def test_of_few_bytes(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """By Python itself, or by OpenSSL where Python was built without it."""
    monkeypatch.setattr(hashing, "_OWN", module)
    assert hashing.sha256_of_few(b"few") == hashlib.sha256(b"few").hexdigest()
