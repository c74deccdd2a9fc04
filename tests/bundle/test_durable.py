"""What is published has reached the disk before it gets its name: a power cut leaves the old state or the new one.

Each of these fails if a sync that it needs is left out.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from power import PowerCuts, Tree
from toy_bundle import adapter_writer, write_base

from bedplate.bundle import files
from bedplate.bundle.ptd import write_ptd
from bedplate.bundle.store import Bundle, create_bundle, remove_adapter


@pytest.fixture
def judge(tmp_path: Path) -> Callable[[Tree], bytes | None]:
    """The manifest of the bundle that a cut leaves, after proof that it is whole; None: there is no bundle."""
    place = tmp_path / "judged"

    def judge(tree: Tree) -> bytes | None:
        shutil.rmtree(place, ignore_errors=True)
        for name, data in tree.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).mkdir(exist_ok=True) if name.endswith("/") else (place / name).write_bytes(data)
        if not (place / "toy.bundle").exists():
            return None
        Bundle.open(place / "toy.bundle")
        assert "toy.bundle/adapters/" in tree
        return tree["toy.bundle/bundle.json"]

    return judge


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def made(root: Path) -> Path:
    bundle = create_bundle(root / "toy.bundle", write_base)
    bundle.add_adapters({"one": adapter_writer(bundle, "one", 10)})
    return bundle.path


def add_several(path: Path) -> None:
    bundle = Bundle.open(path)
    bundle.add_adapters(
        {name: adapter_writer(bundle, name, value) for name, value in (("two", 20), ("three", 30))}
    )


CHANGES: dict[str, Callable[[Path], object]] = {
    "replace": lambda path: create_bundle(path, write_base, replace=True),
    "add": add_several,
    "remove": lambda path: remove_adapter(path, "one"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_bundle(root: Path, judge: Callable[[Tree], bytes | None], change: str) -> None:
    path = made(root)
    before = (path / "bundle.json").read_bytes()
    with PowerCuts(root, judge) as cuts:
        CHANGES[change](path)
        after = (path / "bundle.json").read_bytes()
        assert cuts.durable() == after != before
    assert cuts.seen == {before, after}


def test_a_new_bundle(root: Path, judge: Callable[[Tree], bytes | None]) -> None:
    with PowerCuts(root, judge) as cuts:
        create_bundle(root / "toy.bundle", write_base)
        after = (root / "toy.bundle" / "bundle.json").read_bytes()
        assert cuts.durable() == after
    assert cuts.seen == {None, after}


def test_where_the_system_has_no_exchange(
    root: Path, judge: Callable[[Tree], bytes | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then there is a moment without a bundle, but never one with half a bundle."""
    monkeypatch.setattr(files, "_renameat2", lambda *_: False)
    path = made(root)
    before = (path / "bundle.json").read_bytes()
    with PowerCuts(root, judge) as cuts:
        create_bundle(path, write_base, replace=True)
        after = (path / "bundle.json").read_bytes()
        assert cuts.durable() == after
    assert cuts.seen == {before, None, after}


def test_a_file_that_replaces_another(root: Path) -> None:
    file = root / "x.pte"
    file.write_bytes(b"old")
    with PowerCuts(root, lambda tree: tree["x.pte"]) as cuts:
        with files.replacing(file) as draft:
            draft.write(b"new")
        assert cuts.durable() == b"new"
    assert cuts.seen == {b"old", b"new"}


def test_a_data_file(root: Path) -> None:
    with PowerCuts(root, lambda tree: tree.get("a.ptd")) as cuts:
        write_ptd(root / "a.ptd", [])
        assert cuts.durable() == (root / "a.ptd").read_bytes()
    assert cuts.seen == {None, (root / "a.ptd").read_bytes()}
