"""Calls in a second thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from bedplate.background import Background, ahead


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


def test_an_item_is_made_while_the_one_before_is_used() -> None:
    made = [threading.Event() for _ in range(3)]

    def items() -> Iterator[int]:
        for number, event in enumerate(made):
            event.set()
            yield number

    coming = ahead(items())
    assert next(coming) == 0
    assert made[1].wait(10)
    assert list(coming) == [1, 2]


def test_an_error_comes_in_the_place_of_its_item() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("no")

    coming = ahead(items())
    assert next(coming) == 1
    with pytest.raises(ValueError, match="no"):
        next(coming)


def test_who_stops_waits_for_what_was_begun() -> None:
    begun, ended = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 1
        begun.set()
        time.sleep(0.05)
        ended.set()
        yield 2

    coming = ahead(items())
    next(coming)
    assert begun.wait(10)
    coming.close()
    assert ended.is_set()
