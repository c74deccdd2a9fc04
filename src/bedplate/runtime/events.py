"""What a caller holds of a generation: an iterator over its events, blocking or asynchronous."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncGenerator, Iterator

from bedplate.errors import RunError
from bedplate.runtime.generation import Generation, Progress
from bedplate.runtime.request import Event, OnPrefill
from bedplate.runtime.scheduler import Scheduler


class Events(Iterator[Event]):
    """The events of a generation. It ends with the last one, when it is closed, or when nobody holds it any more."""

    def __init__(self, scheduler: Scheduler, generation: Generation, on_prefill: OnPrefill | None) -> None:
        self._scheduler, self._generation, self._on_prefill = scheduler, generation, on_prefill
        self._reading = threading.Lock()

    def __next__(self) -> Event:
        if not self._reading.acquire(blocking=False):
            hint = "give each thread a session of its own, or hand events on"
            raise RunError("the next event of this generation is waited for elsewhere", hint=hint)
        start = time.perf_counter()
        try:
            while True:
                said = self._scheduler.take(self._generation)
                if not isinstance(said, Progress):
                    break
                _report(said, self._on_prefill)
        except StopIteration as error:  # which would end the events as if all were well
            self.close()
            raise RuntimeError("a function of the caller raised StopIteration") from error
        except BaseException:
            self.close()
            raise
        finally:
            _count(self._generation, start)
            self._reading.release()
        if said is None:
            raise StopIteration
        return said

    def close(self) -> None:
        """Cancel the generation. There are no more events."""
        self._scheduler.close_generation(self._generation)

    def __del__(self) -> None:
        self._scheduler.drop(self._generation)


async def asynchronous(
    scheduler: Scheduler, generation: Generation, on_prefill: OnPrefill | None
) -> AsyncGenerator[Event]:
    """The events of a generation, for a task."""
    try:
        while True:
            start = time.perf_counter()
            try:
                said = await scheduler.take_async(generation)
            finally:
                _count(generation, start)
            if said is None:
                return
            if isinstance(said, Progress):
                _report(said, on_prefill)
            else:
                yield said
    finally:
        scheduler.end(generation)


def _report(progress: Progress, on_prefill: OnPrefill | None) -> None:
    if on_prefill is not None:
        on_prefill(progress.done, progress.total)


def _count(generation: Generation, start: float) -> None:
    """The caller has waited since `start`."""
    now, stats = time.perf_counter(), generation.stats
    first = now if generation.first_chosen is None else min(max(generation.first_chosen, start), now)
    stats.prefill_seconds += first - start
    stats.decode_seconds += now - first
