"""What an operator sets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a server behaves.

    host, port: where it listens.
    """

    host: str = "127.0.0.1"
    port: int = 8080
