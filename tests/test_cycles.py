"""When Python looks for cycles is restored, also where contexts overlap."""

from __future__ import annotations

import gc

from bedplate.cycles import rarely_sought


def test_rarely_inside_and_as_before_afterwards() -> None:
    before = gc.get_threshold()
    with rarely_sought():
        assert gc.get_threshold()[0] > before[0]
    assert gc.get_threshold() == before


def test_contexts_that_overlap_leave_what_was_before() -> None:
    before = gc.get_threshold()
    first, second = rarely_sought(), rarely_sought()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert gc.get_threshold() == before


def test_a_caller_who_wants_it_more_rarely_keeps_that() -> None:
    before = gc.get_threshold()
    try:
        gc.set_threshold(10**6, *before[1:])
        with rarely_sought():
            assert gc.get_threshold()[0] == 10**6
    finally:
        gc.set_threshold(*before)
