"""From tokens to text, piece by piece: characters split over tokens, stop strings split over pieces."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what decoders make of bytes that are not a whole character yet
# A character has at most four bytes. Where more tokens wait, their bytes are no text, and the last ones tell whether
# that goes on: to decode all of them with each token would take ever longer.
_MOST = 8


class TextStream:
    """Decodes tokens as they come; the pieces together are the text that all tokens decode to.

    silent: tokens that the decoder leaves out. An answer may have thousands of them, so they are not kept.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], silent: Container[int] = ()) -> None:
        self._decode, self._silent = decode, silent
        # From the last piece's first token on, so that its decoder sees what precedes.
        self._ids: list[int] = []
        self._done = 0  # how many of them are in pieces already

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character lacks bytes."""
        if token in self._silent:
            return ""
        self._ids.append(token)
        if len(self._ids) - self._done > _MOST and self._decode(self._ids[-_MOST:]).endswith(_UNFINISHED):
            return ""
        piece = self._rest()
        if piece.endswith(_UNFINISHED):
            return ""
        if piece:
            del self._ids[: self._done]
            self._done = len(self._ids)
        return piece

    def finish(self) -> str:
        """What is left, whole characters or not."""
        piece = self._rest()
        self._done = len(self._ids)
        return piece

    def _rest(self) -> str:
        return self._decode(self._ids)[len(self._decode(self._ids[: self._done])) :]


class StopFilter:
    """Passes text on up to the first stop string, and holds back what may turn out to be the start of one.

    The first is the one that is complete first; of several that end at one character, the longest. So the text may be
    read a character at a time, and how it is cut into pieces changes nothing.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped_by: str | None = None

    @property
    def stopped(self) -> bool:
        return self.stopped_by is not None

    def push(self, piece: str) -> str:
        """The text that is safe to show. Nothing after a stop string was seen (`stopped`)."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.stopped_by = min(found)
            self._held = ""
            return text[:at]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back and turned out to be text."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
