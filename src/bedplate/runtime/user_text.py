"""Text of users stays text: what spells a special token inside a message is encoded as ordinary characters.

Only the chat template can say which special tokens are the template's. So its input is marked: characters that no
text holds (Unicode's noncharacters) go around whatever spells a special token in a string of a message, and where a
string might spell one together with its neighbours. The template renders the conversation with and without marks, and
the marks tell where the user's text went. If a special token of the whole text is the user's, the text is encoded by a
second tokenizer: the same one, but its special tokens are spelled so that only the template's are found.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as Backend

from bedplate.errors import RunError

_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
_HINT = (
    "take it out of the message, or allow special tokens in messages (allow_special=True, --allow-special)"
)

Render = Callable[[Sequence[Mapping[str, Any]]], str]
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

    @functools.cached_property
    def _parts(self) -> _Parts:
        return _Parts.of(self._special.values())

    def encode(self, messages: Sequence[Mapping[str, Any]], render: Render, template: str) -> list[int]:
        """Tokens of a conversation, as `render` writes it. Without special tokens in it, those of the plain tokenizer.

        template: the source of what renders. RunError: it cannot be told whose a special token is.
        """
        text = render(messages)
        plain = self._backend.encode(text, add_special_tokens=False)
        free = _free_characters([template, text, *_strings(messages), *self._special.values()])
        marks = _Marks(begin=free[0], end=free[1], edge=free[2])
        marked = _map_strings(messages, functools.partial(self._parts.mark, marks=marks))
        if marked == messages:
            return list(plain.ids)
        places = _places(self._render_marked(render, marked), text, marks)
        spelled = self._spelled(plain, text)
        genuine = [span for span in spelled if not _is_users(span, places, marks)]
        if genuine == spelled:
            return list(plain.ids)
        guard = free[3]
        if guard not in self._guarded:
            self._guarded = {guard: _Guarded(self._backend, self._special, guard)}
        return self._guarded[guard].encode(text, genuine)

    def _render_marked(self, render: Render, marked: Sequence[Mapping[str, Any]]) -> str:
        try:
            return render(marked)
        except RunError as error:
            raise _unclear() from error

    def _spelled(self, encoding: Any, text: str) -> list[Span]:
        """Where the text spells the special tokens that it was encoded to."""
        spans = []
        for number, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            content = self._special.get(number)
            # Spaces beside it may belong to the token; an unknown character is a special token that nobody spelled.
            if content is not None and (at := text.find(content, begin, end)) >= 0:
                spans.append((at, at + len(content)))
        return spans


@dataclass(frozen=True, kw_only=True)
class _Marks:
    """begin, end: around what spells a special token.  edge: at the end of a string that might be half of one."""

    begin: str
    end: str
    edge: str

    def __iter__(self) -> Iterator[str]:
        return iter((self.begin, self.end, self.edge))


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """Special tokens, and what they begin and end with. In lower case: a template may change that of a text."""

    tokens: frozenset[str]
    beginnings: frozenset[str]
    ends: frozenset[str]
    longest: int

    @classmethod
    def of(cls, contents: Any) -> _Parts:
        tokens = frozenset(_lower(content) for content in contents)
        return cls(
            tokens=tokens,
            beginnings=frozenset(token[:n] for token in tokens for n in range(1, len(token))),
            ends=frozenset(token[n:] for token in tokens for n in range(1, len(token))),
            longest=max(map(len, tokens), default=0),
        )

    def mark(self, text: str, *, marks: _Marks) -> str:
        """The text with marks in it."""
        lower, inserted = _lower(text), list[tuple[int, int, str]]()
        for token in self.tokens:
            at = lower.find(token)
            while at >= 0:
                inserted += [(at, 1, marks.begin), (at + len(token), 0, marks.end)]
                at = lower.find(token, at + 1)
        lengths = range(1, min(self.longest, len(text) + 1))
        if any(lower[:n] in self.ends for n in lengths):
            inserted.append((0, 2, marks.edge))
        if any(lower[-n:] in self.beginnings for n in lengths):
            inserted.append((len(text), 2, marks.edge))
        pieces, done = [], 0
        for at, _, mark in sorted(set(inserted)):
            pieces += [text[done:at], mark]
            done = at
        return "".join(pieces) + text[done:]


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
        encoding = self._backend.encode(guarded, add_special_tokens=False)
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


def _places(marked: str, text: str, marks: _Marks) -> dict[int, set[str]]:
    """Positions in a text → the marks there. RunError: without its marks, what was rendered is another text."""
    for mark in marks:  # as JSON and Python write what is not ASCII, or cannot be shown
        marked = re.sub(rf"\\+u{ord(mark):04x}", mark, marked)
    places, pieces, at = dict[int, set[str]](), [], 0
    for piece in re.split(f"([{''.join(marks)}])", marked):
        if piece in (*marks,):
            places.setdefault(at, set()).add(piece)
        else:
            pieces.append(piece)
            at += len(piece)
    if "".join(pieces) != text:
        raise _unclear()
    return places


def _is_users(span: Span, places: Mapping[int, set[str]], marks: _Marks) -> bool:
    """Whether what spells a special token is the user's: in whole, or in part."""
    begin, end = span
    whole = marks.begin in places.get(begin, ()) and marks.end in places.get(end, ())
    return whole or any(begin < at < end for at in places)


def _free_characters(texts: Sequence[str]) -> list[str]:
    """Noncharacters that are in none of the texts, and are not spelled in any as an escape."""
    free = [
        character
        for character in _NONCHARACTERS
        if not any(character in text or f"u{ord(character):04x}" in text for text in texts)
    ]
    if len(free) < 4:
        raise RunError("the messages hold too many of Unicode's noncharacters", hint="take some of them out")
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


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(name): _map_strings(item, change) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        copies = (_map_strings(item, change) for item in value)
        return list(copies) if isinstance(value, list) else tuple(copies)
    return value


def _lower(text: str) -> str:
    """In lower case, where that leaves every character in its place."""
    lower = text.lower()
    return lower if len(lower) == len(text) else text


def _unclear() -> RunError:
    return RunError(
        "a message holds the text of a special token, and whether the chat template or the message wrote it cannot be "
        "told",
        hint=_HINT,
    )
