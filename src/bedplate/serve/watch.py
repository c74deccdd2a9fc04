"""What is told of requests while they are answered, for whoever counts them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bedplate.runtime.request import Event
    from bedplate.serve.answers import Choice
    from bedplate.serve.catalog import Model


class Watch:
    """This one counts nothing. The event loop calls it: no method may take long.

    A ticket says `running`, a `Choice` says `said` and `ended`. `Base.watch` is the one to tell.
    """

    def running(self, model: Model) -> AbstractContextManager[None]:
        """While a request has its place, to the end of its answers."""
        return nullcontext()

    def said(self, choice: Choice, event: Event) -> None:
        """An answer goes on. `choice.events` has the event already, `choice.heard` is the time of the one before."""

    def ended(self, choice: Choice, error: BaseException | None) -> None:
        """An answer that has begun says no more. error: why, if something went wrong."""

    def answered(self, path: str, status: int) -> None:
        """A response begins. path: that of its route."""
