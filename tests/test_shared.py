"""What workers share is made once, whole, and any change of it is seen."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from schedule import FIRST, TOGETHER, group_of
from shared import Shared

TESTS = Path(__file__).parent


def test_whoever_comes_first_makes_it_and_the_others_wait(tmp_path: Path) -> None:
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        folder.mkdir()
        (folder / "file").write_text("x")

    def take(_: int) -> str:
        return (Shared(tmp_path).made("thing", make) / "file").read_text()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(take, range(8))) == ["x"] * 8
    assert len(made) == 1


def test_what_fails_leaves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    shared = Shared(tmp_path)

    def fail(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        shared.made("thing", fail)
    assert not (tmp_path / "thing").exists()
    assert list(shared.made("thing", Path.mkdir).iterdir()) == []


@pytest.mark.parametrize("change", ["written", "removed", "added"])
def test_a_change_is_seen(tmp_path: Path, change: str) -> None:
    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "file").write_text("x")

    shared = Shared(tmp_path)
    path = shared.made("thing", make)
    shared.made("other", make)
    assert shared.changed() == []
    if change == "removed":
        (path / "file").unlink()
    else:
        (path / ("file" if change == "written" else "new")).write_text("longer")
    assert shared.changed() == [path]


def test_every_group_is_named_by_a_file_that_there_is() -> None:
    for file in {*FIRST, *TOGETHER, *TOGETHER.values()}:
        assert (TESTS.parent / file).is_file(), file
    assert {group_of(f"{file}::test") for file in TOGETHER} == set(TOGETHER.values())
