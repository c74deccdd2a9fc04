from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bedplate.bundle.store import Bundle
from bedplate.errors import RunError
from bedplate.runtime.engine import Engine
from bedplate.runtime.sampling import Sampling

NONE = float("nan"), "1", True, None, 1j


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", value) for value in (-1, float("inf"), 10**400, *NONE)),
        *(("top_p", value) for value in (0, 1.1, *NONE)),
        *(("min_p", value) for value in (-0.1, 1.1, *NONE)),
        *(("top_k", value) for value in (-1, 2.5, 2.0, "1", True, None)),
        *(("repetition_penalty", value) for value in (0, -1, *NONE)),
        *(("presence_penalty", value) for value in (-2.1, 2.1, *NONE)),
        *(("frequency_penalty", value) for value in (-2.1, 2.1, *NONE)),
        *(("min_tokens", value) for value in (-1, 0.5, "1", None)),
        *(("ignore_eos", value) for value in (0, 1, "no", None)),
        *(("seed", value) for value in (-1, 2**64, 0.5, "1", True)),
        *(("logit_bias", value) for value in (None, [1], [(1, 1.0)], "1")),
        *(("banned_tokens", value) for value in (None, "12", 5, [1.5], {1: 2})),
    ],
)
def test_values_out_of_range_are_refused(field: str, value: Any) -> None:
    with pytest.raises(RunError, match=rf"{field} is .*\nhint: "):
        Sampling(**{field: value})


@pytest.mark.parametrize(
    ("bias", "complaint"),
    [
        ({1: 100.5}, r"logit_bias\[1\] is 100.5"),
        ({1: "2"}, r"logit_bias\[1\] is '2'"),
        ({1: float("-inf")}, r"logit_bias\[1\] is -inf"),
        ({"1": 2.0}, r"logit_bias is \['1'\]"),
        ({-1: 2.0}, "token -1 is not in the vocabulary"),
    ],
)
def test_biases_that_are_none(bias: Any, complaint: str) -> None:
    with pytest.raises(RunError, match=rf"{complaint}\nhint: "):
        Sampling(logit_bias=bias)


@pytest.fixture(scope="module")
def engine(toy_bundle: Bundle) -> Any:
    with Engine(toy_bundle) as engine:
        yield engine


def tokens(engine: Engine, **options: Any) -> list[int]:
    options = {"max_tokens": 12, "ignore_eos": True, **options}
    return [token for event in engine.session().events("the fox", **options) for token in event.tokens]


def allow(*allowed: int) -> NDArray[np.int32]:
    bits = np.zeros(320, bool)
    bits[list(allowed)] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


class TestOfAGeneration:
    """Settings reach the native sampler, which tests/native/test_sampler.py tests."""

    def test_banned_tokens(self, engine: Engine) -> None:
        plain = tokens(engine)
        assert plain[0] not in tokens(engine, banned_tokens=[plain[0]])

    def test_logit_bias(self, engine: Engine) -> None:
        assert tokens(engine, logit_bias={7: 100}) == [7] * 12

    def test_penalties(self, engine: Engine) -> None:
        """What was there makes room for what was not."""
        both = {7: 100, 8: 100}
        spread = tokens(engine, logit_bias=both, repetition_penalty=10.0)
        assert set(spread[:2]) == {7, 8}
        strong = {"logit_bias": dict.fromkeys(range(320), 50)}
        assert len(set(tokens(engine, **strong, repetition_penalty=1.5))) == 12
        for penalty in ("presence_penalty", "frequency_penalty"):
            assert len(set(tokens(engine, **{penalty: 2.0}))) > len(set(tokens(engine)))

    def test_top_k_and_min_p_of_1_leave_the_likeliest(self, engine: Engine) -> None:
        plain = tokens(engine)
        assert tokens(engine, temperature=2.0, top_k=1) == plain
        assert tokens(engine, temperature=2.0, min_p=1.0) == plain
        assert tokens(engine, temperature=2.0, top_p=1e-9) == plain
        assert tokens(engine, temperature=2.0, seed=0) != plain

    def test_min_tokens_and_ignore_eos(self, engine: Engine) -> None:
        ends = engine.bundle.manifest.tokenizer.eos_ids
        wanted = {"logit_bias": dict.fromkeys(ends, 100)}
        assert tokens(engine, **wanted, ignore_eos=False) == []
        few = tokens(engine, **wanted, ignore_eos=False, min_tokens=5)
        assert len(few) == 5 and not set(few) & set(ends)
        assert set(tokens(engine, **wanted)) <= set(ends)

    def test_seeds(self, engine: Engine) -> None:
        session = engine.session()
        options = {"max_tokens": 12, "temperature": 5.0, "ignore_eos": True}
        texts, seeds = [], []
        for _ in range(2):
            texts.append(session.generate("the fox", **options))
            assert session.last is not None
            seeds.append(session.last.seed)
        assert seeds[0] != seeds[1] and texts[0] != texts[1]
        assert session.generate("the fox", **options, seed=seeds[0]) == texts[0]


class TestMasks:
    @pytest.mark.parametrize("temperature", [0, 1.0])
    def test_is_asked_before_each_token(self, engine: Engine, temperature: float) -> None:
        asked = []

        def mask(chosen: tuple[int, ...]) -> NDArray[np.int32] | None:
            asked.append(chosen)
            return None if len(chosen) == 2 else allow(40 + len(chosen))

        found = tokens(engine, mask=mask, max_tokens=4, temperature=temperature)
        assert (found[:2], found[3]) == ([40, 41], 43)
        assert asked == [tuple(found[:count]) for count in range(4)]

    def test_of_any_kind(self, engine: Engine) -> None:
        torch = pytest.importorskip("torch")
        bits = allow(9)
        for mask in (bits, bits.tobytes(), bytearray(bits), memoryview(bits), torch.from_numpy(bits)):
            assert tokens(engine, mask=lambda _, mask=mask: mask, max_tokens=2) == [9, 9]

    @pytest.mark.parametrize(
        "mask", ["text", 5, [1, 2], np.zeros(10), np.zeros((1, 10), np.int32), b"123", np.zeros(10, bool)]
    )
    def test_what_is_none(self, engine: Engine, mask: Any) -> None:
        with pytest.raises(RunError, match=r"(?s)the mask is .*\nhint: "):
            tokens(engine, mask=lambda _: mask)

    def test_that_allows_nothing(self, engine: Engine) -> None:
        with pytest.raises(RunError, match=r"no token is allowed\nhint: "):
            tokens(engine, mask=lambda _: np.zeros(10, np.int32))
        with pytest.raises(RunError, match=r"no token is allowed\nhint: "):
            tokens(engine, mask=lambda _: b"")

    def test_whose_function_fails(self, engine: Engine) -> None:
        session = engine.session()

        def mask(chosen: tuple[int, ...]) -> None:
            raise LookupError("of the caller")

        with pytest.raises(LookupError, match="of the caller"):
            session.generate("the fox", max_tokens=2, mask=mask)
        assert session.last is not None and session.last.finish_reason == "cancelled"
        assert session.generate("the fox", max_tokens=2)
