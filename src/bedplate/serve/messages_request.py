"""The body of Anthropic's `/v1/messages`, and what it asks of chat."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from bedplate.serve.as_chat import call, chat_request, said
from bedplate.serve.chat import MOST_MESSAGES, ChatRequest, joined
from bedplate.serve.errors import ApiError
from bedplate.serve.tools import Name
from bedplate.serve.wire import Asking, Sampling, Strict

Json = dict[str, Any]
# What fields of chat are called here.
NAMES = {"prompt": "messages", "response_format": "output_config.format", "stop": "stop_sequences"}


class CacheControl(Strict):
    """Where the cache could begin anew. It goes by content, so it needs no marks."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Marked(Strict):
    """A block, or a tool."""

    cache_control: CacheControl | None = None


class TextBlock(Marked):
    """Text of either side."""

    type: Literal["text"]
    text: str
    citations: None = None


class Caller(Strict):
    """Who calls: the model, and nothing else."""

    type: Literal["direct"]


class ToolUse(Marked):
    """A call that an earlier answer made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: Json
    caller: Caller | None = None


class ToolResult(Marked):
    """What a call gave. is_error: the call has failed."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Annotated[list[TextBlock], Field(max_length=MOST_MESSAGES)] = ""
    is_error: bool = False


Block = Annotated[TextBlock | ToolUse | ToolResult, Field(discriminator="type")]


class Turn(Strict):
    """A turn of either side."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], Field(max_length=MOST_MESSAGES)]


class FunctionTool(Marked):
    """A function that the model may call. eager_input_streaming: arguments come as they are written, in any case."""

    name: Name
    input_schema: Json
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    eager_input_streaming: bool | None = None


class AnyTool(Strict):
    """auto: the model may call a tool.  any: it must."""

    type: Literal["auto", "any"]
    disable_parallel_tool_use: bool = False


class OneTool(Strict):
    """The tool that is to be called."""

    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool = False


class NoTool(Strict):
    """The model is not told of the tools."""

    type: Literal["none"]


ToolChoice = Annotated[AnyTool | OneTool | NoTool, Field(discriminator="type")]


class Thinking(Strict):
    """What a model writes is its answer."""

    type: Literal["disabled"]


class Schema(Strict):
    """The form of the text."""

    type: Literal["json_schema"]
    schema_: Annotated[Json, Field(alias="schema")]


class OutputConfig(Strict):
    """effort: no model here has one."""

    format: Schema | None = None
    effort: None = None


class Metadata(Strict):
    """user_id: fair shares are counted for it."""

    user_id: str | None = None


class Conversation(Asking):
    """What is read: all that `/v1/messages/count_tokens` has."""

    messages: Annotated[list[Turn], Field(min_length=1, max_length=MOST_MESSAGES)]
    system: str | Annotated[list[TextBlock], Field(max_length=MOST_MESSAGES)] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128)] = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig = OutputConfig()
    cache_control: CacheControl | None = None
    speed: Literal["standard"] | None = None


class MessagesRequest(Sampling, Conversation):
    """`/v1/messages`. service_tier: there is one."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)] = Field(
        default_factory=list
    )
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    @property
    def caller(self) -> str | None:
        """Whose request it is, among those with the same key."""
        return self.metadata.user_id if self.user is None and self.metadata is not None else self.user


def as_chat(asked: MessagesRequest) -> ChatRequest:
    """ApiError: chat does not honour it."""
    return chat_request(asked, {"max_tokens": asked.max_tokens, "stop": asked.stop_sequences, **_read(asked)})


def counted(asked: Conversation) -> ChatRequest:
    """What is to be read, without what follows."""
    return chat_request(Sampling(model=asked.model), _read(asked))


def _read(asked: Conversation) -> Json:
    fields: Json = {"messages": _messages(asked)}
    if asked.tools:
        fields["tools"] = [{"type": "function", "function": _function(tool)} for tool in asked.tools]
        fields |= _tool_choice(asked.tool_choice or AnyTool(type="auto"))
    elif asked.tool_choice is not None and asked.tool_choice.type not in ("none", "auto"):
        raise ApiError(400, "tool_choice: there are no tools.", param="tool_choice")
    form = asked.output_config.format
    if form is not None:
        schema = {"name": "answer", "strict": True, "schema": form.schema_}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return fields


def _function(tool: FunctionTool) -> Json:
    function: Json = {"name": tool.name, "parameters": tool.input_schema}
    given = {"description": tool.description, "strict": tool.strict}
    return {**function, **{name: value for name, value in given.items() if value is not None}}


def _tool_choice(choice: ToolChoice) -> Json:
    if isinstance(choice, NoTool):
        return {"tool_choice": "none"}
    chosen: str | Json
    if isinstance(choice, OneTool):
        chosen = {"type": "function", "function": {"name": choice.name}}
    else:
        chosen = "required" if choice.type == "any" else "auto"
    return {"tool_choice": chosen, "parallel_tool_calls": not choice.disable_parallel_tool_use}


def _messages(asked: Conversation) -> list[Json]:
    if asked.messages[-1].role == "assistant":
        message = "messages: the last one is the assistant's. This server does not continue what it began."
        raise ApiError(400, message, param="messages")
    messages: list[Json] = []
    if asked.system is not None:
        messages.append({"role": "system", "content": _text(asked.system)})
    for at, turn in enumerate(asked.messages):
        content = turn.content
        if turn.role == "assistant":
            _assistant(messages, content, at)
        else:
            _other(messages, turn.role, content, at)
    return messages


def _assistant(messages: list[Json], content: Any, at: int) -> None:
    if isinstance(content, str):
        said(messages, content, [])
        return
    texts = [block.text for block in content if isinstance(block, TextBlock)]
    used = [block for block in content if isinstance(block, ToolUse)]
    if len(texts) + len(used) < len(content):
        raise ApiError(400, f"messages.{at}: a tool_result is of the user.", param=f"messages.{at}")
    calls = [call(one.id, one.name, json.dumps(one.input, ensure_ascii=False)) for one in used]
    said(messages, joined(texts), calls)


def _other(messages: list[Json], role: str, content: Any, at: int) -> None:
    """Results come first: templates want them after the calls."""
    if isinstance(content, str):
        messages.append({"role": role, "content": content})
        return
    if not content:
        field = f"messages.{at}.content"
        raise ApiError(400, f"{field}: it has no blocks.", param=field)
    for block in content:
        if isinstance(block, ToolUse) or (role == "system" and isinstance(block, ToolResult)):
            raise ApiError(
                400, f"messages.{at}: the role {role} has no {block.type}.", param=f"messages.{at}"
            )
        if isinstance(block, ToolResult):
            result = {"role": "tool", "tool_call_id": block.tool_use_id, "content": _text(block.content)}
            messages.append({**result, "is_error": True} if block.is_error else result)
    texts = [block.text for block in content if isinstance(block, TextBlock)]
    if texts:
        messages.append({"role": role, "content": joined(texts)})


def _text(content: str | Sequence[TextBlock]) -> str:
    return content if isinstance(content, str) else joined(block.text for block in content)
