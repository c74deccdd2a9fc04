"""The command line, run in the process of the tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Result:
    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Result]


def failed(result: Result, *words: str) -> None:
    """It ended as a user's mistake: in words, with a hint, exit code 2, and nothing on stdout."""
    assert result.code == 2, result.err
    assert result.out == ""
    assert result.err.startswith("error: ") and "\nhint: " in result.err
    for word in words:
        assert word in result.err
