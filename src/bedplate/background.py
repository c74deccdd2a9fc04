"""Work in a second thread, for what gives up the GIL while it reads or computes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Background(Generic[_T]):
    """A call that begins at once, in a thread of its own."""

    def __init__(self, work: Callable[[], _T]) -> None:
        self._work = work
        self._results: list[_T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._results.append(self._work())
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Return when the call has ended, in whatever way."""
        self._thread.join()

    def result(self) -> _T:
        """What the call returned, when it has ended. Raises what it raised."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._results[0]


def ahead(items: Iterable[_T]) -> Generator[_T]:
    """The same items. Each is made in a thread of its own while the one before is used; its error comes then."""
    iterator, end = iter(items), object()
    coming = Background(partial(next, iterator, end))
    try:
        while (item := coming.result()) is not end:
            coming = Background(partial(next, iterator, end))
            yield item
    finally:
        coming.wait()
