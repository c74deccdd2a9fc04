"""Tools, and that a call has failed, in words, for a chat template that does not know them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from bedplate.runtime.messages import Message

Json = dict[str, Any]

_WORDS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


# As the templates of Gemma refuse it.
_NO_SYSTEM = re.compile(r"""raise_exception\(\s*['"]system""", re.IGNORECASE)


def in_words(messages: Sequence[Json], tools: Sequence[Json], template: str) -> list[Message]:
    """Tools, calls and results as text. template: the source of the chat template, which knows none of them."""
    told, is_result = list[Message](), False
    for message in messages:
        follows_result, is_result = is_result, message["role"] == "tool"
        if is_result:
            result = f"<tool_response>\n{_content(message)}\n</tool_response>"
            if follows_result:
                result = f"{told.pop()['content']}\n{result}"
            told.append({"role": "user", "content": result})
        elif message.get("tool_calls"):
            calls = [f"<tool_call>\n{_call(one)}\n</tool_call>" for one in message["tool_calls"]]
            rest = {name: value for name, value in message.items() if name != "tool_calls"}
            told.append({**rest, "content": "\n".join(filter(None, [_content(message), *calls]))})
        else:
            told.append(message)
    if not tools:
        return told
    words = _WORDS.format("\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if told[0]["role"] == "system":
        words = f"{_content(told.pop(0))}\n\n{words}"
    if _NO_SYSTEM.search(template) and told and told[0]["role"] == "user":
        return [{**told[0], "content": f"{words}\n\n{_content(told[0])}"}, *told[1:]]
    return [{"role": "system", "content": words}, *told]


def with_error(message: Json) -> Json:
    """A result that says itself that the call has failed."""
    if "is_error" not in message:
        return message
    told = {name: value for name, value in message.items() if name != "is_error"}
    if not message["is_error"]:
        return told
    content = message.get("content") or ""
    if isinstance(content, str):
        return {**told, "content": f"Error: {content}"}
    return {**told, "content": [{"type": "text", "text": "Error: "}, *content]}


def _content(message: Message) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _call(call: Json) -> str:
    function = call["function"]
    return json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)
