"""A bundle on a node, and adapters that come and go beside its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

import bedplate
from bedplate.bundle.overlay import Overlay
from bedplate.deploy.adapter_store import AdapterStore, Found
from bedplate.deploy.node_bundle import cache_folder, local_bundle, name_of
from bedplate.deploy.shelf import Shelf


@pytest.fixture
def url(toy_bundle: bedplate.Bundle) -> Iterator[str]:
    """Of a bundle that is elsewhere."""
    fs = fsspec.filesystem("memory")
    fs.put(str(toy_bundle.path), "/bucket/toy.bundle", recursive=True)
    yield "memory://bucket/toy.bundle"
    fs.rm("/bucket", recursive=True)


def test_a_bundle_is_fetched_once(
    url: str, tmp_path: Path, toy_bundle: bedplate.Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, fs = cache_folder(str(tmp_path / "cache")), fsspec.filesystem("memory")
    fetched: list[str] = []
    get_file = type(fs).get_file

    def counted(self: object, source: str, target: str) -> None:
        fetched.append(source)
        get_file(self, source, target)

    monkeypatch.setattr(type(fs), "get_file", counted)
    with ThreadPoolExecutor(2) as threads:
        folder, same = threads.map(lambda _: local_bundle(url, cache), range(2))
    assert folder == same and len(set(fetched)) == len(fetched) > 5
    assert not any(source.endswith(".pte") for source in fetched)
    bundle = bedplate.Bundle.open(folder)
    assert bundle.foundation_sha256 == toy_bundle.foundation_sha256
    assert list(bundle.adapters) == list(toy_bundle.adapters) and bundle.base_program is None


def test_a_bundle_that_is_damaged_on_the_way(url: str, tmp_path: Path) -> None:
    cache, fs = cache_folder(str(tmp_path / "cache")), fsspec.filesystem("memory")
    data = bytearray(fs.cat_file("/bucket/toy.bundle/foundation.ptd"))
    data[-1] ^= 1
    fs.pipe_file("/bucket/toy.bundle/foundation.ptd", bytes(data))
    with pytest.raises(bedplate.errors.BundleError, match="SHA-256"):
        local_bundle(url, cache)
    assert not list(cache.glob("bundle-*"))
    with pytest.raises(bedplate.errors.NotFoundError, match=r"no bundle\.json"):
        local_bundle("memory://bucket/nothing", cache)


def test_names() -> None:
    assert name_of("s3://models/llama.bundle/") == "llama" and name_of("/data/toy") == "toy"


@pytest.fixture
def shelf(toy_bundle: bedplate.Bundle, tmp_path: Path) -> Iterator[tuple[Shelf, bedplate.Engine]]:
    """Of the toy bundle, and its engine."""
    bundle = Overlay.open(toy_bundle.path, check=False)
    (tmp_path / "files").mkdir()
    with bedplate.Engine(bundle, threads=1) as engine:
        shelf = Shelf(bundle, engine, tmp_path / "files")
        yield shelf, engine
        shelf.close()
    assert not list((tmp_path / "files").iterdir())


def test_versions_of_an_adapter(
    shelf: tuple[Shelf, bedplate.Engine], toy_adapters: dict[str, Path], tmp_path: Path
) -> None:
    there, engine = shelf
    there.put(Found("one", {}, "first"), toy_adapters["all"])
    there.keep("one")
    # 8 bits are the default of this foundation, as `all8` has them.
    fixed, expected = engine.fixed("one"), _said(engine, "all8")
    assert _said(engine, "one") == fixed.session().generate("the fox", max_tokens=8) == expected
    there.put(Found("one", {}, "second"), toy_adapters["all2"])
    assert there.stamp("one") == "second" and _said(engine, "one") != expected
    assert fixed.session().generate("the fox", max_tokens=8) == expected  # of a request that has begun
    with pytest.raises(bedplate.errors.AdapterError):
        there.put(Found("one", {}, "broken"), tmp_path)
    assert there.stamp("one") == "second"
    with there.hold("one"):
        there.drop("one")
        assert _said(engine, "one") != expected and there.names == ["one"]
    assert there.names == [] and "one" not in engine.bundle.adapters


def test_an_adapter_that_is_kept_stays(
    shelf: tuple[Shelf, bedplate.Engine], toy_adapters: dict[str, Path]
) -> None:
    there, engine = shelf
    for name in ("one", "two"):
        with there.hold(name):
            there.put(Found(name, {}, "first"), toy_adapters["all"])
            if name == "one":
                there.keep(name)
    assert there.names == ["one"] == list(engine.bundle.adapters.keys() - there.own)
    for name in ("one", "one", "none", "all"):
        there.drop(name)
    assert there.names == [] and _said(engine, "all")


def test_adapters_of_another_bundle(
    shelf: tuple[Shelf, bedplate.Engine], toy_bundle: bedplate.Bundle, tmp_path: Path
) -> None:
    there, engine = shelf
    other = bedplate.Bundle.open(shutil.copytree(toy_bundle.path, tmp_path / "other.bundle"))
    other.merge({"all": 1, "all2": 1}, name="both", programs=False)
    store = AdapterStore(str(other.path), toy_bundle.foundation_sha256)
    found = store.list()
    assert list(found) == ["all", "all2", "all8", "both"] and store.folder == f"{other.path}/adapters"
    assert not any(".pte" in file for file in found["all"].files)
    folder = tmp_path / "fetched"
    folder.mkdir()
    there.put(store.fetch("both", folder), folder)
    # Not packed again: the constants are the same.
    assert engine.bundle.adapters["both"].info == other.adapters["both"].info
    assert _said(engine, "both") == engine.session({"all": 1, "all2": 1}).generate("the fox", max_tokens=8)
    there.drop("both")
    other.remove_adapter("all")
    after = store.list()
    assert "all" not in after and after["all2"].stamp == found["all2"].stamp
    (other.path / "adapters/all2/weights.ptd").write_bytes(b"")
    with pytest.raises(bedplate.errors.BundleError, match="cut short or overwritten"):
        store.fetch("all2", folder)
    with pytest.raises(bedplate.errors.BundleError, match="another foundation"):
        AdapterStore(str(other.path), "0")


def _said(engine: bedplate.Engine, adapter: str | None) -> str:
    return engine.session(adapter).generate("the fox", max_tokens=8)
