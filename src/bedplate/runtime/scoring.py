"""How likely the tokens of a given text are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from bedplate import _native
from bedplate.errors import RunError
from bedplate.runtime.held import Held
from bedplate.runtime.request import TokenLogprobs
from bedplate.runtime.scheduler import Scheduler
from bedplate.runtime.steps import Part, compute, packed
from bedplate.runtime.weights import Weights

_ROWS = 64  # whose logits are computed at once: those of many positions take much memory


def scored(
    held: Held,
    weights: Weights,
    ids: Sequence[int],
    top: int,
    *,
    scheduler: Scheduler,
    reserve: Callable[[Sequence[tuple[_native.Kv, int, int]]], None],
) -> Iterator[TokenLogprobs]:
    """Of each token but the first, which nothing comes before. Others have turns between the chunks of a text.

    held: nothing else uses it. It holds the text in the end.
    RunError: logits are not numbers.
    """
    held.clear(weights, len(ids))
    whole = Part(held, weights, ids, wanted=len(ids))
    for step in packed([whole], lambda: scheduler.rows_of_a_call(_ROWS)):
        begin, chunk = len(held.tokens), step[0].tokens
        with scheduler.turn(again=begin > 0):
            reserve([(held.computing, begin, begin + len(chunk))])
            logits = compute(step)
            held.append(weights, chunk)
        for row, token in enumerate(ids[begin + 1 : begin + 1 + len(chunk)]):
            try:
                logprob, likeliest = logits.log_probabilities(row, token, top)
            except _native.NativeError as error:
                raise RunError(str(error), hint="bedplate verify BUNDLE finds damaged files") from error
            yield TokenLogprobs(token, logprob, tuple(likeliest))
