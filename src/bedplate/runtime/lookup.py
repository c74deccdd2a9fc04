"""Speculation by lookup: what followed the same tokens before may follow them again.

Proposed tokens are rows of the step that computes the next token in any case. Those that turn out to be what is chosen
are tokens without a step of their own. The others cost the time of their rows.

Two things are looked at. A text can copy what stands in it: the latest place counts where the same three tokens stood.
And answers of an adapter are often alike, JSON with the same names, say: `Habits` knows what usually follows in them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

RUN = 3  # so many tokens must be the same in what is copied
MOST = 8  # tokens proposed at once
# Parts of a step's time: what a row more takes, and what may be lost of each token's.
_ROW, _LOSS = 0.3, 0.02
_START = 2.0  # steps that may be lost before anything was won
_CREDIT = 4.0  # and no more than this is kept of what was won: texts change

_SIZES = (3, 1)  # what usually follows so many tokens: more of them count first
_SUREST = 3
_MOST_KNOWN = 8192  # runs of tokens, which take about a MiB
_MOST_HABITS = 16


class Followers:
    """What usually follows which tokens, in answers of one adapter. It has learned what followed twice.

    credit: in steps, what all proposals for these answers have won, less what they have lost.
    """

    def __init__(self) -> None:
        self.credit = _START
        # By the hash of a run: the token, and how sure it is. Two runs with one hash make a wrong proposal at most.
        self._known: dict[int, tuple[int, int]] = {}

    def learn(self, before: Sequence[int], token: int) -> None:
        """In an answer, `token` followed `before`."""
        for size in _SIZES:
            if len(before) < size:
                continue
            run = hash(tuple(before[-size:]))
            known, sure = self._known.get(run, (token, -1))
            if known == token:
                self._known[run] = token, min(_SUREST, sure + 1)
            else:
                self._known[run] = (known, sure - 1) if sure else (token, 0)
        while len(self._known) > _MOST_KNOWN:
            del self._known[next(iter(self._known))]  # what was learned first

    def after(self, tokens: Sequence[int]) -> int | None:
        """What usually follows. None: it is not known."""
        for size in _SIZES:
            known, sure = self._known.get(hash(tuple(tokens[-size:])), (0, 0))
            if sure:
                return known
        return None


class Habits:
    """The followers of each adapter that an engine uses. You can call it from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: dict[str, Followers] = {}  # least recently used first

    def of(self, root: str) -> Followers:
        """root: the digest of what computes the texts, with the salt: nobody learns from the answers of others."""
        with self._lock:
            followers = self._of.pop(root, None) or Followers()
            self._of[root] = followers
            while len(self._of) > _MOST_HABITS:
                del self._of[next(iter(self._of))]
            return followers


class Lookup:
    """Of one generation. tokens: of its prompt."""

    def __init__(self, tokens: Sequence[int], followers: Followers) -> None:
        self._tokens: list[int] = []
        self._followers = followers
        self._places: dict[tuple[int, ...], int] = {}  # of a run of tokens: where what follows it stands
        self._length = 2  # how many to copy
        for token in tokens:
            self._append(token)

    def append(self, token: int) -> None:
        """The answer has one more token."""
        self._followers.learn(self._tokens[-RUN:], token)
        self._append(token)

    def _append(self, token: int) -> None:
        count = len(self._tokens)
        if count >= RUN:  # now that something follows them
            self._places[tuple(self._tokens[-RUN:])] = count
        self._tokens.append(token)

    def propose(self, most: int) -> list[int]:
        """Up to `most` tokens that may follow. None, if too many were wrong lately."""
        found: list[int] = []
        last = self._tokens[-RUN:]
        while len(found) < min(most, MOST, int(self._followers.credit / _ROW)):
            place = self._places.get(tuple(last)) if len(found) < self._length else None
            token = self._followers.after(last) if place is None else self._tokens[place]
            if token is None:
                break
            found.append(token)
            last = [*last, token][-RUN:]
        return found

    def checked(self, proposed: int, right: int) -> None:
        """A token was chosen, and `right` of the proposed ones too."""
        won = _LOSS + right - _ROW * proposed
        self._followers.credit = min(_CREDIT, self._followers.credit + won)
        if proposed:
            self._length = min(MOST, 2 * proposed) if right == proposed else max(1, right + 1)
