"""When Python looks for objects that only refer to each other."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_RARELY = 100_000  # objects made since the last look


@contextmanager
def rarely_sought() -> Iterator[None]:
    """In this context, rarely: where a million objects are made that stay, looking through all of them again and again
    takes a tenth of the time.
    """
    thresholds = gc.get_threshold()
    if thresholds[0] >= _RARELY:  # another thread, or the caller, restores what was before
        yield
        return
    gc.set_threshold(_RARELY, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
