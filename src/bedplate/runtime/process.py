"""The process that something was made in.

A process that is forked from it has its memory, but none of its threads, and locks that others held stay held. So what
is used there must be refused before it takes a lock.
"""

from __future__ import annotations

import os

from bedplate.errors import RunError


class Process:
    """The one that runs when this is made."""

    def __init__(self) -> None:
        self._id = os.getpid()

    @property
    def is_current(self) -> bool:
        return os.getpid() == self._id

    def check(self) -> None:
        """RunError: this is another process."""
        if not self.is_current:
            raise RunError(
                "the engine was made before this process was forked, and its threads are not here",
                hint="make a new engine in the child: Engine(bundle)",
            )
