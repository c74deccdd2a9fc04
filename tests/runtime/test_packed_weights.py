from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from forged import flip
from mapped import resident_of
from numpy.typing import NDArray
from power import PowerCuts

from bedplate.bundle.store import Bundle
from bedplate.errors import BundleError, RunError
from bedplate.runtime import packed_weights
from bedplate.runtime.engine import Engine

TEXT = [5, 9, 13, 2, 7]


def logits(bundle: Bundle, folder: Path | None, adapter: str | None = None) -> NDArray[np.float32]:
    with Engine(bundle, packed_cache=folder) as engine:
        return engine.session(adapter).step(TEXT)


@pytest.fixture(scope="module")
def expected(toy_bundle: Bundle) -> dict[str | None, NDArray[np.float32]]:
    return {name: logits(toy_bundle, None, name) for name in (None, *toy_bundle.adapters)}


@pytest.fixture
def kept(toy_bundle: Bundle, tmp_path: Path) -> Path:
    """The file that the first engine leaves."""
    logits(toy_bundle, tmp_path / "packed")
    (file,) = (tmp_path / "packed").iterdir()
    return file


def test_what_is_mapped_computes_the_same_as_what_is_packed(
    toy_bundle: Bundle, kept: Path, expected: dict[str | None, NDArray[np.float32]]
) -> None:
    for name, alone in expected.items():
        np.testing.assert_array_equal(logits(toy_bundle, kept.parent, name), alone)


def test_a_step_reads_its_weights_from_the_file(toy_bundle: Bundle, kept: Path) -> None:
    with Engine(toy_bundle, packed_cache=kept.parent) as engine:
        engine.load()
        before = sum(resident_of(kept))
        engine.session().step(TEXT)
        assert before < kept.stat().st_size / 2 < sum(resident_of(kept))
    assert str(kept) not in Path("/proc/self/maps").read_text()


def test_the_file_holds_the_foundation_alone_whatever_is_loaded(toy_bundle: Bundle, tmp_path: Path) -> None:
    sizes = []
    for names in ([None], [*toy_bundle.adapters, None]):
        folder = tmp_path / str(len(names))
        with Engine(toy_bundle, packed_cache=folder) as engine:
            for name in names:
                engine.load(name)
        (file,) = folder.iterdir()
        sizes.append((file.name, file.stat().st_size))
    assert sizes[0] == sizes[1]  # the name tells the SHA-256: the same bytes


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_file_is_written_again(
    toy_bundle: Bundle, kept: Path, expected: dict[str | None, NDArray[np.float32]], damage: str
) -> None:
    whole = kept.read_bytes()
    kept.chmod(0o644)
    middle = len(whole) // 2
    kept.write_bytes(
        {
            "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "cut": whole[:middle],
            "empty": b"",
        }[damage]
    )
    np.testing.assert_array_equal(logits(toy_bundle, kept.parent), expected[None])
    assert [file.read_bytes() for file in kept.parent.iterdir()] == [whole]


def test_it_is_whole_whenever_the_power_is_cut(toy_bundle: Bundle, tmp_path: Path) -> None:
    with PowerCuts(tmp_path, lambda tree: frozenset(tree.items())) as cuts:
        logits(toy_bundle, tmp_path)
        (file,) = tmp_path.iterdir()
        after = frozenset({(file.name, file.read_bytes())})
        assert cuts.durable() == after
    assert cuts.seen == {frozenset(), after}


@pytest.mark.parametrize("damaged", ["foundation.ptd", "base.pte"])
def test_it_is_not_made_of_a_damaged_foundation(
    toy_bundle: Bundle,
    tmp_path: Path,
    expected: dict[str | None, NDArray[np.float32]],
    damaged: str,
) -> None:
    """Whoever opens a bundle without checks does not hash it; what is written for later processes is."""
    copy = Path(shutil.copytree(toy_bundle.path, tmp_path / "copy"))
    whole = (copy / damaged).read_bytes()
    (copy / damaged).write_bytes(whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:])
    with (
        Engine(Bundle.open(copy, check=False), packed_cache=tmp_path / "packed") as engine,
        pytest.raises(BundleError, match=rf"{damaged}: its SHA-256 is not the one in bundle\.json") as caught,
    ):
        engine.load()
    assert caught.value.hint is not None and "build the bundle again" in caught.value.hint
    assert list((tmp_path / "packed").iterdir()) == []
    (copy / damaged).write_bytes(whole)
    np.testing.assert_array_equal(logits(Bundle.open(copy), tmp_path / "packed"), expected[None])


