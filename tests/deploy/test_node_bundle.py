"""A bundle on a node, and adapters that come and go beside its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

import bedplate
from bedplate.deploy.adapter_store import AdapterStore, Found
from bedplate.deploy.node_bundle import cache_folder, local_bundle, name_of, own_view
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


def test_versions_of_an_adapter(
    toy_bundle: bedplate.Bundle, toy_adapters: dict[str, Path], tmp_path: Path
) -> None:
    with own_view(toy_bundle.path, tmp_path) as bundle, bedplate.Engine(bundle, threads=1) as engine:
        shelf = Shelf(bundle, engine)
        expected = {name: _said(engine, name) for name in ("all", "all2", None)}
        shelf.put(Found("one", {}, "first"), toy_adapters["all"])
        with shelf.hold("one") as first, shelf.hold("all") as own, shelf.hold("none") as none:
            assert first is not None and own == "all" and none is None
            # 8 bits are the default of this foundation, as `all8` has them.
            before = _said(engine, first)
            assert before == _said(engine, "all8")
            shelf.put(Found("one", {}, "second"), toy_adapters["all2"])
            with shelf.hold("one") as second:
                assert second is not None and second != first and _said(engine, second) != before
            assert _said(engine, first) == before and shelf.stamp("one") == "second"
            with pytest.raises(bedplate.errors.BedplateError):
                shelf.put(Found("one", {}, "broken"), tmp_path)
            assert shelf.stamp("one") == "second"
        assert first not in bundle.adapters and second in bundle.adapters  # nobody holds or means the first
        shelf.drop("one")
        shelf.drop("one")
        with shelf.hold("one") as gone:
            assert gone is None
        assert list(bundle.adapters) == list(toy_bundle.adapters) and shelf.names == []
        assert {name: _said(engine, name) for name in expected} == expected
    assert list(tmp_path.iterdir()) == []


def test_adapters_of_another_bundle(toy_bundle: bedplate.Bundle, tmp_path: Path) -> None:
    there = shutil.copytree(toy_bundle.path, tmp_path / "there.bundle")
    store = AdapterStore(str(there), toy_bundle.foundation_sha256)
    found = store.list()
    assert list(found) == list(toy_bundle.adapters) and not any(".pte" in file for file in found["all"].files)
    folder = tmp_path / "fetched"
    folder.mkdir()
    with (
        own_view(toy_bundle.path, tmp_path, adapters=False) as bundle,
        bedplate.Engine(bundle, threads=1) as engine,
        bedplate.Engine(toy_bundle, threads=1) as other,
    ):
        shelf = Shelf(bundle, engine)
        shelf.put(store.fetch("all2", folder), folder)
        with shelf.hold("all2") as local:
            assert local is not None and _said(engine, local) == _said(other, "all2")
            # Not packed again: the constants are the same.
            assert bundle.adapters[local].info.constants == toy_bundle.adapters["all2"].info.constants
    bedplate.Bundle.open(there).remove_adapter("all")
    after = store.list()
    assert "all" not in after and after["all2"].stamp == found["all2"].stamp
    (there / "adapters/all2/weights.ptd").write_bytes(b"")
    with pytest.raises(bedplate.errors.BundleError, match="cut short or overwritten"):
        store.fetch("all2", folder)
    with pytest.raises(bedplate.errors.BundleError, match="another foundation"):
        AdapterStore(str(there), "0")


def _said(engine: bedplate.Engine, adapter: str | None) -> str:
    return engine.session(adapter).generate("the fox", max_tokens=8)
