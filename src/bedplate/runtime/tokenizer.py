"""Text and conversations to tokens and back: `tokenizer.json` and the chat template of a bundle."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bedplate.bundle.store import Bundle
from bedplate.errors import RunError
from bedplate.runtime import arguments
from bedplate.runtime.encoding import encoding_of
from bedplate.runtime.lazy import lazy
from bedplate.runtime.messages import Conversation, Message, plain_messages, plain_tools

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

    from bedplate.runtime.chat_template import ChatTemplate
    from bedplate.runtime.template_guard import GuardedTemplate, Templates
    from bedplate.runtime.user_text import UserText


class Tokenizer:
    """The tokenizer of the base or of an adapter, which can have further tokens and a chat template of its own.

    backend: or the `tokenizer.json`, which is then opened when it is first used. RunError: it is not a tokenizer.
    chat_template: Jinja source. None: there is no template.  special_tokens: `bos_token`, `eos_token` … as text, for
    the chat template.  templates: render it, in place of this process.  end_ids, end_token: what ends an answer: ids,
    and the text of a token of this tokenizer. No text of a message becomes a special or an end token.
    """

    def __init__(
        self,
        backend: Backend | Path,
        *,
        chat_template: str | None,
        special_tokens: Mapping[str, str],
        templates: Templates | None = None,
        end_ids: Collection[int] = (),
        end_token: str | None = None,
    ) -> None:
        self._source = backend
        self._chat_template = chat_template
        self._special_tokens, self._templates = special_tokens, templates
        self._end_ids, self._end_token = end_ids, end_token
        self._root: Tokenizer | None = None

    @classmethod
    def of_bundle(cls, bundle: Bundle, templates: Templates | None = None) -> Tokenizer:
        """The tokenizer of the base. RunError: the chat template cannot be read."""
        return cls._of(bundle, bundle.tokenizer_file, None, templates)

    def of_adapter(self, bundle: Bundle, adapter: str | None) -> Tokenizer:
        """The tokenizer of an adapter of the same bundle. It may have further tokens and another chat template.

        RunError: its chat template cannot be read.
        """
        if adapter is None:
            return self
        file = bundle.tokenizer_of(adapter)
        if file != bundle.tokenizer_file:
            return self._of(bundle, file, adapter, self._templates)
        made = self._of(bundle, self._backend, adapter, self._templates)
        made._root = self
        return made

    @classmethod
    def _of(
        cls, bundle: Bundle, backend: Backend | Path, adapter: str | None, templates: Templates | None
    ) -> Tokenizer:
        chat = bundle.chat_settings(adapter)
        has_own = bundle.tokenizer_of(adapter) != bundle.tokenizer_file
        return cls(
            backend,
            chat_template=None if chat.template_file is None else _read(chat.template_file),
            special_tokens=chat.special_tokens,
            templates=templates,
            end_ids=bundle.manifest.tokenizer.eos_ids,
            end_token=chat.special_tokens.get("eos_token") if has_own else None,
        )

    @property
    def root(self) -> Tokenizer:
        """The tokenizer of the same `tokenizer.json` that others of it were made of: itself, or that of the base."""
        return self if self._root is None else self._root

    def to_json(self) -> str:
        """The `tokenizer.json`, without truncation and padding."""
        return str(self._backend.to_str())

    @property
    def chat_template(self) -> str | None:
        """Its source. None: there is no template."""
        return self._chat_template

    @property
    def reads_tools(self) -> bool:
        """Whether the chat template tells the model of tools. RunError: it is malformed."""
        return self._chat_template is not None and "tools" in self._template.names

    def open(self) -> None:
        """Open the `tokenizer.json` now. RunError: it is not a tokenizer."""
        _ = self._backend

    def is_as(self, other: Tokenizer) -> bool:
        """Whether another one makes the same tokens of every text and conversation, and the same text of tokens."""
        return self is other or (
            self._chat_template == other._chat_template
            and dict(self._special_tokens) == dict(other._special_tokens)
            and self.end_ids == other.end_ids
            and (self._backend is other._backend or self._backend.to_str() == other._backend.to_str())
        )

    def check(self) -> None:
        """RunError: the `tokenizer.json` or the chat template cannot be read."""
        self.open()
        if self._chat_template is not None:
            _ = self._template

    @lazy
    def end_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        own = None if self._end_token is None else self._backend.token_to_id(self._end_token)
        return frozenset(self._end_ids if own is None else (*self._end_ids, own))

    @property
    def added(self) -> dict[int, tuple[str, bool]]:
        """Tokens beside the model's own vocabulary: their texts, and whether they are special. `decode` leaves out
        those.
        """
        found = self._backend.get_added_tokens_decoder()
        return {token: (added.content, added.special) for token, added in found.items()}

    @lazy
    def special_ids(self) -> frozenset[int]:
        """The tokens that `decode` leaves out."""
        return frozenset(token for token, (_, special) in self.added.items() if special)

    def special_id(self, text: str) -> int | None:
        """The special token of this text. None: there is none."""
        return next((token for token, known in self.added.items() if known == (text, True)), None)

    def encode(self, text: str) -> list[int]:
        """Ids of the tokens of a plain text, with the tokens that the tokenizer adds (`bos`, for some models).

        The text of a special token becomes that token. RunError: this is not text.
        """
        return list(encoding_of(self._backend, arguments.text("the text", text)).ids)

    def encode_chat(
        self, messages: Sequence[Message] | Conversation, *, allow_special: bool = False
    ) -> list[int]:
        """Ids of the tokens of a conversation, up to the place where the assistant begins.

        The text of a special token inside a message or a tool is encoded as ordinary characters. With `allow_special`
        it becomes that token, as in transformers. Everything else is encoded as in transformers in both cases.
        RunError: see `render`. Also if bedplate cannot tell whether the template or a message wrote a special token.
        """
        conversation, template = _shown(messages), self._template
        if arguments.flag("allow_special", allow_special):
            text = self._render(conversation)
            return list(encoding_of(self._backend, text, add_special_tokens=False).ids)
        return self._user_text.encode(conversation, self._render, template.source)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special tokens."""
        return str(self._backend.decode(arguments.token_ids(ids), skip_special_tokens=True))

    def render(self, messages: Sequence[Message] | Conversation) -> str:
        """The conversation as text, as `apply_chat_template(add_generation_prompt=True)` of transformers gives it.

        RunError: the chat template is missing or malformed, a message is not valid, or the template raises an error.
        """
        return self._render(_shown(messages))

    def _render(self, conversation: Mapping[str, Any]) -> str:
        return self._template.render(special_tokens=self._special_tokens, **conversation)

    @lazy
    def _backend(self) -> Backend:
        return open_backend(self._source) if isinstance(self._source, Path) else self._source

    @lazy
    def _template(self) -> ChatTemplate | GuardedTemplate:
        if self._chat_template is None:
            hint = "give the prompt as text"
            raise RunError("the bundle has no chat template, so it takes no messages", hint=hint)
        if self._templates is not None:
            from bedplate.runtime.template_guard import GuardedTemplate

            return GuardedTemplate(self._chat_template, self._templates)
        from bedplate.runtime.chat_template import ChatTemplate

        return ChatTemplate(self._chat_template)

    @lazy
    def _user_text(self) -> UserText:
        from bedplate.runtime.user_text import UserText

        named = map(self._backend.token_to_id, self._special_tokens.values())
        return UserText(self._backend, frozenset({*self.end_ids, *(one for one in named if one is not None)}))


def _shown(prompt: Sequence[Message] | Conversation) -> dict[str, Any]:
    """What a template is shown of a conversation, by its names for it."""
    conversation = prompt if isinstance(prompt, Conversation) else Conversation(prompt)
    return {"messages": plain_messages(conversation.messages), "tools": plain_tools(conversation.tools)}


def open_backend(file: Path) -> Backend:
    """Open a `tokenizer.json`, without truncation and padding. RunError: it is not a tokenizer."""
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise RunError(f"not a tokenizer: {error}", where=file, hint="build the bundle again") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        hint = "bedplate verify BUNDLE finds damaged files"
        raise RunError(f"the chat template cannot be read: {error}", where=file, hint=hint) from error
