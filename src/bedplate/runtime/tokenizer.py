"""Text and conversations to tokens and back: `tokenizer.json` and the chat template of a bundle."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer as Backend

from bedplate.bundle.store import Bundle, ChatSettings
from bedplate.errors import RunError

if TYPE_CHECKING:
    from bedplate.runtime.chat_template import ChatTemplate

Message = Mapping[str, Any]
"""One turn of a conversation: {"role": "system" | "user" | "assistant", "content": text}, and what else the
model's chat template reads."""


class Tokenizer:
    """special_tokens: `bos_token`, `eos_token` … as text, for the chat template."""

    def __init__(self, file: Path, *, chat_template: str | None, special_tokens: Mapping[str, str]) -> None:
        try:
            self._backend = Backend.from_file(str(file))
        except Exception as error:  # tokenizers raises nothing narrower
            raise RunError(f"not a tokenizer: {error}", where=file, hint="build the bundle again") from error
        self._backend.no_truncation()
        self._backend.no_padding()
        self._special_tokens = dict(special_tokens)
        self._chat_template = chat_template

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> Tokenizer:
        """With the chat settings of the base. RunError: the tokenizer cannot be read."""
        settings = bundle.chat_settings(None)
        return cls(
            bundle.tokenizer_file,
            chat_template=_template_text(settings),
            special_tokens=settings.special_tokens,
        )

    def for_adapter(self, bundle: Bundle, adapter: str) -> Tokenizer:
        """The same with an adapter's chat settings. What they share is in memory once."""
        settings = bundle.chat_settings(adapter)
        other = copy.copy(self)
        other.__dict__.pop("_template", None)
        other._chat_template, other._special_tokens = _template_text(settings), dict(settings.special_tokens)
        return other

    def encode(self, text: str) -> list[int]:
        """Tokens of plain text, with what the tokenizer puts before and after it (`bos`, for some models)."""
        return list(self._backend.encode(text).ids)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation, up to where the assistant is to speak. RunError: see `render`."""
        return list(self._backend.encode(self.render(messages), add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as text, like transformers' `apply_chat_template(add_generation_prompt=True)`.

        RunError: the chat template is missing or malformed, a message is not one, or the template refuses them.
        """
        template = self._template
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                hint = 'a message is {"role": "user", "content": "…"}'
                raise RunError(f"not a message: {message!r}", hint=hint)
        return template.render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=True,
            **self._special_tokens,
        )

    @cached_property
    def _template(self) -> ChatTemplate:
        from bedplate.runtime.chat_template import ChatTemplate

        if self._chat_template is None:
            hint = "give the prompt as text"
            raise RunError("the bundle has no chat template, so it takes no messages", hint=hint)
        return ChatTemplate(self._chat_template)


def _template_text(settings: ChatSettings) -> str | None:
    return None if settings.template_file is None else settings.template_file.read_text(encoding="utf-8")
