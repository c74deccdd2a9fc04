"""An error on writing names the file that was to be there, and leaves nothing of it."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from toy_bundle import MODEL, adapter_writer, program, write_base

from bedplate.bundle import files
from bedplate.bundle.facts import BundleFacts
from bedplate.bundle.ptd import write_ptd
from bedplate.bundle.store import Bundle, create_bundle
from bedplate.constants import Constant


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """No file may grow beyond `nbytes`: Linux then fails as it does on a full disk, without a file name."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def large(name: str, nbytes: int) -> Constant:
    return Constant.of(name, "uint8", (nbytes,), "test", np.zeros(nbytes, np.uint8))


def test_a_data_file_whose_constants_find_no_room(tmp_path: Path) -> None:
    """They wait in a file without a name."""
    with largest_file(50_000), pytest.raises(OSError) as caught:
        write_ptd(tmp_path / "a.ptd", [large("one", 100_000)])
    assert caught.value.filename == str(tmp_path / "a.ptd")
    assert "a.ptd" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 300, 50_000])
def test_a_file_that_replaces_another(tmp_path: Path, size: int) -> None:
    (tmp_path / "x.pte").write_bytes(b"old")
    with (
        largest_file(size),
        pytest.raises(OSError) as caught,
        files.replacing(tmp_path / "x.pte") as file,
    ):
        file.write(bytes(size + 1))
    assert caught.value.filename == str(tmp_path / "x.pte")
    assert tree(tmp_path) == {str(tmp_path / "x.pte"): b"old"}


def test_a_draft_that_cannot_be_opened(tmp_path: Path) -> None:
    """Not even the hidden name is a file that the user knows."""
    (tmp_path / ".x.pte.tmp").mkdir()
    with pytest.raises(OSError) as caught, files.naming(tmp_path / "x.pte", tmp_path / ".x.pte.tmp"):
        (tmp_path / ".x.pte.tmp").write_bytes(b"")
    assert caught.value.filename == str(tmp_path / "x.pte")


def base_of(sizes: dict[str, int]) -> Callable[[Path], BundleFacts]:
    """A base some of whose files have so many bytes and more."""

    def write(folder: Path) -> BundleFacts:
        facts = write_base(folder)
        name = "w" * sizes.get("foundation.json", 1)
        infos = write_ptd(folder / "foundation.ptd", [large(name, sizes.get("foundation.ptd", 8))])
        files.write(folder / "base.pte", program([]) + bytes(sizes.get("base.pte", 0)))
        files.write(folder / "tokenizer.json", bytes(sizes.get("tokenizer.json", 3)))
        model = MODEL | {"note": "x" * sizes.get("bundle.json", 0)}
        return BundleFacts(**{**vars(facts), "model": model, "constants": infos})

    return write


@pytest.mark.parametrize(
    "name", ["foundation.ptd", "base.pte", "tokenizer.json", "foundation.json", "bundle.json"]
)
def test_a_bundle(tmp_path: Path, name: str) -> None:
    with largest_file(50_000), pytest.raises(OSError) as caught:
        create_bundle(tmp_path / "a.bundle", base_of({name: 100_000}))
    assert caught.value.filename == str(tmp_path / "a.bundle" / name)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter(bundle: Bundle, tmp_path: Path) -> None:
    before = tree(tmp_path)
    writer = adapter_writer(bundle, "three", 30, own=(large("q_proj.lora_a", 100_000),))
    with largest_file(50_000), pytest.raises(OSError) as caught:
        bundle.add_adapters({"three": writer})
    assert caught.value.filename == str(bundle.path / "adapters" / "three" / "weights.ptd")
    assert {name: data for name, data in tree(tmp_path).items() if not name.endswith(".lock")} == {
        name: data for name, data in before.items() if not name.endswith(".lock")
    }
