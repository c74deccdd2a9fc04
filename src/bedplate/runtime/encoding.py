"""Text → tokens, without making other threads wait."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_LONG = 1 << 12  # characters: less than that takes a few milliseconds


def encoding_of(backend: Backend, text: str, *, add_special_tokens: bool = True) -> Any:
    """What `backend.encode` gives: `ids`, and `offsets` in characters.

    Only a batch lets other threads run Python meanwhile. A text of some MB takes seconds.
    """
    if len(text) < _LONG:
        return backend.encode(text, add_special_tokens=add_special_tokens)
    return backend.encode_batch([text], add_special_tokens=add_special_tokens)[0]
