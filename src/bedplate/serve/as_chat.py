"""Requests of other APIs as requests of chat."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from bedplate.serve.chat import ChatRequest
from bedplate.serve.wire import Sampling, first_problem

Json = dict[str, Any]
_SAMPLING = tuple(Sampling.model_fields)


def chat_request(asked: Sampling, fields: Json) -> ChatRequest:
    """What was asked, with these fields of chat.

    ApiError: chat does not honour them.
    """
    sampling = {name: getattr(asked, name) for name in _SAMPLING}
    if asked.lora is not None:
        sampling["lora"] = [one.model_dump() for one in asked.lora]
    try:
        return ChatRequest.model_validate({**sampling, **fields})
    except ValidationError as error:
        raise first_problem(error, {**sampling, **fields}) from None


def call(id: str, name: str, arguments: str) -> Json:
    """A call of a tool, as a message of chat has it."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def said(messages: list[Json], text: str | None, calls: list[Json]) -> None:
    """Append what the assistant said. What it called next to it is of the same turn."""
    last = messages[-1] if messages else None
    if last is not None and last["role"] == "assistant" and text is None:
        last.setdefault("tool_calls", []).extend(calls)
        return
    message: Json = {"role": "assistant", "content": text or ""}
    if calls:
        message["tool_calls"] = list(calls)
    messages.append(message)
