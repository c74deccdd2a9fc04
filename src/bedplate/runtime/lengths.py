"""Texts that are certainly too long, so that nobody has to tokenize them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from bedplate.runtime.messages import DEEPEST, Conversation
from bedplate.runtime.tokenizer import Tokenizer

_COMPOSED = 4  # characters at most, of which Unicode composes one
_LOOK_AT_ALL = {"ByteLevel", "Split", "Digits", "Metaspace"}  # pre-tokenizers that drop nothing
_longest: WeakKeyDictionary[Tokenizer, int | None] = WeakKeyDictionary()


def too_long(tokenizer: Tokenizer, prompt: str | Conversation, most: int) -> int | None:
    """How many characters a prompt has that has more tokens than `most` in any case. None: it may have fewer.

    RunError: see `Tokenizer.render`.
    """
    length = len(prompt) if isinstance(prompt, str) else _characters([prompt.messages, prompt.tools])
    if length <= most:  # a token has a character at least
        return None
    longest = _longest_of(tokenizer)
    if longest is None or length <= most * longest:
        return None
    if isinstance(prompt, Conversation):  # a chat template may leave out some of it
        length = len(tokenizer.render(prompt))
    return length if length > most * longest else None


def _characters(value: Any, depth: int = 0) -> int:
    if isinstance(value, str):
        return len(value)
    if depth > DEEPEST or not isinstance(value, (dict, list, tuple)):
        return 0
    parts = value.values() if isinstance(value, dict) else value
    return sum(_characters(part, depth + 1) for part in parts)


def _longest_of(tokenizer: Tokenizer) -> int | None:
    """How many characters of a text become one token at most. None: nobody knows."""
    root = tokenizer.root
    if root not in _longest:
        _longest[root] = _longest_in(json.loads(root.to_json()))
    return _longest[root]


def _longest_in(data: dict[str, Any]) -> int | None:
    """As for `_longest_of`, of a `tokenizer.json`."""
    from tokenizers.pre_tokenizers import ByteLevel  # it takes a while, and is needed for long texts only

    model, normalizers = data["model"], _steps(data.get("normalizer"), "normalizers")
    steps = _steps(data.get("pre_tokenizer"), "pretokenizers")
    splitters = {step["type"] for step in steps}
    known = model["vocab"] if isinstance(model["vocab"], dict) else {piece for piece, _ in model["vocab"]}
    if not splitters <= _LOOK_AT_ALL or any(step.get("behavior") == "Removed" for step in steps):
        return None
    # Else characters that are unknown may be dropped, or many of them become one token.
    if "ByteLevel" in splitters:
        needed = ByteLevel.alphabet()
    elif model.get("byte_fallback"):
        needed = [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        return None
    if not all(one in known for one in needed):
        return None
    if any(token["lstrip"] or token["rstrip"] for token in data["added_tokens"]):  # with the spaces beside it
        return None
    if not all(map(_keeps_length, normalizers)):
        return None
    texts = [*known, *(token["content"] for token in data["added_tokens"])]
    return max(map(len, texts)) * (_COMPOSED if any(one["type"] == "NFC" for one in normalizers) else 1)


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
