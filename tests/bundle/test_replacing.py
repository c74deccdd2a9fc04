"""Two who write one file at once: each writes it whole."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from bedplate.bundle import files


def test_the_second_waits(tmp_path: Path) -> None:
    path, begun = tmp_path / "x", threading.Event()

    def second() -> None:
        with files.replacing(path) as file:
            begun.set()
            file.write(b"second")

    thread = threading.Thread(target=second)
    with files.replacing(path) as file:
        file.write(b"the first ")
        file.flush()
        thread.start()
        assert not begun.wait(0.3)
        file.write(b"is whole")
    thread.join(10)
    assert path.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [path]


def test_the_second_waits_for_one_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "x"

    def second() -> None:
        with files.replacing(path) as file:
            file.write(b"second")

    thread = threading.Thread(target=second)
    with pytest.raises(KeyError), files.replacing(path) as file:
        file.write(b"a draft that is longer")
        thread.start()
        raise KeyError
    thread.join(10)
    assert path.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_one_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".x.tmp").write_bytes(b"much longer than what comes")
    with files.replacing(tmp_path / "x") as file:
        file.write(b"new")
    assert (tmp_path / "x").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
