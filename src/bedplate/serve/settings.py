"""What an operator sets."""

from __future__ import annotations

from dataclasses import dataclass

from bedplate.serve.keys import Keys


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a server behaves. Times are in seconds. None: no limit.

    host, port: where it listens.
    keys: who may use it. None: everybody.  insecure: also where other machines may reach it.
    allow_origins: `https://…` of pages on other sites whose scripts may use it. `*`: any.
    max_running: answers at once, each a row of a step.  max_queue: requests that wait for a place.
    timeout: for a request, from when it came: it waits, and its answer is made. `math.inf`: for ever.
    max_body: bytes.  max_prompt, max_tokens: tokens of a prompt, and of an answer.
    tokens_per_minute: read and generated for one key; where there are no keys, for one model.
    client_timeout: for a client to send its request, and to take what it is sent.
    ping: after so long without a word, a stream says that it is alive.
    drain: for running answers, when the server is told to end.
    allow_adapters_from: folders, and beginnings of URLs, from which adapters can be loaded. None: they cannot.
    max_adapters: loaded adapters of each bundle, beside those that it has on disk.  max_adapter_bytes: of an adapter
        that is downloaded.  adapter_seconds: that its download may take, and that packing it may.
    watch: whether adapters that another process adds to a bundle, or removes, are seen.
    memory_seconds: that a request waits for memory, while others take all of it.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    keys: Keys | None = None
    insecure: bool = False
    allow_origins: tuple[str, ...] = ()
    max_running: int = 64
    max_queue: int = 256
    timeout: float = 600.0
    max_body: int = 8 << 20
    max_prompt: int | None = None
    max_tokens: int | None = None
    tokens_per_minute: int | None = None
    client_timeout: float = 60.0
    ping: float = 5.0
    drain: float = 30.0
    allow_adapters_from: tuple[str, ...] = ()
    max_adapters: int = 256
    max_adapter_bytes: int = 1 << 30
    adapter_seconds: float = 60.0
    watch: bool = False
    memory_seconds: float = 30.0
