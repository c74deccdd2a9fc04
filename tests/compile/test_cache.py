"""The unit cache: what goes in comes out, what is damaged counts as absent, and what cannot be kept is told."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pytest
from power import PowerCuts

from bedplate.compile.cache import Entry, UnitCache
from bedplate.constants import TENSOR, Constant

NAME = "a" * 64


def entry(fill: int = 7) -> Entry:
    data = np.full(12, fill, np.uint8)
    constant = Constant.of("rope.cos", "float32", (3,), TENSOR, data)
    return Entry(program=b"program", fixed={"rope.cos": constant}, facts={"a": [1, 2]})


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    cache = UnitCache(tmp_path / "made")
    assert cache.load("units", "f" * 64) is None
    cache.store("units", "f" * 64, entry())
    loaded = cache.load("units", "f" * 64)
    assert loaded is not None
    assert (loaded.program, loaded.facts) == (b"program", {"a": [1, 2]})
    cos, expected = loaded.fixed["rope.cos"], entry().fixed["rope.cos"]
    assert (cos.key, cos.name, cos.dtype, cos.shape, cos.layout) == (
        expected.key,
        "rope.cos",
        "float32",
        (3,),
        TENSOR,
    )
    assert np.array_equal(cos.data, expected.data)
    assert cache.load("program", "f" * 64) is None


def test_an_entry_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        UnitCache(tmp_path / name).store("units", NAME, entry())
    one, two = (next((tmp_path / name).iterdir()).read_bytes() for name in ("one", "two"))
    assert one == two


def test_an_entry_is_whole_whenever_the_power_is_cut(tmp_path: Path) -> None:
    cache, name = UnitCache(tmp_path), f"units-{NAME}.unit"
    cache.store("units", NAME, entry(1))
    before = (tmp_path / name).read_bytes()
    with PowerCuts(tmp_path, lambda tree: tree[name]) as cuts:
        cache.store("units", NAME, entry(2))
        after = (tmp_path / name).read_bytes()
        assert cuts.durable() == after != before
    assert cuts.seen == {before, after}


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """The file of an entry `units` NAME."""
    cache = UnitCache(tmp_path / "units")
    cache.store("units", NAME, entry())
    return cache.entries()[0].path


def load(file: Path) -> Entry | None:
    return UnitCache(file.parent).load("units", NAME)


def test_a_flipped_bit_in_any_byte_makes_an_entry_absent(stored: Path) -> None:
    drawn = random.Random(0)
    with stored.open("r+b", buffering=0) as file:
        whole = file.read()
        for position, byte in enumerate(whole):
            flipped = byte ^ 1 << drawn.randrange(8)
            os.pwrite(file.fileno(), bytes([flipped]), position)
            assert load(stored) is None, f"byte {position} is {flipped}, not {byte}"
            os.pwrite(file.fileno(), bytes([byte]), position)
    assert load(stored) is not None


def test_an_entry_cut_anywhere_or_longer_is_absent(stored: Path) -> None:
    whole = stored.read_bytes()
    stored.write_bytes(whole + b"\0")
    assert load(stored) is None
    for length in reversed(range(len(whole))):
        os.truncate(stored, length)
        assert load(stored) is None, f"{length} bytes"


def test_a_damaged_entry_is_written_again(stored: Path) -> None:
    stored.write_bytes(b"")
    UnitCache(stored.parent).store("units", NAME, entry())
    assert load(stored) is not None


@pytest.mark.parametrize("name", [f"program-{NAME}", f"units-{'b' * 64}"])
def test_an_entry_of_another_name_is_absent(stored: Path, name: str) -> None:
    other = stored.rename(stored.with_name(f"{name}.unit"))
    kind, _, fingerprint = name.partition("-")
    assert UnitCache(stored.parent).load(kind, fingerprint) is None
    other.rename(stored)
    assert load(stored) is not None


def edited(whole: bytes, edit: Callable[[Any], Any]) -> bytes:
    """The entry with another header, and a digest that fits."""
    line, _, rest = whole[64:].partition(b"\n")
    header = json.loads(line)
    header = edit(header) or header
    content = json.dumps(header).encode() + b"\n" + rest
    return hashlib.sha256(content).hexdigest().encode() + content


FIELDS = ("kind", "fingerprint", "facts", "program", "fixed")
MALFORMED: list[Callable[[Any], Any]] = [
    *(lambda header, field=field: header.pop(field) and header for field in FIELDS),
    *(lambda header, value=value: [value] for value in (None, 7, "x", [])),
    *(lambda header, value=value: header.update(program=value) for value in (-1, 10**9, "7", None, 1.5)),
    *(lambda header, value=value: header.update(fixed=value) for value in (7, [7], [[]], {"a": 1}, ["x"])),
    *(
        lambda header, field=field: header["fixed"][0].pop(field) and header
        for field in ("key", "name", "dtype", "shape", "layout", "nbytes")
    ),
    *(
        lambda header, value=value: header["fixed"][0].update(value)
        for value in (
            {"nbytes": "x"},
            {"nbytes": 10**9},
            {"nbytes": -1},
            {"shape": 3},
            {"name": []},
            {"x": 1},
        )
    ),
]


@pytest.mark.parametrize("edit", MALFORMED)
def test_a_malformed_header_counts_as_absent(stored: Path, edit: Callable[[Any], Any]) -> None:
    """Also under a digest that fits, as another writer might have made it."""
    whole = stored.read_bytes()
    stored.write_bytes(edited(whole, lambda header: header))
    assert load(stored) is not None
    stored.write_bytes(edited(whole, edit))
    assert load(stored) is None


def test_clear_frees_what_list_shows(tmp_path: Path) -> None:
    cache = UnitCache(tmp_path)
    cache.store("units", NAME, entry())
    cache.store("program", "b" * 64, entry())
    shown = cache.entries()
    assert [(info.kind, info.fingerprint[0]) for info in shown] == [("program", "b"), ("units", "a")]
    assert cache.clear() == sum(info.nbytes for info in shown)
    assert cache.entries() == []


# --- Folders that cannot be used --------------------------------------------------------------------------------


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may have more than 100 bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def told_by(cache: UnitCache, notices: list[str]) -> str:
    """What a cache that keeps nothing says, in one notice however many entries it is given."""
    for kind in ("units", "program"):
        assert cache.load(kind, NAME) is None
        assert not cache.has(kind, NAME)
        cache.store(kind, NAME, entry())
        assert cache.load(kind, NAME) is None
    assert (cache.entries(), cache.clear()) == ([], 0)
    (notice,) = notices
    assert notice.startswith("compiled units are not kept, so the next command compiles again: ")
    return notice


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_in_the_folders_place(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    notices: list[str] = []
    notice = told_by(UnitCache(tmp_path / place, notice=notices.append), notices)
    assert str(tmp_path / place / f"units-{NAME}.unit") in notice
    assert (tmp_path / "file").read_text() == "mine"


def test_no_space_left(tmp_path: Path, small_files: None) -> None:
    notices: list[str] = []
    notice = told_by(UnitCache(tmp_path, notice=notices.append), notices)
    assert f"{tmp_path / f'units-{NAME}.unit'}: File too large" in notice
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_an_entrys_place(tmp_path: Path) -> None:
    (tmp_path / f"units-{NAME}.unit").mkdir()
    notices: list[str] = []
    cache = UnitCache(tmp_path, notice=notices.append)
    assert cache.load("units", NAME) is None
    cache.store("units", NAME, entry())
    assert "Is a directory" in notices[0]
    assert [path.name for path in tmp_path.iterdir()] == [f"units-{NAME}.unit"]


def test_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python then leaves the `~`, and `~/.cache` would be a folder of the one that the command runs in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: f"~/.cache/{name}")
    notices: list[str] = []
    assert "has no home folder" in told_by(UnitCache.default(notice=notices.append), notices)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_removed_meanwhile(tmp_path: Path) -> None:
    cache = UnitCache(tmp_path / "units")
    cache.store("units", NAME, entry())
    shutil.rmtree(tmp_path / "units")
    assert (cache.load("units", NAME), cache.entries(), cache.clear()) == (None, [], 0)
