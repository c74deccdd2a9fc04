"""Options of `bedplate serve` that are read here."""

from __future__ import annotations

import pytest

from bedplate.cli.serving import _bytes
from bedplate.errors import RunError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GB", 4_000_000_000),
        ("500 mb", 500_000_000),
        ("1.5GiB", 1_610_612_736),
        ("64KiB", 65_536),
        ("123", 123),
        ("7B", 7),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert _bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "4 bytes", "1TB", "4IB", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(RunError, match="--memory has"):
        _bytes(text)
