"""A model's chat template, set up as transformers does it. Apart, so that only a chat imports jinja2."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bedplate.errors import RunError


class ChatTemplate:
    """RunError: the template is malformed."""

    def __init__(self, source: str) -> None:
        self._template = _compile(source)

    def render(self, **values: Any) -> str:
        """The text that the template makes of the values. RunError: it refuses them."""
        try:
            return self._template.render(**values)
        except jinja2.TemplateError as error:
            roles = ", ".join(str(message["role"]) for message in values["messages"])
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
