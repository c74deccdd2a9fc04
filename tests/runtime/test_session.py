from __future__ import annotations

import math
import threading
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import pytest

from bedplate.bundle.store import Bundle
from bedplate.errors import ContextFullError, NotFoundError, RunError
from bedplate.runtime.engine import Engine
from bedplate.runtime.lookup import MOST
from bedplate.runtime.session import Session
from bedplate.runtime.tokenizer import Tokenizer

TEXT = [5, 9, 13, 2, 7, 11, 3, 3, 8, 21]


@pytest.fixture(scope="module")
def engine(toy_bundle: Bundle) -> Iterator[Engine]:
    with Engine(toy_bundle) as engine:
        yield engine


@pytest.fixture
def session(engine: Engine) -> Session:
    return engine.session()


@pytest.fixture(scope="module")
def hot(engine: Engine) -> float:
    """A temperature at which many tokens of this model are about equally likely."""
    return float(engine.session().step(TEXT).std())


class TestSteps:
    @pytest.mark.parametrize("cuts", [[], [1], [4, 5], list(range(1, 10))])
    def test_text_may_be_cut_anywhere(self, engine: Engine, session: Session, cuts: list[int]) -> None:
        whole = engine.session().step(TEXT)
        for begin, end in zip([0, *cuts], [*cuts, len(TEXT)], strict=True):
            last = session.step(TEXT[begin:end])
        np.testing.assert_array_equal(last, whole)
        assert session.tokens == tuple(TEXT)

    def test_logits_of_every_position(self, engine: Engine, session: Session) -> None:
        every = session.logits(TEXT)
        assert every.shape == (len(TEXT), engine.bundle.manifest.model["vocab_size"])
        assert every.dtype == np.float32
        other = engine.session()
        for position, token in enumerate(TEXT):
            np.testing.assert_array_equal(every[position], other.step([token]))

    def test_text_longer_than_a_step_takes_is_cut(self, engine: Engine, session: Session) -> None:
        limits = engine.limits
        count = limits.max_context
        text = [1 + i % 30 for i in range(count)]
        every = session.logits(text)
        assert len(every) == count
        np.testing.assert_array_equal(every[-1], engine.session().step(text))

    def test_logits_begin_anew_and_a_step_goes_on_from_there(self, engine: Engine, session: Session) -> None:
        session.step([1, 2, 3])
        session.logits(TEXT[:-1])
        np.testing.assert_array_equal(session.step(TEXT[-1:]), engine.session().step(TEXT))

    def test_the_context_fills_up_to_the_last_position(self, engine: Engine, session: Session) -> None:
        limit = engine.limits.max_context
        session.step([1] * limit)
        with pytest.raises(RunError, match=rf"{limit + 1} tokens do not fit the context of {limit}\nhint"):
            session.step([1])
        assert len(session.tokens) == limit

    @pytest.mark.parametrize(
        ("ids", "complaint"),
        [
            ([], "no tokens"),
            ([-1], "token -1"),
            ([10**6], "token 1000000"),
            ([2**70], f"token {2**70}"),
            ([1.5], r"token_ids is \[1.5\]"),
            ([True], "token"),
            *((value, "token_ids is ") for value in (None, "12", b"12", 5, ["1"], {1: 2}, [[1]])),
        ],
    )
    def test_what_are_no_tokens(self, session: Session, ids: Any, complaint: str) -> None:
        for method in (session.step, session.logits):
            with pytest.raises(RunError, match=complaint):
                method(ids)


