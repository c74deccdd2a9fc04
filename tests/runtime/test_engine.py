"""An engine: what it loads, what it holds, and what it refuses."""

from __future__ import annotations

import gc
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bedplate.bundle.store import Bundle
from bedplate.errors import BundleError, NotFoundError, RunError
from bedplate.runtime.cores import physical_cores
from bedplate.runtime.engine import Engine

TEXT = [5, 9, 13, 2, 7]


@pytest.fixture
def copy(toy_bundle: Bundle, tmp_path: Path) -> Bundle:
    """To be changed."""
    return Bundle.open(Path(shutil.copytree(toy_bundle.path, tmp_path / "copy.bundle")))


def test_weights_are_loaded_when_first_used(toy_bundle: Bundle) -> None:
    name = min(toy_bundle.adapters)
    with Engine(toy_bundle) as engine:
        session = engine.session(name)
        assert (engine.memory().foundation, engine.memory().adapters) == (0, {})
        session.step(TEXT)
        assert set(engine.memory().adapters) == {name}
        assert engine.load(name) is engine.load(name)
        assert engine.load() is engine.load()


def test_memory_says_what_is_there(toy_bundle: Bundle) -> None:
    with Engine(toy_bundle) as engine:
        session = engine.session()
        assert engine.memory().kv == 0
        session.step(TEXT)
        engine.load("all")
        after = engine.memory()
        assert after.kv == session.kv_bytes > 0
        held = sum(constant.nbytes for constant in toy_bundle.adapters["all"].info.constants)
        assert 0.5 * held < after.adapters["all"] < 1.5 * held
        assert 0 < after.foundation < 2 * toy_bundle.foundation.stat().st_size
        assert after.process > after.kv + after.foundation + after.adapters["all"]
        del session
        gc.collect()
        assert engine.memory().kv == 0


def test_keys_and_values_take_memory_as_it_is_needed(toy_bundle: Bundle) -> None:
    with Engine(toy_bundle) as engine:
        session, sizes = engine.session(), []
        for _ in range(200):
            session.step([1])
            sizes.append(session.kv_bytes)
        assert sizes == sorted(sizes) and sizes[0] < sizes[-1] / 3


def test_keys_and_values_of_16_bits_take_half_the_memory_and_change_little(toy_bundle: Bundle) -> None:
    logits, taken = {}, {}
    for kv in ("float16", "float32"):
        with Engine(toy_bundle, kv=kv) as engine:
            session = engine.session("all8")
            logits[kv], taken[kv] = session.logits(TEXT * 8), session.kv_bytes
    assert 2 * taken["float16"] == taken["float32"]
    difference = np.abs(logits["float16"] - logits["float32"])
    assert not np.array_equal(logits["float16"], logits["float32"])
    # A value is rounded by 1 in 2,048. What is more comes of activations that are then rounded to another code.
    assert np.median(difference) < 0.05 * logits["float32"].std()
    assert (logits["float16"].argmax(axis=1) == logits["float32"].argmax(axis=1)).mean() > 0.9


def test_keys_and_values_of_16_bits_beside_a_float_model(float_bundle: Bundle) -> None:
    logits = []
    for kv in ("float16", "float32"):
        with Engine(float_bundle, kv=kv) as engine:
            logits.append(engine.session().logits(TEXT * 8))
    difference = np.abs(logits[0] - logits[1])
    assert 0 < difference.max() < 2e-3 * np.abs(logits[1]).max()


def test_the_context_is_a_choice_of_the_run(toy_bundle: Bundle) -> None:
    most = toy_bundle.manifest.model["max_positions"]
    assert most > toy_bundle.manifest.model["max_context"], "which is that of its programs"
    with Engine(toy_bundle) as engine:
        assert engine.limits.max_context == most
        longest = engine.session().logits([1] * most)
        assert len(longest) == most
    with Engine(toy_bundle, max_context=9) as engine:
        np.testing.assert_array_equal(engine.session().logits([1] * 9), longest[:9])
        with pytest.raises(RunError, match=r"10 tokens do not fit the context of 9\nhint: .*max_context"):
            engine.session().step([1] * 10)


