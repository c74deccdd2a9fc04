"""The tokens of a tokenizer, as llguidance has them: made once for each `tokenizer.json`, and kept."""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Collection, Iterable, Mapping

from llguidance import LLTokenizer, TokenizerWrapper

from bedplate.runtime.tokenizer import Tokenizer
from bedplate.serve.errors import ApiError

_KNOWN: weakref.WeakKeyDictionary[Tokenizer, LLTokenizer] = weakref.WeakKeyDictionary()
_BUILDING = threading.Lock()


def vocabulary_of(tokenizer: Tokenizer, param: str) -> LLTokenizer:
    """Making it takes a second, and a hundred megabytes for a large one.

    ApiError: llguidance does not know such tokenizers, or no token ends a text, so the field `param` has no effect.
    """
    root = tokenizer.root
    with _BUILDING:
        if root not in _KNOWN:
            _KNOWN[root] = _made(root, param)
        return _KNOWN[root]


def _made(tokenizer: Tokenizer, param: str) -> LLTokenizer:
    ends = sorted(tokenizer.end_ids)
    if not ends:
        raise ApiError(400, "The model has no end token, which a grammar needs.", param=param)
    try:
        made = LLTokenizer(tokenizer.to_json(), eos_token=ends)
    except Exception as error:  # it raises nothing narrower
        message = f"Grammars cannot be used with the tokenizer of this model: {error}"
        raise ApiError(400, message, param=param) from error
    return LLTokenizer(TokenizerWrapper(_Tokens(made, tokenizer.added, ends)), eos_token=ends)


class _Tokens:
    """A tokenizer as llguidance takes one, which takes no text for a special token, and no other token for one.

    By itself it takes `<tool_call>` for special wherever that is an added token, because it looks so; and where a
    grammar forces the text of a special token, it forces that token.

    added: texts of added tokens, and whether they are special.
    """

    def __init__(
        self, made: LLTokenizer, added: Mapping[int, tuple[str, bool]], ends: Collection[int]
    ) -> None:
        self._made = made
        self.eos_token_id, self.bos_token_id = made.eos_token, None
        self.tokens = [made.decode_bytes([token]) for token in range(made.vocab_size)]
        shown = {token: text for token, (text, special) in added.items() if not special and token not in ends}
        self.special_token_ids = [
            token for token in range(made.vocab_size) if made.is_special_token(token) and token not in shown
        ]
        self._shown = {text.encode(): token for token, text in shown.items() if made.is_special_token(token)}
        self._split = re.compile(b"(" + _any(self._shown) + b")")
        hidden = [text.encode() for token, (text, _) in added.items() if token not in shown]
        # Its text is cut after its first character.
        self._cut = re.compile(b"(?=" + _any(hidden) + rb")([\x00-\x7f]|[\xc0-\xff][\x80-\xbf]*)")

    def __call__(self, text: bytes) -> list[int]:
        ids: list[int] = []
        for piece in self._split.split(text):
            if piece in self._shown:
                ids.append(self._shown[piece])
            else:
                done = 0
                for cut in self._cut.finditer(piece):
                    ids += self._made.tokenize_bytes(piece[done : cut.end()])
                    done = cut.end()
                ids += self._made.tokenize_bytes(piece[done:])
        return ids


def _any(texts: Iterable[bytes]) -> bytes:
    """A regex of any of them, the longest first."""
    return b"|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or b"(?!)"
