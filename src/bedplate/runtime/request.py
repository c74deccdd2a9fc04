"""A generation: what the caller wants, checked, how far it is, and what it tells."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypedDict

from bedplate.errors import ArgumentError, RunError
from bedplate.runtime import arguments
from bedplate.runtime.sampling import MaskFunction, Sampling

FinishReason = Literal["stop", "length", "cancelled", "deadline"]
OnPrefill = Callable[[int, int], None]


@dataclass(kw_only=True)
class Statistics:
    """Statistics of one generation. They change while it goes on.

    reused_tokens: tokens of the prompt whose keys and values the session or the cache already had.
    prefill_seconds: that the caller waited until the first token was chosen, without loading.
    decode_seconds: that the caller waited from there on.
    drafted_tokens: that were proposed, by lookup or by the mask.  accepted_tokens: those of them that were right.
    seed: the random numbers follow from it.
    finish_reason: None until the generation has ended. "stop": at an end token or a stop string. "length": at
        max_tokens or the end of the context. "deadline": its time was up. "cancelled": something else ended it.
    stopped_by: the end token, or the stop string.  end_logprobs: of the end token, if they were asked for.
    """

    prompt_tokens: int
    reused_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    seed: int
    finish_reason: FinishReason | None = None
    stopped_by: int | str | None = None
    end_logprobs: TokenLogprobs | None = None


class TokenLogprobs(NamedTuple):
    """Logarithms of probabilities at the place of a token, as the model gives them: before penalties, bias, mask and
    temperature.

    token, logprob: what was chosen.  top: the likeliest tokens, the likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class Event:
    """A piece of a generation.

    text: never empty, but in the last event.  tokens: what was generated since the event before. An end token that
    ends the text is not among them.  logprobs: of each of the tokens. None: they were not asked for.
    finish_reason: None, but in the last event.

    Text comes when it is certain: when its characters are whole, and when it cannot be the beginning of a stop string.
    So the last characters of a token can come with the event after its own. Tokens of a stop string are in the last
    event.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason | None


class Options(TypedDict, total=False):
    """What can be given to a generation, see `Sampling` and `Session.events`."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    banned_tokens: Sequence[int]
    min_tokens: int
    ignore_eos: bool
    seed: int | None
    mask: MaskFunction | None
    stop: Sequence[str]
    on_prefill: OnPrefill | None
    allow_special: bool
    key: str
    deadline: float | None


class Wish(NamedTuple):
    """What a caller wants. deadline: a time of `time.perf_counter`.

    RunError: an argument has a wrong type or value.
    """

    max_tokens: int
    sampling: Sampling
    mask: MaskFunction | None
    logprobs: int | None
    stop: tuple[str, ...]
    on_prefill: OnPrefill | None
    key: str
    deadline: float | None

    @classmethod
    def of(
        cls,
        *,
        max_tokens: Any,
        logprobs: Any = None,
        mask: Any = None,
        stop: Any = (),
        on_prefill: Any = None,
        key: Any = "",
        deadline: Any = None,
        **sampling: Any,
    ) -> Wish:
        """From arguments of any type."""
        arguments.function("on_prefill", on_prefill, "give a function of two numbers, or None")
        arguments.function("mask", mask, "give a function of the tokens so far, or None")
        wish = cls(
            max_tokens=arguments.integer("max_tokens", max_tokens, least=1),
            sampling=Sampling(**sampling),
            mask=mask,
            logprobs=None if logprobs is None else arguments.count("logprobs", logprobs),
            stop=arguments.texts("stop", stop),
            on_prefill=on_prefill,
            key=arguments.text("key", key),
            deadline=None if deadline is None else time.perf_counter() + _seconds(deadline),
        )
        if wish.sampling.min_tokens > wish.max_tokens:
            hint = f"give at most max_tokens, which is {wish.max_tokens}"
            raise ArgumentError("min_tokens", f"min_tokens is {wish.sampling.min_tokens}", hint=hint)
        return wish


def _seconds(deadline: Any) -> float:
    hint = "give the seconds after which the answer ends, or None"
    seconds = arguments.real("deadline", deadline, hint)
    if seconds < 0:
        raise RunError(f"deadline is {deadline}", hint=hint)
    return seconds
