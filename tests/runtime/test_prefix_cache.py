"""What the cache has is never computed again. Answers are the same to the bit: it goes by content, not by names."""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bedplate.api import Bundle
from bedplate.errors import RunError
from bedplate.runtime.engine import Engine
from bedplate.runtime.prefix_cache import POSITIONS, digest, digests
from bedplate.runtime.session import Session
from bedplate.runtime.weights import Weights

# Of two blocks and a part.
TEXT = [int(token) for token in np.random.default_rng(3).integers(2, 320, 150)]
NAMES = [None, "all", "all2", "all8"]
Logits = NDArray[np.float32]


@pytest.fixture
def engine(toy_bundle: Bundle) -> Iterator[Engine]:
    with Engine(toy_bundle) as engine:
        yield engine


@pytest.fixture(scope="module")
def without(toy_bundle: Bundle) -> Iterator[Engine]:
    """Its sessions compute everything themselves."""
    with Engine(toy_bundle, cache_bytes=0) as engine:
        yield engine


def block_bytes(engine: Engine) -> int:
    return engine.load().new_kv(False).block_nbytes


def reused(session: Session) -> int:
    assert session.last is not None
    return session.last.reused_tokens


def prompt_of(engine: Engine, count: int = 150) -> str:
    """A text of so many tokens."""
    text = "the lazy dog jumps over five dozen liquor jugs, and so does the quick brown fox with my box. " * 9
    ids = engine.tokenizer.encode(text)[:count]
    prompt = engine.tokenizer.decode(ids)
    assert engine.tokenizer.encode(prompt) == ids
    return prompt


