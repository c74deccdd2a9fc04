"""The prompt of a text completion, told with how likely it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import openai
import pytest

import bedplate
from bedplate.errors import RunError

PROMPT = "the quick fox jumps over the dog " * 3  # more than are scored at once


def logprobs_of(alone: bedplate.Engine, ids: list[int]) -> list[float]:
    """Of all tokens but the first."""
    logits = alone.session("all").logits(ids).astype(np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    every = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return [float(every[at, token]) for at, token in enumerate(ids[1:])]


def test_a_session_tells_how_likely_a_text_is(alone: bedplate.Engine) -> None:
    ids = alone.tokenizer.encode(PROMPT)
    session = alone.session("all")
    before = session.tokens
    found = list(session.logprobs(ids, top=2))
    assert [one.token for one in found] == ids[1:] and all(len(one.top) == 2 for one in found)
    np.testing.assert_allclose([one.logprob for one in found], logprobs_of(alone, ids), atol=1e-4)
    assert session.tokens == before
    assert list(session.logprobs(ids[:1])) == []
    with pytest.raises(RunError, match="do not fit"):
        session.logprobs(ids * 20)
    with pytest.raises(RunError, match="there are no tokens"):
        session.logprobs([])
    with pytest.raises(RunError, match="top"):
        session.logprobs(ids, top=-1)


@pytest.mark.parametrize("most", [0, 1, 4])
def test_echo(most: int, client: openai.OpenAI, alone: bedplate.Engine) -> None:
    ids = alone.tokenizer.encode(PROMPT)
    said = client.completions.create(
        model="all", prompt=[ids, ids[:5]], echo=True, logprobs=2, max_tokens=most, temperature=0
    )
    for choice, prompt in zip(said.choices, (ids, ids[:5]), strict=True):
        logprobs = choice.logprobs
        assert logprobs is not None and logprobs.tokens is not None
        assert logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
        assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
        assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(prompt) + most
        np.testing.assert_allclose(
            logprobs.token_logprobs[1 : len(prompt)], logprobs_of(alone, prompt), atol=1e-4
        )
        assert "".join(logprobs.tokens) == choice.text and choice.finish_reason == "length"
        assert logprobs.text_offset == [
            len("".join(logprobs.tokens[:at])) for at in range(len(logprobs.tokens))
        ]
        for chosen, top in zip(
            logprobs.token_logprobs[len(prompt) :], logprobs.top_logprobs[len(prompt) :], strict=True
        ):
            assert chosen == max(
                top.values()
            )  # lm-evaluation-harness takes equal numbers for the likeliest token
        answer = alone.session("all").generate(prompt, max_tokens=most) if most else ""
        assert choice.text == alone.tokenizer.decode(prompt) + answer
    assert said.usage is not None and said.usage.prompt_tokens == len(ids) + 5
    assert said.usage.completion_tokens == 2 * most


def test_echo_comes_first_in_a_stream(client: openai.OpenAI) -> None:
    asked: Any = {"model": "all", "prompt": ["the fox", "a dog"], "echo": True, "temperature": 0, "n": 2}
    asked |= {"logprobs": 1, "max_tokens": 4}
    whole = client.completions.create(**asked)
    told: list[list[Any]] = [[], [], [], []]
    for piece in client.completions.create(**asked, stream=True):
        for choice in piece.choices:
            told[choice.index].append(choice)
    for choice, pieces in zip(whole.choices, told, strict=True):
        assert "".join(piece.text for piece in pieces) == choice.text
        assert pieces[0].text in ("the fox", "a dog")
        assert [one for piece in pieces for one in piece.logprobs.tokens] == choice.logprobs.tokens  # type: ignore[union-attr]
        offsets = [one for piece in pieces for one in piece.logprobs.text_offset]
        assert offsets == choice.logprobs.text_offset  # type: ignore[union-attr]


def test_the_end_token_has_its_logprob(client: openai.OpenAI, alone: bedplate.Engine) -> None:
    """lm-evaluation-harness takes the last of the logprobs for the one token that it had to ask for."""
    (end,) = alone.tokenizer_of("all").end_ids
    ids = alone.tokenizer.encode("the fox")
    said = client.completions.create(
        model="all", prompt=ids, echo=True, logprobs=1, max_tokens=1, logit_bias={str(end): 100}
    )
    (choice,) = said.choices
    assert choice.finish_reason == "stop" and choice.text == "the fox"
    assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
    assert len(choice.logprobs.token_logprobs) == len(ids) + 1
    np.testing.assert_allclose(
        choice.logprobs.token_logprobs[-1], logprobs_of(alone, [*ids, end])[-1], atol=1e-4
    )


def test_echo_without_logprobs(client: openai.OpenAI) -> None:
    said = client.completions.create(model="all", prompt="the fox", echo=True, max_tokens=0)
    assert (said.choices[0].text, said.choices[0].logprobs) == ("the fox", None)


def test_a_stream_of_the_echo_alone(client: openai.OpenAI) -> None:
    pieces = list(
        client.completions.create(model="all", prompt="the fox", echo=True, max_tokens=0, stream=True)
    )
    (choice,) = [choice for piece in pieces for choice in piece.choices]
    assert (choice.text, choice.finish_reason) == ("the fox", "length")


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_tokens", 0), ("suffix", "end"), ("best_of", 3), ("logprobs", 21), ("prompt", [])],
)
def test_what_is_not_honoured_is_refused_by_name(client: openai.OpenAI, field: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "all", "prompt": "the fox", field: value})
    assert caught.value.param is not None and caught.value.param.startswith(field)
