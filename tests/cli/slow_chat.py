"""The command line, with a pause before each event of an answer, so that a test can interrupt it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from bedplate.cli.main import main
from bedplate.runtime.request import Event
from bedplate.runtime.session import Session

events = Session.events


def slow(self: Session, *args: Any, **options: Any) -> Iterator[Event]:
    for event in events(self, *args, **options):
        time.sleep(0.05)
        yield event


if __name__ == "__main__":
    Session.events = slow  # type: ignore[method-assign]
    main()
