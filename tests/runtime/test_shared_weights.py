"""Bundles in one process whose files hold different bytes under one key: each computes with its own."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from forged import flip, settle
from numpy.typing import NDArray

from bedplate.bundle.store import Bundle
from bedplate.errors import RunError
from bedplate.runtime import shared_weights
from bedplate.runtime.engine import Engine
from bedplate.runtime.shared_weights import DataFile, share

TEXT = [5, 9, 13, 2, 7]
Logits = NDArray[np.float32]
Copy = Callable[[str], Bundle]


@pytest.fixture
def copy(toy_bundle: Bundle, tmp_path: Path) -> Copy:
    return lambda name: Bundle.open(shutil.copytree(toy_bundle.path, tmp_path / name))


def liar(bundle: Bundle, file: Path, infos: object, name: str) -> Bundle:
    """The bundle with other bytes under the key of one constant."""
    key = next(info.key for info in infos if info.name == name)  # type: ignore[attr-defined]
    flip(file, key, byte=3)
    settle(bundle.path)
    return Bundle.open(bundle.path)


@pytest.fixture
def other_foundation(copy: Copy) -> Bundle:
    bundle = copy("foundation")
    name = "layers.1.mlp.down_proj.weight#codes"
    return liar(bundle, bundle.foundation, bundle.foundation_info.constants, name)


@pytest.fixture
def other_adapter(copy: Copy) -> Bundle:
    bundle = copy("adapter")
    entry = bundle.adapters["all"]
    return liar(bundle, entry.weights, entry.info.constants, "layers.1.mlp.down_proj.lora_a.weight")


def alone(bundle: Bundle, adapter: str | None) -> Logits:
    with Engine(bundle, weight_cache=False) as engine:
        return engine.session(adapter).step(TEXT)


@pytest.mark.parametrize("forged", ["other_foundation", "other_adapter"])
@pytest.mark.parametrize("adapter", [None, "all"])
@pytest.mark.parametrize("order", [1, -1])
def test_neither_changes_the_others_logits(
    toy_bundle: Bundle, forged: str, adapter: str | None, order: int, request: pytest.FixtureRequest
) -> None:
    bundles = [toy_bundle, request.getfixturevalue(forged)][::order]
    expected = [alone(bundle, adapter) for bundle in bundles]
    assert np.array_equal(*expected) == (forged == "other_adapter" and adapter is None)
    with Engine(bundles[0]) as one, Engine(bundles[1]) as two:
        sessions = [engine.session(adapter) for engine in (one, two)]
        for _ in range(2):
            for session, logits in zip(sessions, expected, strict=True):
                session.reset()
                np.testing.assert_array_equal(session.step(TEXT), logits)
                two.unload(adapter)


def test_an_adapter_beside_the_other_bundles_base(toy_bundle: Bundle, other_foundation: Bundle) -> None:
    """The base of one bundle is loaded, then an adapter of the other, whose keys are mostly the base's."""
    expected = alone(other_foundation, "all8")
    with Engine(toy_bundle) as one, Engine(other_foundation) as two:
        one.load()
        np.testing.assert_array_equal(two.session("all8").step(TEXT), expected)
        assert two.load("all8").uses is None
        assert one.load("all8").uses is not None


def test_copies_of_a_bundle_share(toy_bundle: Bundle, copy: Copy) -> None:
    with Engine(toy_bundle) as one, Engine(copy("same")) as two:
        for name in (None, "all"):
            assert one.load(name).uses is not None and two.load(name).uses is not None
        np.testing.assert_array_equal(one.session("all").step(TEXT), two.session("all").step(TEXT))


def test_what_nobody_uses_any_more_is_in_nobodys_way(toy_bundle: Bundle, other_foundation: Bundle) -> None:
    with Engine(toy_bundle) as one, Engine(other_foundation) as two:
        one.load()
        assert two.load().uses is None
        one.close()
        two.unload()
        gc.collect()
        assert two.load().uses is not None
        np.testing.assert_array_equal(two.session().step(TEXT), alone(other_foundation, None))


def test_a_sharer_keeps_the_bytes_in_use(toy_bundle: Bundle, copy: Copy, other_foundation: Bundle) -> None:
    """The copy computes with what the first has packed, also when the first has gone."""
    with Engine(toy_bundle) as one, Engine(copy("same")) as two, Engine(other_foundation) as three:
        one.load()
        two.load()
        one.close()
        gc.collect()
        assert three.load().uses is None


def test_a_file_that_was_changed_since_it_was_loaded_shares_nothing(copy: Copy) -> None:
    bundle = copy("changed")
    with Engine(bundle) as engine:
        before = engine.session().step(TEXT)
        changed = liar(
            bundle, bundle.foundation, bundle.foundation_info.constants, "layers.0.mlp.up_proj.weight#codes"
        )
        with Engine(changed) as other:
            after = other.session().step(TEXT)
            assert other.load().uses is None
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(after, alone(changed, None))


def test_packed_weights_on_disk_serve_only_whom_they_fit(
    toy_bundle: Bundle, other_foundation: Bundle, tmp_path: Path
) -> None:
    expected = alone(other_foundation, None)
    with Engine(toy_bundle) as one, Engine(other_foundation, packed_cache=tmp_path / "packed") as two:
        one.load()
        with pytest.raises(RunError, match="hold other bytes under the same keys\nhint: bedplate verify"):
            two.load()
        assert list((tmp_path / "packed").iterdir()) == []
        one.close()
        np.testing.assert_array_equal(two.session().step(TEXT), expected)
        two.close()
        one.load()
        np.testing.assert_array_equal(two.session().step(TEXT), expected)


def test_a_load_that_fails_may_have_left_weights_in_the_cache(
    toy_bundle: Bundle, copy: Copy, other_foundation: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_weights, "_kept", set())
    cut = copy("cut")
    program = cut.base_program.read_bytes()
    cut.base_program.write_bytes(program[:-4000])
    with Engine(cut) as engine, pytest.raises(RunError):
        engine.load()
    gc.collect()
    assert share([DataFile.at(other_foundation.foundation)]) is None
    assert share([DataFile.at(toy_bundle.foundation)]) is not None
