"""Tokens of sessions → native steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from bedplate import _native
from bedplate.errors import RunError
from bedplate.runtime.held import Held
from bedplate.runtime.weights import Weights

LOGITS_ROWS = 64  # whose logits are computed at once: those of many positions take much memory
_T = TypeVar("_T")


class Part(NamedTuple):
    """Tokens that come after those that a session holds. wanted: the logits of so many, the last ones."""

    held: Held
    weights: Weights
    tokens: Sequence[int]
    wanted: int

    @property
    def fits(self) -> tuple[object, object]:
        """Parts that have the same can be computed in one step."""
        return self.weights.decoder, self.weights.layers


def compute(parts: Sequence[Part]) -> _native.Logits:
    """Compute parts that fit together in one step. Returns the logits that are wanted, part by part.

    What is held does not change: `Held.append` makes it hold the tokens.  RunError: there is no memory.
    """
    rows: list[_native.Row] = []
    for held, weights, tokens, wanted in parts:
        begin, unwanted = len(held.tokens), len(tokens) - wanted
        rows += [
            (token, begin + at, held.computing, *weights.at(begin + at), at >= unwanted)
            for at, token in enumerate(tokens)
        ]
    try:
        return parts[0].weights.decoder.step(rows)
    except (_native.NativeError, MemoryError) as error:
        hint = "reset sessions to free their memory"
        raise RunError(f"the step cannot be computed: {error}", hint=hint) from error


def groups(items: Iterable[_T], part_of: Callable[[_T], Part]) -> Iterator[list[_T]]:
    """Items whose parts fit together."""
    found: dict[tuple[object, object], list[_T]] = {}
    for item in items:
        found.setdefault(part_of(item).fits, []).append(item)
    yield from found.values()


def packed(parts: Sequence[Part], most: Callable[[], int]) -> Iterator[list[Part]]:
    """Parts that fit together, cut and put into steps of at most `most` rows, in order. Each one's tokens follow those
    of the cut before, once these are held.

    most: is asked before each step.
    """
    step: list[Part] = []
    room = most()
    for part in parts:
        rest = part.tokens
        while rest:
            piece, rest = rest[:room], rest[room:]
            wanted = max(0, part.wanted - len(rest))
            step.append(part._replace(tokens=piece, wanted=min(wanted, len(piece))))
            room -= len(piece)
            if not room:
                yield step
                step, room = [], most()
    if step:
        yield step
