"""The body of OpenAI's `/v1/responses`, and what it asks of chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from bedplate.serve.as_chat import call, chat_request, said
from bedplate.serve.chat import MOST_MESSAGES, ChatRequest, joined
from bedplate.serve.errors import ApiError
from bedplate.serve.structured import SchemaName
from bedplate.serve.tools import Function, NamedFunction, arguments_in
from bedplate.serve.wire import Accepted, Sampling, Strict

Json = dict[str, Any]
Status = Literal["in_progress", "completed", "incomplete"]
# What fields of chat are called here.
NAMES = {
    "prompt": "input",
    "messages": "input",
    "response_format": "text.format",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
}


class TextPart(Strict):
    """A part of a message, as it was given or answered."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class Message(Strict):
    """A turn. id, status and phase are labels of an earlier answer: they are not for the model."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Annotated[list[TextPart], Field(max_length=MOST_MESSAGES)]
    id: str | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCall(Strict):
    """A call that an earlier answer made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status | None = None


class FunctionCallOutput(Strict):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | Annotated[list[TextPart], Field(max_length=MOST_MESSAGES)]
    id: str | None = None
    status: Status | None = None


def _type_of(item: Any) -> Any:
    return item.get("type", "message") if isinstance(item, dict) else "message"


Item = Annotated[
    Annotated[Message, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")],
    Discriminator(
        _type_of,
        custom_error_type="unknown_type",
        custom_error_message="The type is message, function_call or function_call_output",
    ),
]


class FunctionTool(Function):
    """A function that the model may call."""

    type: Literal["function"]


class ChosenTool(NamedFunction):
    """The function that is to be called."""

    type: Literal["function"]


class Format(Strict):
    """What form the text has. `name`, `schema` and what follows are of `json_schema`."""

    type: Literal["text", "json_object", "json_schema"]
    name: SchemaName | None = None
    schema_: Annotated[Json | None, Field(alias="schema")] = None
    description: str | None = None
    strict: bool | None = None

    def check(self) -> None:
        """ApiError: it has a field of another type, which would change nothing, or has no name."""
        given = self.model_dump(exclude={"type"}, exclude_none=True, by_alias=True)
        if given and self.type != "json_schema":
            field = f"text.format.{next(iter(given))}"
            raise ApiError(400, f"{field}: only the type json_schema has it.", param=field)
        if self.type == "json_schema" and self.name is None:
            field = "text.format.name"
            raise ApiError(400, f"{field}: Field required", param=field)


class Text(Strict):
    """verbosity: OpenAI's default. Other values would change the answer."""

    format: Format | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Strict):
    """None: what a model writes is its answer."""

    effort: Literal["none"] | None = None
    summary: None = None


class Streamed(Strict):
    """include_obfuscation: there is none."""

    include_obfuscation: Literal[False] = False


class ResponsesRequest(Sampling, Accepted):
    """`/v1/responses`. max_tool_calls: of OpenAI's own tools, which are not here."""

    input: str | Annotated[list[Item], Field(min_length=1, max_length=MOST_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    text: Text = Text()
    tools: Annotated[list[FunctionTool], Field(max_length=128)] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | ChosenTool = "auto"
    parallel_tool_calls: bool = True
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    # There is no reasoning whose content could be included.
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] = Field(
        default_factory=list
    )
    background: Literal[False] = False
    truncation: Literal["disabled"] = "disabled"
    reasoning: Reasoning | None = None
    stream_options: Streamed | None = None

    @property
    def tells_logprobs(self) -> bool:
        return bool(self.top_logprobs) or "message.output_text.logprobs" in self.include


def as_chat(asked: ResponsesRequest) -> ChatRequest:
    """ApiError: chat does not honour it."""
    fields: Json = {
        "messages": _messages(asked),
        "max_completion_tokens": asked.max_output_tokens,
        "logprobs": asked.tells_logprobs,
    }
    if asked.tells_logprobs:
        fields["top_logprobs"] = asked.top_logprobs or 0
    if asked.tools:
        tools = [tool.model_dump(exclude={"type"}, exclude_none=True) for tool in asked.tools]
        fields["tools"] = [{"type": "function", "function": tool} for tool in tools]
        fields["parallel_tool_calls"] = asked.parallel_tool_calls
        fields["tool_choice"] = _tool_choice(asked)
    elif asked.tool_choice not in ("none", "auto"):
        raise ApiError(400, "tool_choice: there are no tools.", param="tool_choice")
    form = asked.text.format
    if form is not None:
        form.check()
        if form.type != "text":
            fields["response_format"] = _response_format(form)
    return chat_request(asked, fields)


def _tool_choice(asked: ResponsesRequest) -> str | Json:
    chosen = asked.tool_choice
    return chosen if isinstance(chosen, str) else {"type": "function", "function": {"name": chosen.name}}


def _response_format(form: Format) -> Json:
    if form.type == "json_object":
        return {"type": "json_object"}
    return {
        "type": "json_schema",
        "json_schema": form.model_dump(exclude={"type"}, exclude_none=True, by_alias=True),
    }


def _messages(asked: ResponsesRequest) -> list[Json]:
    messages: list[Json] = []
    if asked.instructions is not None:
        messages.append({"role": "system", "content": asked.instructions})
    if isinstance(asked.input, str):
        return [*messages, {"role": "user", "content": asked.input}]
    for at, item in enumerate(asked.input):
        if isinstance(item, FunctionCall):
            arguments_in(item.arguments, f"input.{at}.arguments")
            said(messages, None, [call(item.call_id, item.name, item.arguments)])
        elif isinstance(item, FunctionCallOutput):
            output = _text(item.output)
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": output})
        elif item.role == "assistant":
            said(messages, _text(item.content), [])
        else:
            _add(messages, "user" if item.role == "user" else "system", _text(item.content))
    return messages


def _add(messages: list[Json], role: str, text: str) -> None:
    """Most templates know one system message, the first."""
    if role == "system" and len(messages) == 1 and messages[0]["role"] == "system":
        messages[0]["content"] += "\n\n" + text
    else:
        messages.append({"role": role, "content": text})


def _text(content: str | Sequence[TextPart]) -> str:
    return content if isinstance(content, str) else joined(part.text for part in content)
