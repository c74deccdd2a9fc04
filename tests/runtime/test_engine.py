from __future__ import annotations

import gc
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mapped import resident_of

from bedplate import _native
from bedplate.bundle.store import Bundle
from bedplate.errors import BundleError, NotFoundError, RunError
from bedplate.runtime.engine import Engine, physical_cores

TEXT = [5, 9, 13, 2, 7]


def test_programs_are_loaded_when_first_used(toy_bundle: Bundle) -> None:
    name = min(toy_bundle.adapters)
    with Engine(toy_bundle) as engine:
        session = engine.session(name)
        assert engine.memory().programs == {}
        session.step(TEXT)
        assert set(engine.memory().programs) == {name}
        assert engine.load(name) is engine.load(name)
        engine.load()
        assert set(engine.memory().programs) == {name, "base"}


def test_memory_says_what_is_touched(toy_bundle: Bundle) -> None:
    with Engine(toy_bundle) as engine:
        session = engine.session()
        before = engine.memory()
        assert (before.kv, before.activations) == (0, 0)
        session.step(TEXT)
        after = engine.memory()
        assert after.kv == session.kv_bytes > 0
        assert after.activations > 0
        assert after.process > after.kv + after.activations
        del session
        gc.collect()
        assert engine.memory().kv == 0


def test_an_unknown_adapter_names_those_there_are(toy_bundle: Bundle) -> None:
    with Engine(toy_bundle) as engine:
        known = ", ".join(sorted(toy_bundle.adapters))
        for ask in (engine.session, engine.load):
            with pytest.raises(NotFoundError, match=rf"no adapter 'nobody'\nhint: the bundle has: {known}"):
                ask("nobody")


def test_a_program_that_cannot_be_loaded_harms_no_other(toy_bundle: Bundle, tmp_path: Path) -> None:
    copy = Bundle.open(Path(shutil.copytree(toy_bundle.path, tmp_path / "copy.bundle")))
    broken, whole = sorted(copy.adapters)[:2]
    weights = copy.adapters[broken].weights
    weights.write_bytes(weights.read_bytes()[:100])
    with Engine(copy) as engine:
        session = engine.session(whole)
        expected = session.step(TEXT)
        with pytest.raises(BundleError, match=r"weights\.ptd"):
            engine.session(broken).step(TEXT)
        session.reset()
        np.testing.assert_array_equal(session.step(TEXT), expected)
        assert set(engine.memory().programs) == {whole}


def test_a_data_file_that_was_replaced_is_read_anew(toy_bundle: Bundle, tmp_path: Path) -> None:
    copy = Bundle.open(Path(shutil.copytree(toy_bundle.path, tmp_path / "copy.bundle")))
    one, other = (copy.adapters[name] for name in sorted(copy.adapters)[:2])
    with Engine(copy) as engine:
        engine.load(one.name)
        engine.unload(one.name)
        one.weights.unlink()
        shutil.copy(other.weights, one.weights)
        with pytest.raises(RunError, match="of its constants"):
            engine.load(one.name)


def test_what_is_packed_or_read_leaves_no_page_of_its_file_in_memory(toy_bundle: Bundle) -> None:
    with Engine(toy_bundle) as engine:
        engine.load()
        assert resident_of(toy_bundle.foundation) == [0]  # which is mapped once
        session = engine.session()
        for tokens in (TEXT, TEXT[:1]):
            session.step(tokens)
            assert resident_of(toy_bundle.foundation) == [0]


def test_a_program_whose_constants_are_elsewhere_harms_no_other(toy_bundle: Bundle, tmp_path: Path) -> None:
    copy = Bundle.open(Path(shutil.copytree(toy_bundle.path, tmp_path / "copy.bundle")))
    broken, whole = (copy.adapters[name] for name in sorted(copy.adapters)[:2])
    shutil.copy(whole.weights, broken.weights)
    with Engine(copy) as engine:
        expected = engine.session(whole.name).step(TEXT)
        hint = rf"hint: bedplate verify.*{broken.weights}"
        with pytest.raises(RunError, match=rf"no data file holds \d+ of its constants.*\n{hint}") as caught:
            engine.load(broken.name)
        assert caught.value.where == str(broken.program)
        np.testing.assert_array_equal(engine.session(whole.name).step(TEXT), expected)
        assert set(engine.memory().programs) == {whole.name}


