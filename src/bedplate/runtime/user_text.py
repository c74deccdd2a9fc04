"""Text of users stays text: the text of a special token inside a message is encoded as ordinary characters.

Only the chat template can say which special tokens are the template's. So its input is marked: characters that no
text holds (Unicode's noncharacters) go around whatever spells a special token in a string of a message, and where a
string might spell one together with its neighbours. The template renders the conversation with and without marks, and
the marks tell which special tokens are its own. If the whole text would be encoded with others, or without one of
these, a second tokenizer encodes it: the same one, but with special tokens that are spelled as no text spells them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as Backend

from bedplate.errors import RunError
from bedplate.runtime.encoding import encoding_of
from bedplate.runtime.lazy import lazy

_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
_HINT = (
    "remove it from the message, or allow special tokens in messages (allow_special=True, --allow-special)"
)

Render = Callable[[Mapping[str, Any]], str]
Span = tuple[int, int]


class UserText:
    """Encodes conversations of one tokenizer.

    control: token ids that are special to the model, whatever the tokenizer says of them.
    """

    def __init__(self, backend: Backend, control: frozenset[int]) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._special = {
            number: token.content for number, token in added.items() if token.special or number in control
        }
        self._guarded: dict[str, _Guarded] = {}

    @lazy
    def _marker(self) -> _Marker:
        return _Marker(list(self._special.values()))

    def encode(self, conversation: Mapping[str, Any], render: Render, template: str) -> list[int]:
        """Tokens of a conversation, as `render` writes it. Without special tokens in it, those of the plain tokenizer.

        conversation: messages and tools.  template: its source.
        RunError: bedplate cannot tell whether the template or a message wrote a special token.
        """
        text = render(conversation)
        plain = encoding_of(self._backend, text, add_special_tokens=False)
        free = _free_characters([template, text, *_strings(conversation), *self._special.values()])
        marks, guard = _Marks(begin=free[0], end=free[1], edge=free[2]), free[-1]
        marked = self._marker.mark(conversation, marks)
        if marked == conversation:
            return list(plain.ids)
        genuine = self._genuine(_rendered_marked(render, marked, marks), text, marks)
        if genuine == self._spelled(plain, text):
            return list(plain.ids)
        if guard not in self._guarded:
            self._guarded = {guard: _Guarded(self._backend, self._special, guard)}
        return self._guarded[guard].encode(text, genuine)

    def _genuine(self, marked: str, text: str, marks: _Marks) -> list[Span]:
        """Where in the text the chat template spells special tokens. No token reaches over a mark."""
        places = [0]  # characters before each one that are no marks
        for character in marked:
            places.append(places[-1] + (character not in marks))
        if "".join(character for character in marked if character not in marks) != text:
            raise _unclear()
        spelled = self._spelled(encoding_of(self._backend, marked, add_special_tokens=False), marked)
        return [
            (places[begin], places[end])
            for begin, end in spelled
            if not (marked[:begin].endswith(marks.begin) and marked.startswith(marks.end, end))
        ]

    def _spelled(self, encoding: Any, text: str) -> list[Span]:
        """Where the text spells the special tokens that it was encoded to."""
        spans = []
        for number, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            content = self._special.get(number)
            # Spaces beside it may belong to the token; an unknown character is a special token that nobody spelled.
            if content is not None and (at := text.find(content, begin, end)) >= 0:
                spans.append((at, at + len(content)))
        return spans


def _rendered_marked(render: Render, marked: Mapping[str, Any], marks: _Marks) -> str:
    try:
        text = render(marked)
    except RunError as error:
        raise _unclear() from error
    for mark in marks:  # as JSON writes what is not ASCII, and Python what cannot be shown
        text = re.sub(rf"\\+u{ord(mark):04x}", mark, text)
    return text


@dataclass(frozen=True, kw_only=True)
class _Marks:
    """begin, end: around what spells a special token.  edge: at the end of a string that might be half of one."""

    begin: str
    end: str
    edge: str

    def __iter__(self) -> Iterator[str]:
        return iter((self.begin, self.end, self.edge))

    def __contains__(self, character: str) -> bool:
        return character in (self.begin, self.end, self.edge)


class _Marker:
    """Puts marks into texts. tokens: the special ones."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._tokens = {_lower(token) for token in tokens}  # a template may change the case of a text
        self._edges = _Edges(tokens)
        self._word_edges = _Edges([token for token in tokens if token.isidentifier()])

    def mark(self, value: Any, marks: _Marks) -> Any:
        """A copy of a message, or of a part of one, with marks in its texts."""
        if isinstance(value, str):
            # Templates compare words ("user") with words: one is marked where another word could complete it.
            edges = self._word_edges if value.isidentifier() else self._edges
            return self._mark(value, marks, edges)
        if isinstance(value, Mapping):
            return {self._mark_name(name, marks): self.mark(item, marks) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            copies = (self.mark(item, marks) for item in value)
            return list(copies) if isinstance(value, list) else tuple(copies)
        return value

    def _mark_name(self, name: str, marks: _Marks) -> str:
        """Templates ask for words by name; other names are text that they write."""
        return self._mark(name, marks, None if name.isidentifier() else self._edges)

    def _mark(self, text: str, marks: _Marks, edges: _Edges | None) -> str:
        lower, found = _lower(text), set[tuple[int, int, str]]()  # where, in which order, and what
        for token in self._tokens:
            at = lower.find(token)
            while at >= 0:
                found |= {(at, 1, marks.begin), (at + len(token), 0, marks.end)}
                at = lower.find(token, at + 1)
        if edges is not None and edges.at_begin(text):
            found.add((0, -1, marks.edge))
        if edges is not None and edges.at_end(text):
            found.add((len(text), 2, marks.edge))
        pieces, done = [], 0
        for at, _, mark in sorted(found):
            pieces += [text[done:at], mark]
            done = at
        return "".join(pieces) + text[done:]


class _Edges:
    """What tokens begin with, and what they end with: a text that ends, or begins, so might be half of one."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._beginnings = {token[:n] for token in tokens for n in range(1, len(token))}
        self._ends = {token[n:] for token in tokens for n in range(1, len(token))}
        self._lengths = range(1, max(map(len, tokens), default=0))

    def at_begin(self, text: str) -> bool:
        return any(text[:n] in self._ends for n in self._lengths)

    def at_end(self, text: str) -> bool:
        return any(text[-n:] in self._beginnings for n in self._lengths)


class _Guarded:
    """A tokenizer whose special tokens are found only between two guards."""

    def __init__(self, backend: Backend, special: Mapping[int, str], guard: str) -> None:
        self._guard = guard
        guarded = {content: f"{guard}{content}{guard}" for content in special.values()}
        self._backend = Backend.from_str(json.dumps(_respelled(json.loads(backend.to_str()), guarded)))
        # Ids of added tokens that the model's own vocabulary lacks are given out anew.
        self._ids = {
            self._backend.token_to_id(guarded.get(token.content, token.content)): number
            for number, token in backend.get_added_tokens_decoder().items()
        }
        self._special = special

    def encode(self, text: str, genuine: Sequence[Span]) -> list[int]:
        """Tokens of a text whose special tokens are those at some places, and no others."""
        pieces, done = [], 0
        for begin, end in genuine:
            pieces += [text[done:begin], self._guard, text[begin:end], self._guard]
            done = end
        guarded = "".join(pieces) + text[done:]
        encoding = encoding_of(self._backend, guarded, add_special_tokens=False)
        found, ids = 0, [self._ids.get(number, number) for number in encoding.ids]
        for number, (begin, end) in zip(ids, encoding.offsets, strict=True):
            found += number in self._special and self._guard in guarded[begin:end]
        if found != len(genuine):
            raise _unclear()
        return ids


def _respelled(tokenizer: dict[str, Any], guarded: Mapping[str, str]) -> dict[str, Any]:
    """A `tokenizer.json` with other names for some tokens, and without merges that make one of them."""
    for token in tokenizer["added_tokens"]:
        token["content"] = guarded.get(token["content"], token["content"])
    model = tokenizer["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {guarded.get(piece, piece): number for piece, number in model["vocab"].items()}
    else:
        model["vocab"] = [[guarded.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = guarded.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        model["merges"] = [
            (left, right)
            for left, right in model["merges"]
            if not guarded.keys() & {left, right, left + right}
        ]
    # It would add tokens, which a chat template has written, and trim places, which are compared here.
    return {**tokenizer, "post_processor": None, "truncation": None, "padding": None}


def _free_characters(texts: Sequence[str]) -> list[str]:
    """Noncharacters that are in none of the texts, and are not spelled in any as an escape."""
    free = [
        character
        for character in _NONCHARACTERS
        if not any(character in text or f"u{ord(character):04x}" in text for text in texts)
    ]
    if len(free) < 4:
        raise RunError("the messages hold too many of Unicode's noncharacters", hint="remove some of them")
    return free


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield name
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _lower(text: str) -> str:
    """In lower case, where that leaves every character in its place."""
    lower = text.lower()
    return lower if len(lower) == len(text) else text


def _unclear() -> RunError:
    return RunError(
        "a message holds the text of a special token, or a part of one, and the chat template looks into it: bedplate "
        "cannot tell whether the chat template or the message wrote the token",
        hint=_HINT,
    )
