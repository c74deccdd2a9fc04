"""Calls of functions in the text of an answer, as it comes.

Models write a call as JSON, mostly between markers: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`. A grammar
sees to it that they write nothing else there, so the reader needs only to know where things end.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Sequence

from bedplate.serve.tools import OPENING, CallPiece, Form

_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_JSON_BEGINS = re.compile(r"[\[{]")


class CallReader:
    """Tells text and calls of one answer apart.

    must_call: the answer begins with a call.
    """

    def __init__(self, form: Form, must_call: bool) -> None:
        self._form = form
        self.count = 0  # calls so far
        self._held = ""  # text that is not told yet
        self._id = ""
        self._depth, self._in_string, self._escaped = 0, False, False
        self._told: list[str | CallPiece] = []
        self._step: Callable[[], bool] = (
            self._between if must_call else self._text if form.marker else self._opening
        )

    def read(self, text: str, tokens: Sequence[int]) -> list[str | CallPiece]:
        """What is certain now that an answer has gone on by some text, which tokens stand for."""
        if self._form.marker_token in tokens and self._step == self._text:
            begin = _JSON_BEGINS.search(text)  # what stands before it was held back for a stop string
            at = len(text) if begin is None else begin.start()
            self._say((self._held + text[:at]).rstrip())
            self._held, self._step = text[at:], self._between
        else:
            self._held += text
        while self._step():
            pass
        told, self._told = self._told, []
        return told

    @property
    def is_whole(self) -> bool:
        """Whether all calls that have begun have ended."""
        return self._step not in (self._head, self._arguments)

    @property
    def has_cut(self) -> bool:
        """Whether a piece of a call was told, and not the end of it."""
        return self._step == self._arguments

    def finish(self) -> list[str | CallPiece]:
        """What was held back, and turned out to be text."""
        if self._step in (self._text, self._opening):
            self._say(self._held)
        told, self._told, self._held = self._told, [], ""
        return told

    def _say(self, text: str) -> None:
        if text:
            self._told.append(text)

    def _text(self) -> bool:
        marker = self._form.marker
        at = self._held.find(marker) if marker else -1
        if at >= 0:
            self._say(self._held[:at].rstrip())
            self._held, self._step = self._held[at + len(marker) :], self._between
            return True
        certain = self._held
        if marker:  # the end may begin it, and no space before it is told
            longest = next((n for n in range(len(marker) - 1, 0, -1) if certain.endswith(marker[:n])), 0)
            certain = certain[: len(certain) - longest].rstrip()
        self._say(certain)
        self._held = self._held[len(certain) :]
        return False

    def _opening(self) -> bool:
        if self._held.startswith(OPENING):
            self._step = self._head
        elif OPENING.startswith(self._held):
            return False
        else:
            self._step = self._text
        return True

    def _between(self) -> bool:
        """Markers and commas, up to the next call."""
        at = self._held.find("{")
        self._held = self._held[at:] if at >= 0 else ""
        if at >= 0:
            self._step = self._head
        return at >= 0

    def _head(self) -> bool:
        head = _HEAD.match(self._held)
        if head is None:
            return False
        letters = uuid.uuid4().hex
        self._id = letters[:9] if self._form.short_ids else f"call_{letters[:24]}"
        self._told.append(CallPiece(self.count, self._id, json.loads(head[1]), ""))
        self.count += 1
        self._held, self._step = self._held[head.end() :], self._arguments
        return True

    def _arguments(self) -> bool:
        end = self._end_of_object()
        piece, self._held = self._held[:end], self._held[end:]
        if piece:
            self._told.append(CallPiece(self.count - 1, self._id, None, piece))
        if self._depth or not piece:
            return False
        self._step = self._between
        return True

    def _end_of_object(self) -> int:
        """Where in what is held the object ends, or all of it."""
        for at, character in enumerate(self._held):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    return at + 1
        return len(self._held)
