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
    assert hashing.sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()
