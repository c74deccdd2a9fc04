"""Calls in a second thread."""

from __future__ import annotations

import threading

import pytest

from bedplate.background import Background


def test_returns_what_the_call_returned() -> None:
    assert Background(lambda: threading.current_thread()).result() is not threading.current_thread()


def test_begins_at_once_and_waits_for_the_end() -> None:
    begun, may_end = threading.Event(), threading.Event()

    def work() -> int:
        begun.set()
        may_end.wait(10)
        return 7

    call = Background(work)
    assert begun.wait(10)
    may_end.set()
    call.wait()
    assert call.result() == 7 == call.result()


def test_raises_what_the_call_raised_when_it_is_asked_for() -> None:
    def work() -> None:
        raise ValueError("no")

    call = Background(work)
    call.wait()
    with pytest.raises(ValueError, match="no"):
        call.result()
