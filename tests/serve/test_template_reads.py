"""What a chat template reads of messages, as its source says, and as it does when it is rendered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models
from tool_templates import HERMES, LLAMA, MISTRAL

from bedplate.runtime.chat_template import ChatTemplate
from bedplate.runtime.tokenizer import Tokenizer
from bedplate.serve.chat import ChatMessage, plain_messages
from bedplate.serve.template_reads import reads_of

EACH = "{% for m in messages %}"
END = "{% endfor %}"


@pytest.mark.parametrize(
    ("source", "read"),
    [
        (EACH + "{{ m.a }}{{ m['b'] }}{{ m.get('c') }}{{ m.get('d', '') }}" + END, "a b c d"),
        (EACH + "{% if m.a is defined and 'b' in m and m.c == 'x' %}{% endif %}" + END, "a b c"),
        (
            "{{ messages[0].a }}{{ messages[-1]['b'] }}{{ messages[1:][0].c }}{{ (messages | last).d }}",
            "a b c d",
        ),
        ("{% set all = messages[1:] %}{% for m in all %}{% set x = m %}{{ x.a }}" + END, "a"),
        (
            "{% set ns = namespace(m=messages[0], n=1) %}{{ ns.m.a }}{% set ns.n = messages[1] %}{{ ns.n.b }}",
            "a b",
        ),
        (
            "{% macro told(x, y=1) %}{{ x.a }}{{ y.b }}{% endmacro %}{{ told(messages[0], y=messages[1]) }}",
            "a b",
        ),
        ("{% with x = messages[0] %}{{ x.a }}{% endwith %}", "a"),
        (EACH + "{{ loop.previtem.a }}{{ loop.nextitem['b'] }}{{ loop.index.c }}" + END, "a b"),
        (
            "{% for m in messages | selectattr('a', 'equalto', 1) | map(attribute='b.c') %}{% endfor %}",
            "a b b.c",
        ),
        (
            "{% set m = messages[0] if messages[0].a else messages[1] %}{{ (m or x).b }}{{ (y and m).c }}",
            "a b c",
        ),
        (
            "{% set all = [messages[0]] + messages[1:] %}{% for m in all | reverse | list %}{{ m.a }}" + END,
            "a",
        ),
        (EACH + "{% generation %}{{ m.a }}{% endgeneration %}{% break %}" + END, "a"),
        (
            EACH + "{% for c in m.a %}{{ c.b.c }}{% set d = c.b %}{{ d['e'] }}{% endfor %}" + END,
            "a a.b a.b.c a.b.e",
        ),
        (
            "{# a #}{{ messages | length }} a b {{ x.c }}{{ 'd' }}{% set e = messages[0].f %}{{ e.strip() }}",
            "f",
        ),
    ],
)
def test_fields_that_are_read(source: str, read: str) -> None:
    reads, words = reads_of(source), ["strip", "index", *"abcdefz"]
    fields = [*words, *(f"{one}.{other}" for one in words for other in words), "a.b.c", "a.b.e", "a.b.z"]
    assert [one for one in fields if reads.names(*one.split("."))] == read.split()
    assert [one for one in words if reads.has(one)] == [one for one in read.split() if "." not in one]


def test_long_expressions_are_followed_once() -> None:
    source = "{{ " + "".join(f"messages[{i}].a if x else " for i in range(60)) + "messages[0].b }}"
    assert reads_of(source).names("a") and not reads_of(source).has("c")


def test_a_field_that_is_shown_is_read_with_all_its_fields() -> None:
    reads = reads_of(EACH + "{% for c in m.a or [] %}{{ c.b | tojson }}{% endfor %}" + END)
    assert reads.has("a", "b", "c") and not reads.has("a", "c") and not reads.names("a", "b", "c")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages }}",
        "{{ messages | tojson }}",
        EACH + "{{ m | tojson }}" + END,
        EACH + "{{ 'a' ~ m }}" + END,
        EACH + "{% for key in m %}{{ m[key] }}{% endfor %}" + END,
        EACH + "{% for key, value in m.items() %}{{ value }}{% endfor %}" + END,
        EACH + "{% for key in ['a', 'b'] %}{{ m[key] }}{{ m.get(key) }}{% endfor %}" + END,
        EACH + "{% if key in m %}{% endif %}" + END,
        EACH + "{{ dict(m, role='x').a }}" + END,
        "{% macro told() %}{{ varargs[0].a }}{% endmacro %}{{ told(messages[0]) }}",
        "{% set ns = namespace(messages[0]) %}{{ ns.a }}",
        "{{ messages[0].items['a'](messages) }}",
        "{% if %}",
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
        " " * 200_000,
        "".join(f"{{% set x{i} = x{i + 1} %}}" for i in range(100))
        + "{% set x100 = messages[0] %}{{ x0.a }}",
    ],
)
def test_where_all_may_be_read(source: str) -> None:
    assert reads_of(source).has("whatever") and not reads_of(source).names("whatever")


class Traced(dict[str, Any]):
    """Tells what is read of it. path: the fields that lead to it."""

    def __init__(self, fields: dict[str, Any], path: tuple[str, ...], log: set[tuple[str, ...]]) -> None:
        super().__init__({name: traced(value, (*path, name), log) for name, value in fields.items()})
        self._path, self._log = path, log

    def __getitem__(self, name: str) -> Any:
        self._log.add((*self._path, name))
        return super().__getitem__(name)

    def get(self, name: str, other: Any = None) -> Any:
        self._log.add((*self._path, name))
        return super().get(name, other)

    def __contains__(self, name: object) -> bool:
        self._log.add((*self._path, str(name)))
        return super().__contains__(name)

    def __iter__(self) -> Iterator[str]:
        self._log.add((*self._path, "any"))
        return super().__iter__()


def traced(value: Any, path: tuple[str, ...], log: set[tuple[str, ...]]) -> Any:
    if isinstance(value, dict):
        return Traced(value, path, log)
    return [traced(one, path, log) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize("source", [HERMES, LLAMA, MISTRAL])
def test_nothing_else_is_read_when_it_is_rendered(source: str) -> None:
    log: set[tuple[str, ...]] = set()
    function = {"name": "look", "arguments": {"at": "fox"}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "abcdefghi", "function": function}]},
        {"role": "tool", "content": "b", "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "c"},
    ]
    ChatTemplate(source).render(traced(messages, (), log), special_tokens={"eos_token": "", "bos_token": ""})
    reads = reads_of(source)
    assert len(log) > 3 and [path for path in log if not reads.has(*path)] == []


@pytest.mark.parametrize(
    ("source", "content"),
    [
        ("{# text #}This is a text." + EACH + "{{ m.content }}" + END, "a\nb"),
        (EACH + "{% for part in m.content %}{{ part.text }}{% endfor %}" + END, None),
    ],
)
def test_parts_are_joined_where_the_template_does_not_read_them(source: str, content: str | None) -> None:
    parts = [{"type": "text", "text": one} for one in "ab"]
    tokenizer = Tokenizer(Backend(models.BPE()), chat_template=source, special_tokens={})
    message = ChatMessage.model_validate({"role": "user", "content": parts})
    assert plain_messages(tokenizer, [message])[0]["content"] == (content or parts)