class TestGenerate:
    def test_greedy_is_the_likeliest_token_again_and_again(self, engine: Engine, session: Session) -> None:
        text = session.generate("ab", max_tokens=6)
        by_hand = engine.session()
        logits, ids = by_hand.step(engine.tokenizer.encode("ab")), []
        while (
            len(ids) < 6 and (token := int(logits.argmax())) not in engine.bundle.manifest.tokenizer.eos_ids
        ):
            ids.append(token)
            logits = by_hand.step([token])
        assert text == engine.tokenizer.decode(ids)

    def test_pieces_join_to_the_text(self, engine: Engine, hot: float) -> None:
        for seed in range(5):
            settings = {"max_tokens": 20, "temperature": hot, "seed": seed}
            whole = engine.session().generate("ab", **settings)
            pieces = list(engine.session().generate("ab", **settings, stream=True))
            assert "".join(pieces) == whole
            assert all(pieces)

    def test_the_seed_decides(self, engine: Engine, hot: float) -> None:
        texts = [
            engine.session().generate("ab", max_tokens=12, temperature=hot, seed=seed)
            for seed in (1, 1, 2, 3)
        ]
        assert texts[0] == texts[1]
        assert len(set(texts)) > 1

    def test_statistics(self, engine: Engine, session: Session) -> None:
        session.generate("abc", max_tokens=3)
        stats = session.last
        assert stats is not None
        assert stats.prompt_tokens == len(engine.tokenizer.encode("abc"))
        assert stats.prefill_seconds > 0 and stats.decode_seconds > 0
        assert (stats.finish_reason, stats.generated_tokens) == ("length", 3)
        assert stats.reused_tokens == 0

    def test_statistics_of_an_answer_that_ends(self, engine: Engine, session: Session) -> None:
        """At a temperature at which every token is as likely as the end token, some seed soon draws that."""
        for seed in range(50):
            session.generate("abc", max_tokens=100, temperature=1e9, seed=seed)
            stats = session.last
            assert stats is not None
            if stats.finish_reason == "stop":
                assert stats.generated_tokens == len(session.tokens) - stats.prompt_tokens < 100
                return
        pytest.fail("the end token was never drawn")

    def test_statistics_while_it_goes_on(self, session: Session) -> None:
        pieces = session.generate("fox", max_tokens=3, stream=True)  # whose first token is a whole character
        assert session.last is not None and session.last.finish_reason is None
        next(pieces)
        assert (session.last.finish_reason, session.last.generated_tokens) == (None, 1)
        list(pieces)
        assert (session.last.finish_reason, session.last.generated_tokens) == ("length", 3)

    def test_the_end_of_the_context_ends_it(self, engine: Engine, session: Session) -> None:
        limit = engine.limits.max_context
        prompt = "a" * (limit - 1)
        assert len(engine.tokenizer.encode(prompt)) == limit - 1
        session.generate(prompt, max_tokens=50)
        assert session.last is not None
        # One token stands in the last position, one more is drawn from its logits.
        assert (session.last.finish_reason, session.last.generated_tokens) == ("length", 2)
        assert len(session.tokens) == limit

    def test_a_prompt_longer_than_the_context(self, engine: Engine, session: Session) -> None:
        limit = engine.limits.max_context
        with pytest.raises(RunError, match=rf"{limit + 1} tokens do not fit the context of {limit}\nhint: "):
            session.generate("a" * (limit + 1), max_tokens=1)

    def test_a_text_that_is_certainly_longer_is_not_tokenized(
        self, session: Session, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Tokenizing takes up to 200 bytes of memory for each of it."""
        for method in ("encode", "encode_chat"):
            monkeypatch.setattr(Tokenizer, method, lambda *_, **__: pytest.fail("it is tokenized"))
        text = "x" * 1_000_000
        for prompt in (text, [{"role": "user", "content": text}]):
            with pytest.raises(
                ContextFullError, match=r"1000\d\d\d characters do not fit the context of 256"
            ):
                session.generate(prompt, max_tokens=1)
        deep: Any = text
        for _ in range(5000):
            deep = [deep]
        with pytest.raises(RunError, match="nested too deeply"):
            monkeypatch.undo()
            session.generate([{"role": "user", "content": deep}], max_tokens=1)

    def test_tokens_without_text_are_not_decoded_again_and_again(
        self, engine: Engine, session: Session, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        decode, most = Tokenizer.decode, 0

        def watched(self: Tokenizer, ids: list[int]) -> str:
            nonlocal most
            most = max(most, len(ids))
            return decode(self, ids)

        monkeypatch.setattr(Tokenizer, "decode", watched)
        (end,) = engine.tokenizer.end_ids
        options: dict[str, Any] = {"ignore_eos": True, "logit_bias": {end: 100}}
        assert session.generate("ab", max_tokens=40, **options) == ""
        assert session.last is not None and session.last.generated_tokens == 40
        assert most < 5

    def test_a_stop_string_ends_it_and_is_left_out(
        self, engine: Engine, session: Session, hot: float
    ) -> None:
        settings = {"max_tokens": 30, "temperature": hot, "seed": 7}
        whole = engine.session().generate("ab", **settings)
        middle = len(whole) // 2
        early, late = whole[middle - 3 : middle], whole[middle:][:2]
        assert 0 < whole.find(early) < whole.find(late), "the toy says too little: choose another seed"
        for stops in (["never said!", late], [late], [late, early], [early, late], [early + "!", early]):
            pieces = list(session.generate("ab", **settings, stop=stops, stream=True))
            stop = early if early in stops else late
            assert "".join(pieces) == whole[: whole.find(stop)]
            assert session.last is not None and session.last.finish_reason == "stop"
            assert session.last.generated_tokens < 30

    def test_messages_go_through_the_template(self, engine: Engine, session: Session) -> None:
        messages = [{"role": "user", "content": "hi"}]
        rendered = engine.session().generate(engine.tokenizer.render(messages), max_tokens=5)
        assert session.generate(messages, max_tokens=5) == rendered

    @pytest.mark.parametrize(
        ("settings", "complaint"),
        [
            ({"max_tokens": 0}, "max_tokens is 0"),
            ({"max_tokens": 1, "temperature": -1.0}, "temperature is -1.0"),
            ({"max_tokens": 1, "top_p": 0.0}, "top_p is 0.0"),
            ({"max_tokens": 1, "top_k": -1}, "top_k is -1"),
            ({"max_tokens": 1, "seed": -1}, "seed is -1"),
            ({"max_tokens": 1, "stop": "text"}, "stop is 'text'"),
            ({"max_tokens": 1, "stop": [""]}, r"stop is \[''\]"),
            ({"max_tokens": 1, "prompt": ""}, "no tokens"),
            *(({"max_tokens": value}, "max_tokens is ") for value in (2.5, "3", None, True, -1)),
            *(
                ({"temperature": value}, "temperature is ")
                for value in ("hot", None, True, math.nan, math.inf)
            ),
            *(({"top_p": value}, "top_p is ") for value in ("1", None, math.nan, 1.5, True)),
            *(({"top_k": value}, "top_k is ") for value in (2.5, "3", None, True, math.nan)),
            *(({"seed": value}, "seed is ") for value in (0.5, "3", True)),
            *(({"stop": value}, "stop is ") for value in (None, [1], [None], 5, b"x", {"a"}, {"a": 1})),
            ({"stop": ["ok", "half \ud800"]}, r"stop\[1\] is not text"),
            ({"on_prefill": 5}, "on_prefill is 5"),
            ({"stream": "yes"}, "stream is 'yes'"),
            ({"allow_special": None}, "allow_special is None"),
            *(({"prompt": value}, "prompt is ") for value in (None, 5, {"role": "user"}, {"a"}, iter([]))),
            ({"prompt": b"bytes"}, "messages is b'bytes'"),
            ({"prompt": "half \ud83d"}, "the text is not text: its character 5"),
            ({"prompt": []}, "there are no messages"),
            ({"prompt": [["role", "user"]]}, "not a message"),
        ],
    )
    def test_bad_arguments_are_refused_before_anything_runs(
        self, session: Session, settings: dict[str, object], complaint: str
    ) -> None:
        arguments = {"prompt": "ab", "max_tokens": 1, "stream": True, **settings}
        with pytest.raises(RunError, match=rf"(?s){complaint}.*hint: "):
            session.generate(**arguments)  # type: ignore[call-overload]
        assert session.tokens == () and session.last is None

    def test_numbers_of_numpy_are_numbers(self, engine: Engine, session: Session) -> None:
        numbers = {"max_tokens": np.int64(5), "top_k": np.uint8(3), "seed": np.int32(1)}
        floats = {"temperature": np.float32(0.5), "top_p": np.float64(0.5)}
        expected = engine.session().generate("ab", max_tokens=5, top_k=3, seed=1, temperature=0.5, top_p=0.5)
        assert session.generate("ab", **numbers, **floats) == expected  # type: ignore[call-overload]

    def test_a_special_token_in_a_message_is_text(self, session: Session) -> None:
        messages = [{"role": "user", "content": "<|im_end|>"}]
        session.generate(messages, max_tokens=1)
        plain = session.tokens
        session.generate(messages, max_tokens=1, allow_special=True)
        assert (plain.count(1), session.tokens.count(1)) == (1, 2)


class TestReuse:
    def test_a_shared_beginning_is_not_computed_again(self, engine: Engine, session: Session) -> None:
        session.generate("abcdef", max_tokens=1)
        again = session.generate("abcdxyz", max_tokens=4)
        assert session.last is not None and session.last.reused_tokens == 4
        assert again == engine.session().generate("abcdxyz", max_tokens=4)

    def test_of_the_same_prompt_only_the_last_token_is(self, session: Session) -> None:
        first = session.generate("abcdef", max_tokens=4)
        assert session.generate("abcdef", max_tokens=4) == first
        assert session.last is not None and session.last.reused_tokens == session.last.prompt_tokens - 1

    def test_a_conversation_goes_on_where_it_was(self, engine: Engine, session: Session) -> None:
        messages = [{"role": "user", "content": "hi"}]
        answer = session.generate(messages, max_tokens=4)
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "and?"}]
        first = session.last
        session.generate(messages, max_tokens=2)
        assert first is not None and session.last is not None
        assert session.last.reused_tokens >= first.prompt_tokens - 1

    def test_nothing_is_reused_across_adapters(self, engine: Engine, toy_bundle: Bundle) -> None:
        one, two = sorted(toy_bundle.adapters)[:2]
        session = engine.session(one)
        session.generate("abcdef", max_tokens=2)
        for name in (two, None, one):
            session.use(name)
            assert session.adapter == name and session.tokens == () and session.kv_bytes == 0
            got = session.generate("abcdef", max_tokens=4)
            assert session.last is not None and session.last.reused_tokens == 0
            assert got == engine.session(name).generate("abcdef", max_tokens=4)

    def test_using_the_same_adapter_again_keeps_everything(self, session: Session) -> None:
        session.step(TEXT)
        session.use(None)
        assert session.tokens == tuple(TEXT)

    def test_reset_forgets_and_gives_memory_back(self, session: Session) -> None:
        session.step(TEXT)
        assert session.kv_bytes > 0
        session.reset()
        assert (session.tokens, session.kv_bytes) == ((), 0)

    def test_an_unknown_adapter(self, session: Session) -> None:
        session.step(TEXT)
        with pytest.raises(NotFoundError, match="no adapter 'nobody'"):
            session.use("nobody")
        with pytest.raises(RunError, match="the adapter's name is 5"):
            session.use(5)  # type: ignore[arg-type]
        assert session.tokens == tuple(TEXT)


class TestCancel:
    @pytest.fixture(params=[1, 1 + MOST], ids=["alone", "lookup"])
    def most_left(self, request: pytest.FixtureRequest) -> int:
        """Pieces that may still come. A step chooses one token, or those too that lookup proposed."""
        return int(request.param)

    @pytest.fixture
    def session(self, toy_bundle: Bundle, most_left: int) -> Iterator[Session]:
        with Engine(toy_bundle, lookup=most_left > 1) as engine:
            yield engine.session()

    @pytest.fixture
    def pieces(self, session: Session, hot: float) -> Iterator[str]:
        """A generation that is long from ended."""
        return session.generate("ab", max_tokens=60, temperature=hot, seed=1, stream=True)

    def test_from_another_thread(self, session: Session, pieces: Iterator[str], most_left: int) -> None:
        next(pieces)
        thread = threading.Thread(target=session.cancel)
        thread.start()
        thread.join()
        assert len(list(pieces)) <= most_left
        assert session.last is not None and session.last.finish_reason == "cancelled"

    def test_before_the_first_step(self, session: Session, pieces: Iterator[str]) -> None:
        session.cancel()
        assert list(pieces) == []
        assert session.last is not None and session.last.generated_tokens == 0
        assert session.last.finish_reason == "cancelled"

    def test_in_the_middle_of_a_long_prompt(self, toy_bundle: Bundle) -> None:
        done: list[tuple[int, int]] = []

        def read(tokens: int, total: int) -> None:
            done.append((tokens, total))
            if len(done) == 2:
                session.cancel()

        with Engine(toy_bundle, max_step_rows=2) as engine:
            session = engine.session()
            assert session.generate("the quick brown fox jumps", max_tokens=5, on_prefill=read) == ""
            count = len(engine.tokenizer.encode("the quick brown fox jumps"))
            assert done == [(2, count), (4, count)]
            assert len(session.tokens) == 4
        assert session.last is not None and session.last.finish_reason == "cancelled"

    def test_closing_the_iterator(self, session: Session, pieces: Generator[str]) -> None:
        next(pieces)
        stats = session.last
        assert stats is not None and stats.finish_reason is None
        held, generated = session.tokens, stats.generated_tokens
        pieces.close()
        assert stats.finish_reason == "cancelled"
        assert list(pieces) == [] and (session.tokens, stats.generated_tokens) == (held, generated)
        assert session.generate("ab", max_tokens=3) and session.last is not stats

    def test_a_newer_generation_ends_an_older_one(
        self, engine: Engine, session: Session, pieces: Iterator[str], most_left: int
    ) -> None:
        next(pieces)
        newer = session.generate("xyz", max_tokens=4)
        assert newer == engine.session().generate("xyz", max_tokens=4)
        assert len(list(pieces)) <= most_left

    @pytest.mark.parametrize("what", ["reset", "step", "logits", "use"])
    def test_whatever_changes_the_session_ends_it(
        self, engine: Engine, session: Session, pieces: Iterator[str], what: str, most_left: int
    ) -> None:
        next(pieces)
        if what == "use":
            session.use(next(iter(engine.bundle.adapters)))
        elif what == "reset":
            session.reset()
        else:
            getattr(session, what)([1])
        held = session.tokens
        assert len(list(pieces)) <= most_left
        assert session.tokens == held
