"""What an operator sets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a server behaves.

    host, port: where it listens.
    allow_adapters_from: folders, and beginnings of URLs, from which adapters can be loaded. None: they cannot.
    max_adapters: loaded adapters of each bundle, beside those that it has on disk.  max_adapter_bytes: of an adapter
        that is downloaded.  adapter_seconds: that its download may take, and that packing it may.
    watch: whether adapters that another process adds to a bundle, or removes, are seen.
    memory_seconds: that a request waits for memory, while others take all of it.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    allow_adapters_from: tuple[str, ...] = ()
    max_adapters: int = 256
    max_adapter_bytes: int = 1 << 30
    adapter_seconds: float = 60.0
    watch: bool = False
    memory_seconds: float = 30.0
