"""Texts that are certainly too long, so that nobody has to tokenize them."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from bedplate.runtime.messages import DEEPEST, Conversation
from bedplate.runtime.tokenizer import Tokenizer

_COMPOSED = 4  # characters at most, of which Unicode composes one
_LOOK_AT_ALL = {"ByteLevel", "Split", "Digits", "Metaspace"}  # pre-tokenizers that drop nothing
_PRINTED = {
    *range(0x21, 0x7F),
    *range(0xA1, 0xAD),
    *range(0xAE, 0x100),
}  # bytes of characters that one can see
_CONTINUING = range(0x80, 0xC0)  # bytes of UTF-8, one of which is in each character beyond ASCII


class _Bound(NamedTuple):
    """longest: how many characters of a text become one token at most.  lost: those that become none."""

    longest: int
    lost: str = ""


_bounds: WeakKeyDictionary[Tokenizer, _Bound | None] = WeakKeyDictionary()


def too_long(tokenizer: Tokenizer, prompt: str | Conversation, most: int) -> int | None:
    """How many characters a prompt has that has more tokens than `most` in any case. None: it may have fewer.

    RunError: see `Tokenizer.render`.
    """
    length = len(prompt) if isinstance(prompt, str) else _characters([prompt.messages, prompt.tools])
    if length <= most:  # a token has a character at least
        return None
    bound = _bound_of(tokenizer)
    if bound is None or length <= most * bound.longest:
        return None
    # A chat template may leave out some of it.
    text = tokenizer.render(prompt) if isinstance(prompt, Conversation) else prompt
    kept = len(text) - sum(map(text.count, bound.lost))
    return kept if kept > most * bound.longest else None


def _characters(value: Any, depth: int = 0) -> int:
    if isinstance(value, str):
        return len(value)
    if depth > DEEPEST or not isinstance(value, (dict, list, tuple)):
        return 0
    parts = value.values() if isinstance(value, dict) else value
    return sum(_characters(part, depth + 1) for part in parts)


def _bound_of(tokenizer: Tokenizer) -> _Bound | None:
    """None: nobody knows."""
    root = tokenizer.root
    if root not in _bounds:
        _bounds[root] = _bound_in(json.loads(root.to_json()))
    return _bounds[root]


def _bound_in(data: dict[str, Any]) -> _Bound | None:
    """As for `_bound_of`, of a `tokenizer.json`."""
    model, normalizers = data["model"], _steps(data.get("normalizer"), "normalizers")
    steps = _steps(data.get("pre_tokenizer"), "pretokenizers")
    splitters = {step["type"] for step in steps}
    known = model["vocab"] if isinstance(model["vocab"], dict) else {piece for piece, _ in model["vocab"]}
    if not splitters <= _LOOK_AT_ALL or any(step.get("behavior") == "Removed" for step in steps):
        return None
    # Else characters that are unknown may be dropped, or many of them become one token.
    if "ByteLevel" in splitters:
        unknown = [byte for byte in range(256) if _shown(byte) not in known]
    elif model.get("byte_fallback"):
        unknown = [byte for byte in range(256) if f"<0x{byte:02X}>" not in known]
    else:
        return None
    # SmolLM2 has no tokens for six control characters. Without one for what is unknown, they are dropped.
    drops = "ByteLevel" in splitters and model.get("unk_token") is None
    if (unknown and not drops) or any(byte in _CONTINUING for byte in unknown):
        return None
    if any(token["lstrip"] or token["rstrip"] for token in data["added_tokens"]):  # with the spaces beside it
        return None
    if not all(map(_keeps_length, normalizers)):
        return None
    texts = [*known, *(token["content"] for token in data["added_tokens"])]
    composed = _COMPOSED if any(one["type"] == "NFC" for one in normalizers) else 1
    lost = "".join(map(chr, unknown[: bisect_left(unknown, 0x80)]))
    return _Bound(max(map(len, texts)) * composed, lost)


def _shown(byte: int) -> str:
    """The character that stands for a byte in tokens of the kind ByteLevel: itself, or one of the next from 256 on."""
    if byte in _PRINTED:
        return chr(byte)
    return chr(256 + byte - sum(one < byte for one in _PRINTED))


def _steps(step: dict[str, Any] | None, inner: str) -> Sequence[dict[str, Any]]:
    if step is None:
        return []
    return (
        [one for part in step[inner] for one in _steps(part, inner)] if step["type"] == "Sequence" else [step]
    )


def _keeps_length(normalizer: dict[str, Any]) -> bool:
    """Whether it makes no text shorter, but by composing characters."""
    if normalizer["type"] == "Replace":
        replaced = normalizer["pattern"].get("String")
        return replaced is not None and len(replaced) <= len(normalizer["content"])
    return normalizer["type"] in ("NFC", "Prepend")
