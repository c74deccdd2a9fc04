"""Lines that arrive one after the other: those that are there are answered, whatever comes later."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bedplate.cli.arriving import Arriving
from bedplate.cli.requests import Answer, answered
from bedplate.errors import RunError


@pytest.fixture
def pipe() -> Iterator[tuple[int, Arriving]]:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as file:
        yield writing, Arriving(file)


def test_a_line_is_there_when_it_has_its_end(pipe: tuple[int, Arriving]) -> None:
    writing, lines = pipe
    assert not lines.is_there
    os.write(writing, b"\n one")
    assert not lines.is_there
    os.write(writing, b" line\n  \nan")
    assert lines.is_there and next(lines) == (2, b" one line")
    assert not lines.is_there
    os.write(writing, b"other")
    os.close(writing)
    assert lines.is_there and next(lines) == (4, b"another")
    assert lines.is_there and list(lines) == []


@given(data=st.lists(st.sampled_from([b"\n", b"a", b" ", b"bc", b"x" * 70_000])).map(b"".join))
def test_of_any_text_they_are_those_of_a_file(data: bytes) -> None:
    expected = [(at, line.rstrip(b"\n")) for at, line in enumerate(io.BytesIO(data), 1) if line.strip()]
    assert list(Arriving(io.BytesIO(data))) == expected


def test_nobody_waits_for_the_lines_of_later(
    pipe: tuple[int, Arriving], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer sends its next line when it has the answer to the one before."""
    writing, lines = pipe
    monkeypatch.setattr(Answer, "start", lambda self, engine: None)
    monkeypatch.setattr(Answer, "advance", lambda self: False)
    asked = (RunError(str(number), hint="none") for number, _ in lines)
    os.write(writing, b"first\n")
    given = answered(cast(Any, None), asked, 16, is_there=lambda: lines.is_there)
    assert next(given)[0] == 0
    os.write(writing, b"second\n")
    at, answer = next(given)
    assert at == 1 and isinstance(answer.request, RunError)
    os.close(writing)
    assert list(given) == []
