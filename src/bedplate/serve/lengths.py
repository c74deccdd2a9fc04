"""Prompts that are certainly too long, so that nobody has to tokenize or to look through them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from bedplate.runtime.messages import Conversation
from bedplate.runtime.session import Prompt
from bedplate.runtime.tokenizer import Tokenizer
from bedplate.serve.catalog import Model
from bedplate.serve.errors import ApiError

_COMPOSED = 4  # characters at most, of which Unicode composes one
_LOOK_AT_ALL = {"ByteLevel", "Split", "Digits", "Metaspace"}  # pre-tokenizers that drop nothing
_longest: WeakKeyDictionary[Tokenizer, int | None] = WeakKeyDictionary()


def check_length(model: Model, prompt: Prompt, most: int | None, *, param: str = "prompt") -> None:
    """In a thread: a tokenizer may be looked through.

    most: tokens that the operator allows. None: as many as the context has.
    ApiError: the prompt has more, in any case if it is a text or a conversation.
    """
    context = model.base.engine.limits.max_context
    most = context if most is None else min(most, context)
    if isinstance(prompt, str):
        length = len(prompt)
    elif isinstance(prompt, Conversation):
        length = _characters([prompt.messages, prompt.tools])
    else:
        if len(prompt) > most:
            message = f"{param}: it has {len(prompt)} tokens, more than {most}."
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        return
    if length <= most:  # a token has a character at least
        return
    longest = _longest_of(model.tokenizer)
    if longest is None or length <= most * longest:
        return
    if isinstance(prompt, Conversation):  # a chat template may leave out some of it
        length = len(model.tokenizer.render(prompt))
    if length > most * longest:
        message = f"The prompt has {length} characters, so it has more than {most} tokens."
        raise ApiError(400, message, param="prompt", code="context_length_exceeded")


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, (list, tuple)) else 0


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
    splitters = [step["type"] for step in _steps(data.get("pre_tokenizer"), "pretokenizers")]
    known = model["vocab"] if isinstance(model["vocab"], dict) else {piece for piece, _ in model["vocab"]}
    if not set(splitters) <= _LOOK_AT_ALL or any(
        step.get("behavior") == "Removed" for step in _steps(data.get("pre_tokenizer"), "pretokenizers")
    ):
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
