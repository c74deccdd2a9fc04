"""The unit cache: what goes in comes out, and what is damaged counts as absent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bedplate.compile.cache import Entry, UnitCache
from bedplate.constants import Constant, content_key


def entry(fill: int = 7) -> Entry:
    data = np.full(12, fill, np.uint8)
    key = content_key("float32", (3,), "tensor", data)
    constant = Constant(key=key, name="rope.cos", dtype="float32", shape=(3,), is_tensor=True, data=data)
    return Entry(program=b"program", fixed={"rope.cos": constant}, facts={"a": [1, 2]})


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    cache = UnitCache(tmp_path / "made")
    assert cache.load("units", "f" * 64) is None
    cache.store("units", "f" * 64, entry())
    loaded = cache.load("units", "f" * 64)
    assert loaded is not None
    assert (loaded.program, loaded.facts) == (b"program", {"a": [1, 2]})
    assert loaded.fixed["rope.cos"].key == entry().fixed["rope.cos"].key
    assert loaded.fixed["rope.cos"].shape == (3,)
    assert np.array_equal(loaded.fixed["rope.cos"].data, entry().fixed["rope.cos"].data)
    assert cache.load("program", "f" * 64) is None


def test_an_entry_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        UnitCache(tmp_path / name).store("units", "a" * 64, entry())
    one, two = (next((tmp_path / name).iterdir()).read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_entry_counts_as_absent(tmp_path: Path, damage: str) -> None:
    cache = UnitCache(tmp_path)
    cache.store("units", "a" * 64, entry())
    path = cache.entries()[0].path
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes({"truncated": data[:-1], "flipped": data, "empty": b""}[damage])
    assert cache.load("units", "a" * 64) is None
    cache.store("units", "a" * 64, entry())
    assert cache.load("units", "a" * 64) is not None


def test_clear_frees_what_list_shows(tmp_path: Path) -> None:
    cache = UnitCache(tmp_path)
    cache.store("units", "a" * 64, entry())
    cache.store("program", "b" * 64, entry())
    shown = cache.entries()
    assert [(info.kind, info.fingerprint[0]) for info in shown] == [("program", "b"), ("units", "a")]
    assert cache.clear() == sum(info.nbytes for info in shown)
    assert cache.entries() == []