def test_an_unknown_adapter_names_those_there_are(toy_bundle: Bundle) -> None:
    with Engine(toy_bundle) as engine:
        known = ", ".join(sorted(toy_bundle.adapters))
        for ask in (engine.session, engine.load):
            with pytest.raises(NotFoundError, match=rf"no adapter 'nobody'\nhint: the bundle has: {known}"):
                ask("nobody")


@pytest.mark.parametrize("damage", ["cut short", "another's", "gone", "noise"])
def test_an_adapter_that_cannot_be_loaded_harms_no_other(copy: Bundle, damage: str) -> None:
    broken, whole = (copy.adapters[name] for name in ("all", "all2"))
    data = broken.weights.read_bytes()
    with Engine(copy) as engine:
        session = engine.session(whole.name)
        expected = session.step(TEXT)
        if damage == "cut short":
            broken.weights.write_bytes(data[:100])
        elif damage == "another's":
            shutil.copy(whole.weights, broken.weights)
        elif damage == "gone":
            broken.weights.unlink()
        else:
            broken.weights.write_bytes(np.random.default_rng(0).bytes(len(data)))
        with pytest.raises((BundleError, NotFoundError), match=r"weights\.ptd.*\nhint: ") as caught:
            engine.session(broken.name).step(TEXT)
        assert caught.value.where == str(broken.weights)
        session.reset()
        np.testing.assert_array_equal(session.step(TEXT), expected)
        assert set(engine.memory().adapters) == {whole.name}
        broken.weights.write_bytes(data)
        assert len(engine.session(broken.name).step(TEXT)) == engine.limits.vocab


@pytest.mark.parametrize("damaged", ["foundation.ptd", "foundation.json"])
@pytest.mark.parametrize("length", [0, 100, -1000])
def test_a_foundation_that_was_cut_short_since(copy: Bundle, damaged: str, length: int) -> None:
    file = copy.path / damaged
    file.write_bytes(file.read_bytes()[:length])
    with Engine(copy) as engine:
        with pytest.raises(BundleError, match=r"foundation\.(ptd|json).*\nhint: "):
            engine.load()
        assert engine.memory().foundation == 0


def test_a_foundation_that_is_gone(copy: Bundle) -> None:
    copy.foundation.unlink()
    with Engine(copy) as engine, pytest.raises(NotFoundError, match=r"foundation\.ptd.*\nhint: "):
        engine.load()


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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        *(({"threads": value}, "threads is ") for value in (0, -1, 1.5, "2", True, 2**31, 2**70)),
        *(({"max_context": value}, "max_context is ") for value in (0, -1, 257, 2.5, "8", True, 2**70)),
        *(({"kv": value}, "kv is ") for value in ("float8", None, 16)),
        *(({"bundle": value}, "bundle is ") for value in ("a/path", None)),
    ],
)
def test_arguments_that_are_wrong(toy_bundle: Bundle, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(RunError, match=rf"{says}.*\nhint: "):
        Engine(**{"bundle": toy_bundle, **arguments})


@pytest.mark.parametrize("name", [5, ["all"], b"all", True])
def test_a_name_that_is_none(toy_bundle: Bundle, name: Any) -> None:
    with Engine(toy_bundle) as engine:
        for ask in (engine.session, engine.load, engine.unload, engine.tokenizer_of):
            with pytest.raises(
                RunError, match=r"the adapter's name is .*\nhint: give text,.* or None for the base"
            ):
                ask(name)
        engine.unload("removed since")


def test_a_thread_for_each_core(toy_bundle: Bundle) -> None:
    with Engine(toy_bundle) as engine:
        assert engine.load().decoder.threads == physical_cores()
    with Engine(toy_bundle, threads=3) as engine:
        assert engine.load().decoder.threads == 3
