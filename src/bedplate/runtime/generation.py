"""From logits to events: the tokens of a generation one after the other, and their text."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

from bedplate.runtime.request import Event, Request, TokenLogprobs
from bedplate.runtime.text import StopFilter, TextStream

if TYPE_CHECKING:
    from collections.abc import Generator

    from bedplate import _native


class Source(NamedTuple):
    """What a generation needs of its session.

    prefill: logits of the prompt's last position.  go_on: logits after one more token.  Both give None if the
    generation was cancelled.  ended: is called once it has ended.  room: how many tokens fit.
    """

    prefill: Callable[[Request], _native.Logits | None]
    go_on: Callable[[Request, int], _native.Logits | None]
    ended: Callable[[Request], None]
    decode: Callable[[Sequence[int]], str]
    end_ids: Collection[int]
    room: int


class _Chosen(NamedTuple):
    token: int
    logprobs: TokenLogprobs | None


class _Watch:
    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        before, self._last = self._last, time.perf_counter()
        return self._last - before


def events(request: Request, source: Source) -> Generator[Event]:
    """Generate. The last event has the finish reason, also after `cancel`."""
    stats = request.stats
    text, stops = TextStream(source.decode), StopFilter(request.wish.stop)
    watch = _Watch()
    waiting: list[_Chosen] = []  # for their text
    piece = ""
    try:
        for chosen in _tokens(request, source, watch):
            waiting.append(chosen)
            piece = stops.push(text.push(chosen.token))
            if stops.stopped:
                break
            if piece:
                stats.decode_seconds += watch.lap()
                yield _event(request, piece, waiting)
                watch.lap()
                waiting, piece = [], ""
        piece += stops.push(text.finish()) + stops.finish()
        if stops.stopped:
            stats.finish_reason = "stop"
        stats.decode_seconds += watch.lap()
    finally:
        if stats.finish_reason is None:
            stats.finish_reason = "cancelled"
        source.ended(request)
    yield _event(request, piece, waiting)


def texts(pieces: Generator[Event]) -> Iterator[str]:
    """The texts of events."""
    with closing(pieces):
        for event in pieces:
            if event.text:
                yield event.text


def _event(request: Request, text: str, chosen: Sequence[_Chosen]) -> Event:
    return Event(
        text=text,
        tokens=tuple(one.token for one in chosen),
        logprobs=None
        if request.wish.logprobs is None
        else tuple(one.logprobs for one in chosen if one.logprobs is not None),
        finish_reason=request.stats.finish_reason,
    )


def _tokens(request: Request, source: Source, watch: _Watch) -> Iterator[_Chosen]:
    stats, wish = request.stats, request.wish
    end_ids = () if wish.sampling.ignore_eos else source.end_ids
    logits = source.prefill(request)
    stats.prefill_seconds += watch.lap()
    while logits is not None:
        token = request.sampler.choose(logits)
        logprobs = _logprobs(logits, token, wish.logprobs)
        if not stats.generated_tokens:
            stats.prefill_seconds += watch.lap()
        if token in end_ids:
            stats.finish_reason = "stop"
            return
        stats.generated_tokens += 1
        yield _Chosen(token, logprobs)
        if stats.generated_tokens == min(wish.max_tokens, source.room):
            stats.finish_reason = "length"
            return
        logits = source.go_on(request, token)


def _logprobs(logits: _native.Logits, token: int, top: int | None) -> TokenLogprobs | None:
    if top is None:
        return None
    chosen, likeliest = logits.log_probabilities(0, token, top)
    return TokenLogprobs(token, chosen, tuple(likeliest))
