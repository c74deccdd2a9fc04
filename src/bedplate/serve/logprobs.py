"""Logarithms of probabilities, as OpenAI's APIs tell them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bedplate.runtime.request import TokenLogprobs
from bedplate.runtime.tokenizer import Tokenizer

Json = dict[str, Any]
_UNKNOWN = "\ufffd"  # stands for what is no whole character


def of_chat(said: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> list[Json]:
    """As chat completions and responses give them."""
    return [_token(one, tokenizer) for one in said]


def _token(one: TokenLogprobs, tokenizer: Tokenizer) -> Json:
    top = [_named(token, value, tokenizer) for token, value in one.top]
    return {**_named(one.token, one.logprob, tokenizer), "top_logprobs": top}


def _named(token: int, logprob: float, tokenizer: Tokenizer) -> Json:
    text = text_of(token, tokenizer)
    return {"token": text, "logprob": logprob, "bytes": None if _UNKNOWN in text else list(text.encode())}


def text_of(token: int, tokenizer: Tokenizer) -> str:
    """Of a token within a text: at the beginning of one, some decoders leave a space out."""
    once, twice = tokenizer.decode([token]), tokenizer.decode([token, token])
    return twice[len(once) :]


class OfText:
    """As text completions give them, piece by piece. It knows where in the text the next token begins."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._offset = tokenizer, 0

    def told(self, said: Sequence[TokenLogprobs | int]) -> Json:
        """A token of which only the id is known has nothing before it, and so no probability."""
        found: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for one in said:
            text = self._text(one if isinstance(one, int) else one.token)
            found["tokens"].append(text)
            found["token_logprobs"].append(None if isinstance(one, int) else one.logprob)
            found["top_logprobs"].append(None if isinstance(one, int) else self._top(one))
            found["text_offset"].append(self._offset)
            self._offset += len(text)
        return found

    def _top(self, one: TokenLogprobs) -> dict[str, float]:
        """By text, and what was chosen. Of tokens that have one text, the likeliest is told."""
        found: dict[str, float] = {}
        for token, value in (*one.top, (one.token, one.logprob)):
            found.setdefault(self._text(token), value)
        return found

    def _text(self, token: int) -> str:
        return text_of(token, self._tokenizer) if self._offset else self._tokenizer.decode([token])
