"""The tokens of a tokenizer, as llguidance has them: made once for each `tokenizer.json`, and kept."""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Mapping

from llguidance import LLTokenizer, TokenizerWrapper

from bedplate.runtime.tokenizer import Tokenizer
from bedplate.serve.errors import ApiError

_KNOWN: weakref.WeakKeyDictionary[Tokenizer, LLTokenizer] = weakref.WeakKeyDictionary()
_BUILDING = threading.Lock()


def vocabulary_of(tokenizer: Tokenizer) -> LLTokenizer:
    """Making it takes a second, and a hundred megabytes for a large one.

    ApiError: llguidance does not know such tokenizers, or no token ends a text.
    """
    root = tokenizer.root
    with _BUILDING:
        if root not in _KNOWN:
            _KNOWN[root] = _made(root)
        return _KNOWN[root]


def _made(tokenizer: Tokenizer) -> LLTokenizer:
    ends = sorted(tokenizer.end_ids)
    if not ends:
        raise ApiError(400, "The model has no end token, which a grammar needs.")
    try:
        made = LLTokenizer(tokenizer.to_json(), eos_token=ends)
    except Exception as error:  # it raises nothing narrower
        message = f"Grammars cannot be used with the tokenizer of this model: {error}"
        raise ApiError(400, message) from error
    shown = {
        text: token
        for token, text in tokenizer.added_texts.items()
        if token not in ends and made.is_special_token(token)
    }
    return LLTokenizer(TokenizerWrapper(_Shown(made, shown)), eos_token=ends) if shown else made


class _Shown:
    """A tokenizer as llguidance takes one. Some of its tokens are text: `<tool_call>`, say, which llguidance takes for
    special because it looks so.

    shown: these, by their texts.
    """

    def __init__(self, made: LLTokenizer, shown: Mapping[str, int]) -> None:
        self.eos_token_id, self.bos_token_id = made.eos_token, None
        self.tokens = [made.decode_bytes([token]) for token in range(made.vocab_size)]
        own = frozenset(shown.values())
        self.special_token_ids = [
            token for token in range(made.vocab_size) if made.is_special_token(token) and token not in own
        ]
        self._made, self._shown = made, {text.encode(): token for text, token in shown.items()}
        longest_first = sorted(self._shown, key=len, reverse=True)
        self._split = re.compile(b"(" + b"|".join(map(re.escape, longest_first)) + b")")

    def __call__(self, text: bytes) -> list[int]:
        ids: list[int] = []
        for piece in self._split.split(text):
            token = self._shown.get(piece)
            ids += self._made.tokenize_bytes(piece) if token is None else [token]
        return ids