def test_a_file_that_is_gone(toy_bundle: Bundle, tmp_path: Path) -> None:
    copy = Bundle.open(Path(shutil.copytree(toy_bundle.path, tmp_path / "copy.bundle")))
    with Engine(copy) as engine:
        copy.base_program.unlink()
        with pytest.raises(RunError, match=r"base\.pte: it cannot be read: No such file.*\nhint: "):
            engine.load()


class TestUnload:
    def test_what_is_used_again_is_loaded_again(self, toy_bundle: Bundle) -> None:
        with Engine(toy_bundle) as engine:
            session = engine.session()
            expected = session.step(TEXT)
            engine.unload()
            assert engine.memory().programs == {}
            session.reset()
            np.testing.assert_array_equal(session.step(TEXT), expected)

    def test_keys_and_values_of_the_former_load_are_not_used(self, toy_bundle: Bundle) -> None:
        with Engine(toy_bundle) as engine:
            session, other = engine.session(), engine.session()
            session.step(TEXT[:3])
            other.generate("abcd", max_tokens=1)
            engine.unload()
            np.testing.assert_array_equal(session.step(TEXT[3:]), engine.session().step(TEXT))
            other.generate("abcd", max_tokens=1)
            assert other.last is not None and other.last.reused_tokens == 0

    def test_a_running_generation_keeps_its_program(self, toy_bundle: Bundle) -> None:
        settings = {"max_tokens": 20, "temperature": 50.0, "seed": 2}
        with Engine(toy_bundle) as engine:
            expected = engine.session().generate("ab", **settings)
            pieces = engine.session().generate("ab", **settings, stream=True)
            text = next(pieces)
            engine.unload()
            assert text + "".join(pieces) == expected

    def test_the_base_may_go_while_adapters_stay(self, toy_bundle: Bundle) -> None:
        with Engine(toy_bundle) as engine:
            session = engine.session(min(toy_bundle.adapters))
            engine.load()
            expected = session.step(TEXT)
            engine.unload()
            gc.collect()
            session.reset()
            np.testing.assert_array_equal(session.step(TEXT), expected)


def test_sessions_of_many_threads_do_not_touch_each_other(toy_bundle: Bundle) -> None:
    names = [None, *sorted(toy_bundle.adapters)[:2]]
    prompts = ["ab", "xyz", "hello"]
    with Engine(toy_bundle) as engine:
        jobs = [(name, prompt) for name in names for prompt in prompts]
        expected = [engine.session(name).generate(prompt, max_tokens=8) for name, prompt in jobs]
        got: dict[int, str] = {}

        def work(i: int) -> None:
            name, prompt = jobs[i]
            got[i] = engine.session(name).generate(prompt, max_tokens=8)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [got[i] for i in range(len(jobs))] == expected


def test_the_weight_cache_changes_no_result(toy_bundle: Bundle) -> None:
    for name in [None, *toy_bundle.adapters]:
        results = []
        for cache in (True, False):
            with Engine(toy_bundle, weight_cache=cache) as engine:
                results.append(engine.session(name).step(TEXT))
        np.testing.assert_array_equal(*results)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        *(({"threads": value}, "threads is ") for value in (0, -1, 1.5, "2", True, 2**31, 2**70)),
        ({"weight_cache": 1}, "weight_cache is 1"),
        ({"packed_cache": 5}, "packed_cache is 5"),
        *(({"bundle": value}, "bundle is ") for value in ("a/path", None)),
    ],
)
def test_arguments_of_the_wrong_type(toy_bundle: Bundle, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(RunError, match=rf"{says}.*\nhint: "):
        Engine(**{"bundle": toy_bundle, **arguments})


@pytest.mark.parametrize("name", [5, ["all"], b"all", True])
def test_a_name_that_is_none(toy_bundle: Bundle, name: Any) -> None:
    with Engine(toy_bundle) as engine:
        for ask in (engine.session, engine.load, engine.unload, engine.limits, engine.tokenizer_of):
            with pytest.raises(
                RunError, match=r"the adapter's name is .*\nhint: give text, or None for the base"
            ):
                ask(name)
        engine.unload("removed since")


def test_threads(toy_bundle: Bundle) -> None:
    with Engine(toy_bundle) as engine:
        assert _native.threads() == physical_cores()
        expected = engine.session().step(TEXT)
    with Engine(toy_bundle, threads=1) as engine:
        assert _native.threads() == 1
        np.testing.assert_array_equal(engine.session().step(TEXT), expected)
    _native.set_threads(physical_cores())
