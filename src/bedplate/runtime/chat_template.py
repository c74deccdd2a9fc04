"""A model's chat template, in the environment of transformers. Apart, so that only a chat imports jinja2."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.utils
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bedplate.errors import RunError


class ChatTemplate:
    """names: of what it reads. RunError: the template is malformed."""

    def __init__(self, source: str) -> None:
        self.source = source
        environment = _environment()
        self._template = _compile(environment, source)
        self.names = jinja2.meta.find_undeclared_variables(environment.parse(source))

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, special_tokens: Mapping[str, str], **values: Any
    ) -> str:
        """The text that the template makes of messages (see `plain_messages`), up to where the assistant is to speak.

        values: of the other names that transformers defines, where they are not what it defines them as.
        RunError: the template refuses the messages, or fails on them.
        """
        names = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        try:
            text = self._template.render(**{**special_tokens, **names, **values})
            text.encode()  # a template may write half of a surrogate pair, which is no text
        except Exception as error:  # a template is a program: it may raise whatever Python can
            raise _failed(error, messages) from error
        for message in messages:
            content = message.get("content")
            if isinstance(content, (list, tuple)) and content and str(content) in text:
                raise RunError(
                    "the chat template takes text, not a list of parts, as the content of a message",
                    hint="join the text of the parts, and give that as the content",
                )
        return text


def _failed(error: Exception, messages: Sequence[Mapping[str, Any]]) -> RunError:
    roles = ", ".join(str(message.get("role")) for message in messages)
    hint = f"the messages have the roles: {roles}"
    if any(not isinstance(message.get("content"), str) for message in messages):
        hint += "; give the content of each message as text"
    what = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
    return RunError(f"the chat template refuses the messages: {what}", hint=hint)


def _environment() -> ImmutableSandboxedEnvironment:
    """Templates are the model authors' code, so they run in a sandbox, set up as transformers' own."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


def _compile(environment: jinja2.Environment, source: str) -> jinja2.Template:
    try:
        return environment.from_string(source)
    except Exception as error:  # also what Python says of the code that jinja2 makes
        raise RunError(
            f"the chat template is malformed: {error}",
            hint="mend the template of the model, and build the bundle again",
        ) from error


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words for training: shown as they are.

    A call, as in transformers: what is set inside is not seen outside.
    """

    tags = {"generation"}  # noqa: RUF012 — jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_shown"), [], [], body).set_lineno(line)

    def _shown(self, caller: jinja2.runtime.Macro) -> str:
        return str(caller())


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes what HTML would; a prompt is not HTML. Templates pass the options by these names."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Dict:
    """`dict` without the attributes of the class, which lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` without names that begin with an underscore, which lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that a template may name an attribute `self`
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the attribute {name!r}")
