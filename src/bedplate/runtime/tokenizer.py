"""Text and conversations to tokens and back: `tokenizer.json` and the chat template of a bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Backend

from bedplate.bundle.store import Bundle
from bedplate.errors import RunError

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
        self._template = None if chat_template is None else _compile(chat_template)

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> Tokenizer:
        """RunError: the tokenizer or the template cannot be read."""
        template = bundle.chat_template_file
        return cls(
            bundle.tokenizer_file,
            chat_template=None if template is None else template.read_text(encoding="utf-8"),
            special_tokens=bundle.manifest.tokenizer.special_tokens,
        )

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

        RunError: the model has no chat template, a message is not one, or the template refuses them.
        """
        if self._template is None:
            hint = "give the prompt as text"
            raise RunError("the bundle has no chat template, so it takes no messages", hint=hint)
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                hint = 'a message is {"role": "user", "content": "…"}'
                raise RunError(f"not a message: {message!r}", hint=hint)
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            hint = f"it was given the roles: {roles}"
            raise RunError(f"the chat template refuses the messages: {error}", hint=hint) from error


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words for training: shown as they are."""

    tags = {"generation"}  # noqa: RUF012 — jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str) -> jinja2.Template:
    """Templates are the model authors' code, so they run in a sandbox, set up as transformers' own."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise RunError(f"the chat template is malformed: {error}", hint="build the bundle again") from error


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    """jinja2's own filter escapes what HTML would; a prompt is not HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
