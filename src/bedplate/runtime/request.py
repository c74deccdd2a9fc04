"""A generation: what the caller wants, checked, and how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from bedplate.runtime import arguments
from bedplate.runtime.sampling import Sampling
from bedplate.runtime.weights import Weights

FinishReason = Literal["stop", "length", "cancelled"]
Progress = Callable[[int, int], None]


@dataclass(kw_only=True)
class Statistics:
    """Statistics of one generation. They change while it goes on.

    reused_tokens: tokens of the prompt whose keys and values the session or the cache already had.
    finish_reason: None until the generation has ended. "stop": at an end token or a stop string. "length": at
        max_tokens or the end of the context. "cancelled": something else ended it.
    """

    prompt_tokens: int
    reused_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    finish_reason: FinishReason | None = None


class Wish(NamedTuple):
    """What a caller wants. RunError: an argument has a wrong type or value."""

    max_tokens: int
    sampling: Sampling
    seed: int
    stop: tuple[str, ...]
    on_prefill: Progress | None

    @classmethod
    def of(
        cls,
        *,
        max_tokens: Any,
        temperature: Any,
        top_p: Any,
        top_k: Any,
        seed: Any,
        stop: Any,
        on_prefill: Any,
    ) -> Wish:
        """From arguments of any type."""
        arguments.function("on_prefill", on_prefill, "give a function of two numbers, or None")
        return cls(
            max_tokens=arguments.integer("max_tokens", max_tokens, least=1),
            sampling=Sampling(temperature=temperature, top_p=top_p, top_k=top_k),
            seed=arguments.integer("seed", seed, least=0),
            stop=arguments.texts("stop", stop),
            on_prefill=on_prefill,
        )


class Request(NamedTuple):
    """A generation in progress: the session's `_running` as long as it may go on."""

    prompt: list[int]
    weights: Weights
    wish: Wish
    stats: Statistics
