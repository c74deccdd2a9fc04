"""Speculation by lookup: what stood after the same tokens before may stand there again.

Proposed tokens are rows of the step that computes the next token in any case. Those that turn out to be what is chosen
are tokens without a step of their own. The others cost the time of their rows.
"""

from __future__ import annotations

from collections.abc import Sequence

GRAMS = (3, 2)  # so many tokens must be the same: the longer place counts first
MOST = 8  # tokens proposed at once
# Parts of a step's time: what a row more takes, and what may be lost of each token's.
_ROW, _LOSS = 0.3, 0.02
_START = 2.0  # steps that may be lost before anything was won
_CREDIT = 4.0  # and no more than this is kept of what was won: texts change


class Lookup:
    """Of one generation. tokens: of its prompt."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # of GRAMS tokens: where what follows them begins
        self._credit = _START  # in steps
        self._length = 2  # how many to propose
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """The text has one more token."""
        count = len(self._tokens)
        for size in GRAMS:
            if count >= size:  # now that something follows them
                self._ends[tuple(self._tokens[-size:])] = count
        self._tokens.append(token)

    def propose(self, most: int) -> list[int]:
        """Up to `most` tokens that may follow. None, if too many were wrong lately."""
        count = min(most, self._length, int(self._credit / _ROW))
        places = (self._ends.get(tuple(self._tokens[-size:])) for size in GRAMS)
        at = next((place for place in places if place is not None), None)
        if at is None or count < 1:
            return []
        found = self._tokens[at : at + count]
        while len(found) < count:  # a text that repeats itself at once goes on doing so
            found += found[: count - len(found)]
        return found

    def checked(self, proposed: int, right: int) -> None:
        """A token was chosen, and `right` of the proposed ones too."""
        self._credit = min(_CREDIT, self._credit + _LOSS + right - _ROW * proposed)
        if proposed:
            self._length = min(MOST, 2 * proposed) if right == proposed else max(1, right + 1)