def test_what_a_foundation_became_since_changes_no_packed_weight(
    toy_bundle: Bundle, kept: Path, tmp_path: Path, expected: dict[str | None, NDArray[np.float32]]
) -> None:
    """The file holds what was packed of the whole foundation, whatever lies in its place now."""
    copy = Path(shutil.copytree(toy_bundle.path, tmp_path / "copy"))
    infos = toy_bundle.foundation_info.constants
    flip(
        copy / "foundation.ptd",
        next(info.key for info in infos if info.name == "layers.1.mlp.up_proj.weight#codes"),
    )
    written = kept.read_bytes()
    damaged = Bundle.open(copy, check=False)
    assert not np.array_equal(logits(damaged, None), expected[None])
    np.testing.assert_array_equal(logits(damaged, kept.parent), expected[None])
    assert [file.read_bytes() for file in kept.parent.iterdir()] == [written]


def test_processes_use_it_at_once_and_leave_it_as_it_is(toy_bundle: Bundle, kept: Path) -> None:
    """ExecuTorch alone would lock it for the first of them, and the others would pack."""
    whole = kept.read_bytes()
    code = (
        "import sys, bedplate\n"
        "with bedplate.Engine(bedplate.Bundle.open(sys.argv[1]), packed_cache=sys.argv[2]) as engine:\n"
        "    for name in (None, *engine.bundle.adapters): engine.load(name)\n"
        "    print(sys.argv[3] in open('/proc/self/maps').read(), flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, toy_bundle.path, kept.parent, kept]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    assert [process.stdout.readline() for process in processes if process.stdout] == ["True\n", "True\n"]
    for process in processes:
        process.communicate("")
        assert process.returncode == 0
    assert kept.read_bytes() == whole


def test_bundles_share_a_folder(toy_bundle: Bundle, float_bundle: Bundle, kept: Path) -> None:
    np.testing.assert_array_equal(logits(float_bundle, kept.parent), logits(float_bundle, None))
    assert len(list(kept.parent.iterdir())) == 2


def test_another_processor_gets_a_file_of_its_own(
    toy_bundle: Bundle, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_weights, "_processor_features", lambda: "flags: others")
    logits(toy_bundle, kept.parent)
    assert len(list(kept.parent.iterdir())) == 2


def test_a_session_of_a_closed_engine_maps_them_again(toy_bundle: Bundle, kept: Path) -> None:
    written = kept.stat()
    with Engine(toy_bundle, packed_cache=kept.parent) as engine:
        session = engine.session()
        before = session.step(TEXT)
        assert is_mapped(kept)
    session.reset()
    assert not is_mapped(kept)
    np.testing.assert_array_equal(session.step(TEXT), before)
    assert is_mapped(kept)
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    engine.close()
    assert not is_mapped(kept)


def is_mapped(file: Path) -> bool:
    return str(file) in Path("/proc/self/maps").read_text()


def test_a_file_that_is_removed_while_in_use_is_written_again(toy_bundle: Bundle, kept: Path) -> None:
    with Engine(toy_bundle, packed_cache=kept.parent) as engine:
        before = engine.session().step(TEXT)
        kept.unlink()
        engine.unload()
        np.testing.assert_array_equal(engine.session().step(TEXT), before)
    assert kept.exists()


def test_an_engine_may_be_closed_before_it_has_loaded_anything(toy_bundle: Bundle, kept: Path) -> None:
    Engine(toy_bundle, packed_cache=kept.parent).close()
    assert kept.exists()


class TestRefused:
    def test_a_folder_that_is_none(self, toy_bundle: Bundle, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.touch()
        with pytest.raises(
            RunError, match=r"file: packed weights cannot be kept there: .*\nhint: choose a folder"
        ):
            Engine(toy_bundle, packed_cache=file)

    def test_a_path_that_executorch_would_cut(self, toy_bundle: Bundle, tmp_path: Path) -> None:
        with pytest.raises(
            RunError, match=r"too long for packed weights\nhint: choose a path of at most \d+ bytes"
        ):
            Engine(toy_bundle, packed_cache=tmp_path / ("x" * 200))

    @pytest.fixture
    def full_disk(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
        yield

    def test_no_room(self, toy_bundle: Bundle, tmp_path: Path, full_disk: None) -> None:
        with (
            Engine(toy_bundle, packed_cache=tmp_path) as engine,
            pytest.raises(RunError, match=r"MB, but only 0 MB are free\nhint: free some space"),
        ):
            engine.load()
        assert list(tmp_path.iterdir()) == []

    def test_without_a_weight_cache(self, toy_bundle: Bundle, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="packed_cache needs the weight cache"):
            Engine(toy_bundle, packed_cache=tmp_path, weight_cache=False)
