"""Tools in words, for a chat template that does not know them."""

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
    told: list[Message] = []
    for message in messages:
        if message["role"] == "tool":
            result = f"<tool_response>\n{_content(message)}\n</tool_response>"
            if told and told[-1].get("results"):
                result = f"{told.pop()['content']}\n{result}"
            told.append({"role": "user", "content": result, "results": True})
        elif message.get("tool_calls"):
            calls = [f"<tool_call>\n{_call(one)}\n</tool_call>" for one in message["tool_calls"]]
            told.append(
                {"role": "assistant", "content": "\n".join(filter(None, [_content(message), *calls]))}
            )
        else:
            told.append(message)
    told = [{name: value for name, value in one.items() if name != "results"} for one in told]
    if not tools:
        return told
    words = _WORDS.format("\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if told[0]["role"] == "system":
        words = f"{_content(told.pop(0))}\n\n{words}"
    if _NO_SYSTEM.search(template) and told and told[0]["role"] == "user":
        return [{**told[0], "content": f"{words}\n\n{_content(told[0])}"}, *told[1:]]
    return [{"role": "system", "content": words}, *told]


def _content(message: Message) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _call(call: Json) -> str:
    function = call["function"]
    return json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)
