"""What an engine tells of its memory and its work. Imported when it is asked: a process starts sooner without."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Memory in bytes.

    process: resident memory of the process.  foundation: its weights, 0 if they are not loaded.  adapters: by name,
    the weights of each loaded adapter.  kv: keys and values of all sessions, shared ones once.  cache: those that only
    the cache holds.
    """

    process: int
    foundation: int
    adapters: dict[str, int]
    kv: int
    cache: int


@dataclass(frozen=True, kw_only=True)
class Running:
    """A generation that goes on.

    adapters: by name, each with its scale; empty: the base.  read_tokens: of the prompt, with those that were known.
    """

    adapters: dict[str, float]
    prompt_tokens: int
    read_tokens: int
    generated_tokens: int


@dataclass(frozen=True, kw_only=True)
class Activity:
    """What an engine computes.

    steps: of generations, so far.  rows: their tokens, all together.  running: generations that go on.
    """

    steps: int
    rows: int
    running: list[Running]


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
