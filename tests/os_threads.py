"""The threads that the system counts in this process. It still lists one for a moment after it was joined."""

from __future__ import annotations

import time
from pathlib import Path


def os_threads(expected: int | None = None) -> int:
    """How many there are as soon as they are `expected`, at most 5 s later. None: as soon as none comes or goes."""
    limit, count, since = time.monotonic() + 5, _count(), time.monotonic()
    while time.monotonic() < limit and count != expected:
        if expected is None and time.monotonic() - since > 0.1:
            break
        time.sleep(0.01)
        if (now := _count()) != count:
            count, since = now, time.monotonic()
    return count


def _count() -> int:
    return len(list(Path("/proc/self/task").iterdir()))