class TestOnePrompt:
    def test_of_a_second_session_begins_with_the_blocks_of_the_first(
        self, engine: Engine, without: Engine
    ) -> None:
        prompt = prompt_of(engine)
        expected = without.session().generate(prompt, max_tokens=20)
        for known in (0, 2 * POSITIONS):
            session = engine.session()
            assert session.generate(prompt, max_tokens=20) == expected
            assert reused(session) == known
        assert engine.session().generate(prompt + "!", max_tokens=5) == without.session().generate(
            prompt + "!", max_tokens=5
        )

    @pytest.mark.parametrize("count", [POSITIONS - 1, POSITIONS, POSITIONS + 1, 2 * POSITIONS])
    def test_of_which_the_last_token_is_always_computed(
        self, engine: Engine, without: Engine, count: int
    ) -> None:
        expected = without.session().step(TEXT[:count])
        for _ in range(3):
            np.testing.assert_array_equal(engine.session().step(TEXT[:count]), expected)
        prompt = prompt_of(engine, count)
        for known in (0, min(count - 1, count // POSITIONS * POSITIONS)):
            session = engine.session()
            session.generate(prompt, max_tokens=1)
            assert reused(session) == known

    def test_and_its_answer_are_known_to_the_next_session(self, engine: Engine, without: Engine) -> None:
        first = engine.session()
        first.generate(prompt_of(engine, 60), max_tokens=80, temperature=50.0, seed=1)
        held = first.tokens
        assert len(held) > 2 * POSITIONS
        second = engine.session()
        kv = second._held
        assert kv.begin(engine.load(), list(held), len(held)) == len(held) // POSITIONS * POSITIONS
        np.testing.assert_array_equal(second.step([5]), without.session().step([*second.tokens[:-1], 5]))

    def test_of_adapters_in_turns(self, engine: Engine, without: Engine) -> None:
        """A/B/A/B, in one session and in several."""
        prompt = prompt_of(engine)
        expected = {name: without.session(name).generate(prompt, max_tokens=8) for name in NAMES}
        assert len(set(expected.values())) >= 3
        one = engine.session()
        for turn, name in itertools.product(range(3), NAMES):
            one.use(name)
            assert one.generate(prompt, max_tokens=8) == expected[name]
            assert reused(one) == (2 * POSITIONS if turn else 0)
            other = engine.session(name)
            assert other.generate(prompt, max_tokens=8) == expected[name]
            assert reused(other) == 2 * POSITIONS

    def test_in_steps_of_several_sessions(self, engine: Engine, without: Engine) -> None:
        expected = [without.session(name).step(TEXT) for name in NAMES]
        for _ in range(2):
            sessions = [engine.session(name) for name in NAMES]
            got = engine.step([(session, TEXT) for session in sessions])
            np.testing.assert_array_equal(got, np.stack(expected))
            assert all(session.tokens == tuple(TEXT) for session in sessions)
        # Every other of these begins where the cache ends, and the rest at the beginning.
        parts = [(engine.session(name), TEXT[at:]) for at, name in enumerate(NAMES)]
        got = engine.step(parts)
        for row, (at, name) in zip(got, enumerate(NAMES), strict=True):
            np.testing.assert_array_equal(row, without.session(name).step(TEXT[at:]))

    def test_goes_on_with_what_another_session_has_computed_since(
        self, engine: Engine, without: Engine
    ) -> None:
        slow, fast = engine.session(), engine.session()
        slow.step(TEXT[:10])
        fast.step(TEXT)
        np.testing.assert_array_equal(slow.step(TEXT[10:140]), without.session().step(TEXT[:140]))
        assert engine.memory().kv == 3 * block_bytes(engine) + block_bytes(engine)


class TestNobodyMeets:
    def test_who_has_another_salt(self, engine: Engine) -> None:
        prompt = prompt_of(engine)
        for salt in ("", "a", "b", "all", "base", "a\0", "None"):
            for known in (0, 2 * POSITIONS):
                session = engine.session(cache_salt=salt)
                session.generate(prompt, max_tokens=1)
                assert reused(session) == known

    def test_a_salt_that_is_the_name_of_an_adapter(self, engine: Engine, without: Engine) -> None:
        prompt = prompt_of(engine)
        for name, salt in itertools.product(NAMES, ["all", "all2", ""]):
            session = engine.session(name, cache_salt=salt)
            expected = without.session(name).generate(prompt, max_tokens=8)
            assert session.generate(prompt, max_tokens=8) == expected and reused(session) == 0

    @pytest.mark.parametrize("salt", [5, None, b"x", "half \ud800"])
    def test_a_salt_that_is_no_text(self, engine: Engine, salt: Any) -> None:
        with pytest.raises(RunError, match=r"cache_salt is .*"):
            engine.session(cache_salt=salt)

    def test_an_adapter_of_the_same_name_with_other_weights(
        self, toy_bundle: Bundle, toy_adapters: dict[str, Path], without: Engine, tmp_path: Path
    ) -> None:
        bundle = Bundle.open(shutil.copytree(toy_bundle.path, tmp_path / "copy"))
        with Engine(bundle) as engine:
            prompt = prompt_of(engine)
            expected = {
                name: without.session(name).generate(prompt, max_tokens=8) for name in ("all", "all2")
            }
            for name in ("all", "all2", "all", "all2"):
                bundle.remove("all")
                bundle.add(toy_adapters[name], name="all", quantize="none", programs=False)
                session = engine.session("all")
                assert session.generate(prompt, max_tokens=8) == expected[name]
            # The first came back under its name: it is the same adapter, so its blocks are right.
            assert reused(session) == 2 * POSITIONS

    def test_after_all_is_unloaded(self, engine: Engine) -> None:
        prompt = prompt_of(engine)
        engine.session().generate(prompt, max_tokens=1)
        assert engine.memory().cache > 0
        engine.unload()
        assert (engine.memory().cache, engine.memory().kv) == (0, 0)
        session = engine.session()
        session.generate(prompt, max_tokens=1)
        assert reused(session) == 0

    def test_after_the_adapter_is_unloaded_they_meet(self, engine: Engine, without: Engine) -> None:
        prompt = prompt_of(engine)
        engine.session("all").generate(prompt, max_tokens=1)
        engine.unload("all")
        session = engine.session("all")
        answer = session.generate(prompt, max_tokens=8)
        assert reused(session) == 2 * POSITIONS
        assert answer == without.session("all").generate(prompt, max_tokens=8)

    def test_who_holds_what_a_running_generation_of_former_weights_computes(self, engine: Engine) -> None:
        pieces = engine.session().generate(
            prompt_of(engine, 60), max_tokens=100, temperature=50.0, seed=1, stream=True
        )
        next(pieces)
        engine.unload()
        list(pieces)
        del pieces
        assert (engine.memory().cache, engine.memory().kv) == (0, 0)


class TestTheBudget:
    def test_is_kept(self, toy_bundle: Bundle, without: Engine) -> None:
        with Engine(toy_bundle, cache_bytes=0) as probe:
            size = block_bytes(probe)
        with Engine(toy_bundle, cache_bytes=3 * size + 1) as engine:
            texts = [TEXT[i:] + TEXT[:i] for i in range(5)]
            expected = [without.session().step(text) for text in texts]
            for text, logits in [*zip(texts, expected, strict=True)] * 3:
                np.testing.assert_array_equal(engine.session().step(text), logits)
                assert engine.memory().cache <= 3 * size and engine.load().cache.nbytes <= 3 * size
                assert engine.memory().kv == 0

    def test_the_end_of_a_text_is_dropped_before_its_beginning(self, toy_bundle: Bundle) -> None:
        with Engine(toy_bundle, cache_bytes=0) as probe:
            size = block_bytes(probe)
        with Engine(toy_bundle, cache_bytes=3 * size) as engine:
            engine.session().step(TEXT)
            engine.session().step(TEXT[:64])
            engine.session().step([9] * 140)
            found = engine.load().cache.find(digests(engine.load().root("", is_long=False), TEXT, 0))
            assert len(found) == 1

    def test_of_nothing(self, toy_bundle: Bundle) -> None:
        with Engine(toy_bundle, cache_bytes=0) as engine:
            for _ in range(2):
                session = engine.session()
                session.generate(prompt_of(engine), max_tokens=3)
                assert reused(session) == 0
            del session
            assert (engine.memory().cache, engine.memory().kv) == (0, 0)

    def test_counts_what_sessions_share_once(self, engine: Engine) -> None:
        size = block_bytes(engine)
        session = engine.session()
        session.step(TEXT)
        assert (engine.memory().kv, engine.memory().cache) == (3 * size, 0)
        fork, other = session.fork(), engine.session()
        other.step(TEXT)
        assert other.kv_bytes == fork.kv_bytes == 3 * size
        assert (engine.memory().kv, engine.memory().cache) == (4 * size, 0)
        for one in (session, fork, other):
            one.reset()
        assert (engine.memory().kv, engine.memory().cache) == (0, 2 * size)
        engine.close()
        assert (engine.memory().kv, engine.memory().cache) == (0, 0)

    @pytest.mark.parametrize("name", ["cache_bytes", "memory_bytes"])
    @pytest.mark.parametrize("value", [-1, 1.5, "5", True])
    def test_that_is_none(self, toy_bundle: Bundle, name: str, value: Any) -> None:
        with pytest.raises(RunError, match=rf"{name} is .*\nhint: give a whole number"):
            Engine(toy_bundle, **{name: value})


def test_memory_may_be_asked_for_while_a_step_runs(engine: Engine) -> None:
    done = threading.Event()
    sizes = []

    def ask() -> None:
        while not done.is_set():
            sizes.append(engine.memory())

    thread = threading.Thread(target=ask)
    thread.start()
    for _ in range(4):
        engine.unload()
        engine.step([(engine.session(name), TEXT) for name in NAMES])
    done.set()
    thread.join()
    assert len(sizes) > 10 and all(one.kv >= 0 for one in sizes)


def test_memory_stays_flat(toy_bundle: Bundle) -> None:
    with Engine(toy_bundle, cache_bytes=1 << 20) as engine:
        sizes = []
        for number in range(120):
            engine.session(NAMES[number % 4]).step([number % 300 + 2, *TEXT])
            sizes.append(engine.memory())
        assert max(one.cache + one.kv for one in sizes) <= 1 << 20
        assert sizes[-1].process - sizes[60].process < 1 << 20


class TestDigests:
    def test_cover_parts_and_their_borders(self) -> None:
        lists = [
            {"a": "bc"},
            {"ab": "c"},
            {"a": "b", "c": ""},
            {"a": "", "b": "c"},
            {"a": b"b\0c"},
            {"b": "a", "a": "b"},
            {"a": "b", "b": "a"},
            {"a": "", "": "a"},
            {},
        ]
        assert len({digest(**parts) for parts in lists}) == len(lists)

    def test_of_a_block_cover_all_tokens_before(self) -> None:
        whole = list(digests("root", TEXT, 0))
        assert len(whole) == 2 and len(set(whole)) == 2
        assert list(digests(whole[0], TEXT, 1)) == whole[1:]
        for at in (0, 63, 64, 127):
            other = list(digests("root", [*TEXT[:at], TEXT[at] ^ 1, *TEXT[at + 1 :]], 0))
            assert [a == b for a, b in zip(whole, other, strict=True)] == [at >= 64, False]
        assert not set(whole) & set(digests("root2", TEXT, 0))

    def test_of_all_that_keys_and_values_depend_on(self, toy_bundle: Bundle) -> None:
        def root(weights: Weights, salt: str = "", *, is_long: bool = False) -> str:
            return weights.root(salt, is_long=is_long)

        roots = []
        for kv in ("float16", "float32"):
            with Engine(toy_bundle, kv=kv) as engine:
                roots += [root(engine.load(name), salt) for name in NAMES for salt in ("", "x", "all")]
                roots += [root(engine.load("all").scaled(scale)) for scale in (0.5, -1.0, 0.0)]
                roots.append(root(engine.load(), is_long=True))
        assert len(set(roots)) == len(roots) == 2 * (4 * 3 + 3 + 1)


# --- Trees of sessions


class Mirror:
    """A session, and what it should hold."""

    def __init__(self, session: Session, name: str | None, scale: float = 1.0) -> None:
        self.session, self.name, self.scale, self.tokens = session, name, scale, list[int]()


OPERATIONS = ("step", "fork", "reset", "use", "generate", "again", "forget", "unload", "refused")


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [0, 3, 1000])
@settings(max_examples=25)
@given(data=st.data())
def test_any_operations_on_any_sessions(
    toy_bundle: Bundle, without: Engine, blocks: int, data: st.DataObject
) -> None:
    """Each is as in an engine that keeps nothing, to the bit."""
    with Engine(toy_bundle, threads=2, cache_bytes=blocks * 49_152) as engine:
        mirrors = [Mirror(engine.session(), None)]
        texts = [engine.tokenizer.decode(TEXT[:n]) for n in (40, 90, 140)]
        for _ in range(data.draw(st.integers(1, 14))):
            mirror = data.draw(st.sampled_from(mirrors))
            operation = data.draw(st.sampled_from(OPERATIONS))
            session = mirror.session
            fresh = without.session(mirror.name)
            fresh.use(mirror.name, scale=mirror.scale)
            if operation == "step":
                # Of few texts, so that many begin alike.
                first = data.draw(st.integers(0, 1))
                count = data.draw(st.sampled_from([1, 20, 64, 100]))
                ids = [first, *TEXT][len(mirror.tokens) :][:count]
                if not ids:
                    continue
                chosen = data.draw(st.lists(st.sampled_from(mirrors), max_size=2, unique=True))
                parts = [(session, ids)] + [
                    (other.session, [4])
                    for other in chosen
                    if other is not mirror and len(other.tokens) < 250
                ]
                got = engine.step(parts)
                mirror.tokens += ids
                np.testing.assert_array_equal(got[0], fresh.step(mirror.tokens))
                for other in chosen:
                    if other is not mirror and len(other.tokens) < 250:
                        other.tokens.append(4)
            elif operation == "fork" and len(mirrors) < 6:
                other = Mirror(session.fork(), mirror.name, mirror.scale)
                other.tokens = list(mirror.tokens)
                mirrors.append(other)
            elif operation == "reset":
                session.reset()
                mirror.tokens = []
            elif operation == "use":
                mirror.name = data.draw(st.sampled_from(NAMES))
                scale = 1.0 if mirror.name is None else data.draw(st.sampled_from([1.0, 0.5, -1.0]))
                before = (session.adapter, session.scale)
                session.use(mirror.name, scale=scale)
                mirror.scale = scale
                if before != (mirror.name, scale):
                    mirror.tokens = []
            elif operation in ("generate", "again"):
                text = data.draw(st.sampled_from(texts))
                drawn = {"max_tokens": data.draw(st.sampled_from([1, 30])), "temperature": 20.0, "seed": 3}
                assert session.generate(text, **drawn) == fresh.generate(text, **drawn)
                mirror.tokens = list(session.tokens)
            elif operation == "forget" and len(mirrors) > 1:
                mirrors.remove(mirror)
            elif operation == "unload":
                engine.unload(data.draw(st.sampled_from([*NAMES[1:], None])))
            elif operation == "refused":
                with pytest.raises(RunError):
                    session.step([1] * 257)
            assert session.tokens == tuple(mirror.tokens)
        for mirror in mirrors:
            fresh = without.session(mirror.name)
            fresh.use(mirror.name, scale=mirror.scale)
            if len(mirror.tokens) < 256:
                np.testing.assert_array_equal(mirror.session.step([7]), fresh.step([*mirror.tokens, 7]))
