"""Adapters in a folder or a bucket."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

import bedplate
from bedplate.deploy.adapter_store import AdapterStore
from bedplate.deploy.listing import Listing
from bedplate.serve.errors import ApiError


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Of an empty store."""
    if request.param == "file":
        yield f"file://{tmp_path}/store"
    else:
        yield "memory://store"
    fs, root = fsspec.core.url_to_fs("memory://store")
    if fs.exists(root):
        fs.rm(root, recursive=True)


def put(url: str, name: str, weights: bytes = b"1", config: bytes = b"{}") -> None:
    fs, root = fsspec.core.url_to_fs(url)
    fs.makedirs(f"{root}/{name}", exist_ok=True)
    fs.pipe_file(f"{root}/{name}/adapter_config.json", config)
    fs.pipe_file(f"{root}/{name}/adapter_model.safetensors", weights)


def test_what_is_listed(url: str) -> None:
    for name in ("one", "two", ".hidden", "not a name", "base"):
        put(url, name)
    put(url, "one/checkpoint-5")  # of a training
    fs, root = fsspec.core.url_to_fs(url)
    fs.makedirs(f"{root}/incomplete")
    fs.pipe_file(f"{root}/incomplete/adapter_model.safetensors", b"1")
    fs.pipe_file(f"{root}/README.md", b"")
    found = AdapterStore(url, "0").list()
    assert list(found) == ["one", "two"]
    assert list(found["one"].files) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_stamp_changes_with_a_file(url: str) -> None:
    put(url, "one")
    put(url, "two")
    store = AdapterStore(url, "0")
    before = store.list()
    assert store.list() == before
    put(url, "two", b"2")  # of the same size
    after = store.list()
    assert after["one"] == before["one"] and after["two"].stamp != before["two"].stamp


def test_a_file_of_the_same_size_and_time(tmp_path: Path) -> None:
    put(str(tmp_path), "one")
    store, weights = AdapterStore(str(tmp_path), "0"), tmp_path / "one" / "adapter_model.safetensors"
    before, times = store.list(), weights.stat()
    weights.write_bytes(b"2")
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert store.list()["one"].stamp != before["one"].stamp


def test_an_adapter_is_fetched(url: str, tmp_path: Path) -> None:
    put(url, "one", b"123")
    store, folder = AdapterStore(url, "0"), tmp_path / "fetched"
    folder.mkdir()
    assert store.fetch("one", folder) == store.list()["one"]
    assert sorted(file.name for file in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert (folder / "adapter_model.safetensors").read_bytes() == b"123"
    with pytest.raises(bedplate.errors.NotFoundError, match="no adapter 'none'"):
        store.fetch("none", folder)


@pytest.mark.parametrize("changes", [1, 99])
def test_an_adapter_that_changes_while_it_is_read(
    changes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, folder = f"{tmp_path}/store", tmp_path / "fetched"
    put(url, "one")
    folder.mkdir()
    store, left = AdapterStore(url, "0"), list(range(changes))
    get_file = store._fs.get_file

    def changing(source: str, target: str) -> None:
        get_file(source, target)
        if left:
            put(url, "one", str(left.pop()).encode())

    monkeypatch.setattr(store._fs, "get_file", changing)
    if changes == 99:
        with pytest.raises(bedplate.errors.RunError, match="changes while it is read"):
            store.fetch("one", folder)
    else:
        store.fetch("one", folder)
        assert (folder / "adapter_model.safetensors").read_bytes() == b"0"


def test_a_store_that_is_not_there(url: str) -> None:
    with pytest.raises(bedplate.errors.NotFoundError, match="no folder of adapters"):
        AdapterStore(url, "0")
    put(url, "one")
    store = AdapterStore(url, "0")
    fs, root = fsspec.core.url_to_fs(url)
    fs.rm(root, recursive=True)
    with pytest.raises(FileNotFoundError):  # which is not an empty one
        store.list()


def test_names_are_looked_for(tmp_path: Path) -> None:
    put(str(tmp_path), "one")
    put(str(tmp_path), "own")

    async def run() -> None:
        listing = Listing(AdapterStore(str(tmp_path), "0"), {"own"}, every=60, stale=60)
        await listing.look()
        assert list(listing.found) == ["one"] and await listing.get("own") is None
        put(str(tmp_path), "two")
        found = await asyncio.gather(*(listing.get(name) for name in ("one", "two", "three")))
        assert [one and one.name for one in found] == ["one", "two", None]

    asyncio.run(run())


def test_a_store_that_cannot_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(str(tmp_path), "one")
    store = AdapterStore(str(tmp_path), "0")

    def fail() -> None:
        raise PermissionError("no")

    async def run() -> None:
        listing = Listing(store, (), every=60, stale=0.2)
        await listing.look()
        monkeypatch.setattr(store, "list", fail)
        await listing.look()
        assert await listing.get("one") is not None
        await asyncio.sleep(0.25)
        with pytest.raises(ApiError) as caught:
            await listing.get("one")
        assert caught.value.status == 503 and caught.value.headers["Retry-After"]

    asyncio.run(run())
