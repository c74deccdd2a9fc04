"""Nothing is keyed by a name: whatever takes another's name, or its keys, is computed by its own bytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from forged import flip, settle
from numpy.typing import NDArray
from toy import BuildToy

from bedplate.api import Bundle
from bedplate.errors import BundleError, NotFoundError
from bedplate.runtime.engine import Engine

TEXT = [5, 9, 13, 2, 7]
Logits = NDArray[np.float32]
Copy = Callable[[str], Bundle]


@pytest.fixture
def copy(toy_bundle: Bundle, tmp_path: Path) -> Copy:
    return lambda name: Bundle.open(shutil.copytree(toy_bundle.path, tmp_path / name))


def alone(bundle: Bundle, adapter: str | None) -> Logits:
    with Engine(bundle) as engine:
        return engine.session(adapter).step(TEXT)


class TestAnAdapterUnderItsName:
    @pytest.fixture
    def bundle(self, copy: Copy) -> Bundle:
        return copy("copy")

    @pytest.fixture
    def engine(self, bundle: Bundle) -> Engine:
        return Engine(bundle)

    @pytest.fixture
    def expected(self, toy_bundle: Bundle) -> dict[str, Logits]:
        found = {name: alone(toy_bundle, name) for name in ("all", "all2")}
        assert not np.array_equal(found["all"], found["all2"])
        return found

    @pytest.mark.parametrize("through", ["the same bundle", "another object"])
    @pytest.mark.parametrize("held", ["a session", "nothing"])
    def test_is_replaced(
        self,
        through: str,
        held: str,
        bundle: Bundle,
        engine: Engine,
        expected: dict[str, Logits],
        toy_adapters: dict[str, Path],
        unit_cache: Path,
    ) -> None:
        session = engine.session("all")
        np.testing.assert_array_equal(session.step(TEXT), expected["all"])
        if held == "nothing":
            session = engine.session("all")
        other = bundle if through == "the same bundle" else Bundle.open(bundle.path)
        other.remove("all")
        other.add(toy_adapters["all2"], name="all", quantize="none", unit_cache=unit_cache)
        if held == "a session":
            # What it holds is computed anew, too.
            np.testing.assert_array_equal(session.step([3]), alone_after(bundle, "all2", [*TEXT, 3]))
            session.reset()
        np.testing.assert_array_equal(session.step(TEXT), expected["all2"])
        logits = engine.step([(engine.session("all"), TEXT), (engine.session("all2"), TEXT)])
        np.testing.assert_array_equal(logits, np.stack([expected["all2"]] * 2))

    def test_a_generation_in_progress_goes_on_by_what_it_began_with(
        self, bundle: Bundle, engine: Engine, toy_adapters: dict[str, Path], unit_cache: Path
    ) -> None:
        settings = {"max_tokens": 20, "temperature": 50.0, "seed": 2}
        before = engine.session("all").generate("ab", **settings)
        session = engine.session("all")
        pieces = session.generate("ab", **settings, stream=True)
        text = next(pieces)
        bundle.remove("all")
        bundle.add(toy_adapters["all2"], name="all", quantize="none", unit_cache=unit_cache)
        assert engine.session("all").generate("ab", **settings) != before
        assert text + "".join(pieces) == before
        assert session.generate("ab", **settings) != before

    @pytest.mark.parametrize("through", ["the same bundle", "another object"])
    def test_is_removed(self, through: str, bundle: Bundle, engine: Engine) -> None:
        session = engine.session("all")
        session.step(TEXT)
        (bundle if through == "the same bundle" else Bundle.open(bundle.path)).remove("all")
        with pytest.raises(NotFoundError, match="no adapter 'all'\nhint: the bundle has: all2, all8"):
            session.step(TEXT)
        assert session.tokens == tuple(TEXT)

    def test_is_added_elsewhere(
        self,
        bundle: Bundle,
        engine: Engine,
        expected: dict[str, Logits],
        toy_adapters: dict[str, Path],
        unit_cache: Path,
    ) -> None:
        """Also one that was removed before, while the engine asked for it."""
        with pytest.raises(NotFoundError, match="no adapter 'later'"):
            engine.session("later")
        for source in ("all", "all2"):
            other = Bundle.open(bundle.path)
            other.add(toy_adapters[source], name="later", quantize="none", unit_cache=unit_cache)
            np.testing.assert_array_equal(engine.session("later").step(TEXT), expected[source])
            other.remove("later")
            with pytest.raises(NotFoundError, match="no adapter 'later'"):
                engine.session("later")

    def test_is_edited(self, bundle: Bundle, engine: Engine) -> None:
        """The engine does not answer by weights of which the file says something else now."""
        session = engine.session("all")
        session.step(TEXT)
        entry = bundle.adapters["all"]
        flip(entry.weights, entry.info.constants[0].key)
        with pytest.raises(BundleError, match=r"weights\.ptd: its SHA-256 is not the one in bundle\.json"):
            session.step(TEXT)
        assert session.tokens == tuple(TEXT)

    def test_of_the_whole_bundle(
        self, bundle: Bundle, engine: Engine, toy_model: Path, build_toy: BuildToy
    ) -> None:
        """By another one, in the same place: neither adapters nor the base are mixed with it."""
        expected = engine.session().step(TEXT)
        build_toy(toy_model, out=bundle.path, method="hqq", force=True)
        np.testing.assert_array_equal(engine.session().step(TEXT), expected)
        engine.unload()
        with pytest.raises(BundleError, match=r"foundation\.json: its SHA-256.*\nhint: .*open it again"):
            engine.session().step(TEXT)
        bundle.refresh()
        with pytest.raises(
            BundleError,
            match=r"the bundle was replaced after the engine was made\nhint: open the bundle again",
        ):
            engine.session().step(TEXT)
        with Engine(Bundle.open(bundle.path)) as new:
            assert not np.array_equal(new.session().step(TEXT), expected)


def alone_after(bundle: Bundle, adapter: str, tokens: list[int]) -> Logits:
    with Engine(bundle) as engine:
        return engine.session(adapter).step(tokens)


class TestBundlesWithOtherBytesUnderOneKey:
    """Which agree with themselves, so that opening them finds nothing."""

    @staticmethod
    def liar(bundle: Bundle, file: Path, infos: object, name: str) -> Bundle:
        """The bundle with other bytes under the key of one constant."""
        key = next(info.key for info in infos if info.name == name)  # type: ignore[attr-defined]
        flip(file, key, byte=3)
        settle(bundle.path)
        return Bundle.open(bundle.path)

    @pytest.fixture
    def other_foundation(self, copy: Copy) -> Bundle:
        bundle = copy("foundation")
        name = "layers.1.mlp.down_proj.weight#codes"
        return self.liar(bundle, bundle.foundation, bundle.foundation_info.constants, name)

    @pytest.fixture
    def other_adapter(self, copy: Copy) -> Bundle:
        bundle = copy("adapter")
        entry = bundle.adapters["all"]
        return self.liar(bundle, entry.weights, entry.info.constants, "layers.1.mlp.down_proj.lora_a.weight")

    @pytest.mark.parametrize("forged", ["other_foundation", "other_adapter"])
    @pytest.mark.parametrize("adapter", [None, "all"])
    @pytest.mark.parametrize("order", [1, -1])
    def test_neither_changes_the_others_logits(
        self, toy_bundle: Bundle, forged: str, adapter: str | None, order: int, request: pytest.FixtureRequest
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

    def test_an_adapter_beside_the_other_bundles_base(
        self, toy_bundle: Bundle, other_foundation: Bundle
    ) -> None:
        expected = alone(other_foundation, "all8")
        with Engine(toy_bundle) as one, Engine(other_foundation) as two:
            one.load()
            np.testing.assert_array_equal(two.session("all8").step(TEXT), expected)
