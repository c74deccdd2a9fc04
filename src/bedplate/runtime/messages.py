"""Conversations as callers give them, checked, in the plain types that a chat template is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bedplate.errors import RunError
from bedplate.runtime import arguments

Message = Mapping[str, Any]
"""One turn of a conversation: {"role": "system" | "user" | "assistant", "content": text or a list of text parts}, and
what else the model's chat template reads."""


class Conversation(NamedTuple):
    """Messages, and the tools that a chat template tells the model of: functions, as transformers takes them."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()


DEEPEST = 64  # levels of lists and objects in a message: far from where Python, or a template, gives up
# Names of what a model thought before it answered; transformers offers a template the first two.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """A copy, as transformers shows it to a template: fields of None are left out, reasoning gets its standard name.

    RunError: there is no message, one is not a message, or it holds something else than text, numbers, true, false,
    null, lists and objects with names.
    """
    hint = 'give a list of messages: [{"role": "user", "content": "…"}]'
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise RunError(f"messages is {arguments.shown(messages)}", hint=hint)
    if not messages:
        raise RunError("there are no messages", hint=hint)
    return [_plain_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def plain_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """A copy, as a template is shown it. None: there are none.

    RunError: one is not an object, or holds something else than a message can.
    """
    hint = 'give a list of tools: [{"type": "function", "function": {"name": "…", "parameters": {…}}}]'
    if isinstance(tools, (str, bytes)) or not isinstance(tools, Sequence):
        raise RunError(f"tools is {arguments.shown(tools)}", hint=hint)
    for i, tool in enumerate(tools):
        arguments.instance(f"tools[{i}]", tool, Mapping, hint)
    return [_plain(tool, f"tools[{i}]", 0) for i, tool in enumerate(tools)] or None


def _plain_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        hint = 'a message is {"role": "user", "content": "…"}'
        raise RunError(f"not a message: {arguments.shown(message)}", where=where, hint=hint)
    copy = {name: value for name, value in _plain(message, where, 0).items() if value is not None}
    _check_content(copy.get("content", ""), f"{where}.content")
    reasoning = next((copy[name] for name in _REASONING if name in copy), None)
    if reasoning is not None:
        copy = {"thinking": reasoning, **copy, "reasoning_content": reasoning}
    return copy


def _check_content(content: Any, where: str) -> None:
    hint = 'give text, or a list of text parts: [{"type": "text", "text": "…"}]'
    if isinstance(content, str):
        return
    if not isinstance(content, (list, tuple)):
        raise RunError(f"the content is {arguments.shown(content)}", where=where, hint=hint)
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            what = f"a part of the type {kind!r}: bedplate runs models of text"
        elif kind != "text" or not isinstance(part.get("text"), str):
            what = f"not a part of text: {arguments.shown(part)}"
        else:
            continue
        raise RunError(what, where=f"{where}[{i}]", hint=hint)


def _plain(value: Any, where: str, depth: int) -> Any:
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, str):
        return _text(value, where)
    if depth == DEEPEST:
        hint = f"use at most {DEEPEST} levels of lists and objects"
        raise RunError("it is nested too deeply", where=where.partition("]")[0] + "]", hint=hint)
    if isinstance(value, Mapping):
        # The name of an argument may be any text, so it is looked at as text is.
        return {
            _text(name, f"a name in {where}"): _plain(item, f"{where}.{name}", depth + 1)
            for name, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        copies = (_plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value))
        return list(copies) if isinstance(value, list) else tuple(copies)
    hint = "a message holds text, numbers, true, false, null, lists, and objects whose names are text"
    raise RunError(f"it is of the type {type(value).__name__}", where=where, hint=hint)


def _text(value: Any, where: str) -> str:
    return str.__str__(arguments.text(where, value))  # of a subclass, an enum say, its text alone
