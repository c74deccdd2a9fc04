"""How likely the tokens of a given text are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bedplate import _native
from bedplate.errors import RunError
from bedplate.runtime.held import Held
from bedplate.runtime.request import TokenLogprobs
from bedplate.runtime.scheduler import Scheduler
from bedplate.runtime.steps import LOGITS_ROWS, Part
from bedplate.runtime.weights import Weights


def scored(
    held: Held,
    weights: Weights,
    ids: Sequence[int],
    top: int,
    *,
    scheduler: Scheduler,
) -> Iterator[TokenLogprobs]:
    """Of each token but the first, which nothing comes before. Others have turns between the chunks of a text.

    held: nothing else uses it. It holds the text in the end.
    RunError: logits are not numbers.
    """
    held.clear(weights, len(ids))
    whole = Part(held, weights, ids, wanted=len(ids))
    for (piece,), logits in scheduler.in_turns([whole], LOGITS_ROWS):
        end = len(held.tokens)
        for row, token in enumerate(ids[end - len(piece.tokens) + 1 : end + 1]):
            try:
                logprob, likeliest = logits.log_probabilities(row, token, top)
            except _native.NativeError as error:
                raise RunError(str(error), hint="bedplate verify BUNDLE finds damaged files") from error
            yield TokenLogprobs(token, logprob, tuple(likeliest))
