"""Calls of tools and structured output, in the words of each API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from pydantic import BaseModel
from scripted import ANSWER

from bedplate.serve.errors import ApiError
from bedplate.serve.messages import _input
from bedplate.serve.tools import Call

SCHEMA = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
PARAMETERS = {**SCHEMA, "additionalProperties": False}
ARGUMENTS = {"place": ""}


class Where(BaseModel):
    """What the scripted model can fill in."""

    place: str


@pytest.fixture(scope="module")
def openai_client(scripted_address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{scripted_address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def anthropic_client(scripted_address: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=scripted_address, api_key="none", max_retries=0) as client:
        yield client


TOOL: Any = {"name": "weather", "description": "of a place", "parameters": PARAMETERS}
OF_CHAT: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "weather?"}]}
OF_RESPONSES: dict[str, Any] = {
    "model": "scripted",
    "input": "weather?",
    "tools": [{"type": "function", "strict": True, **TOOL}],
    "tool_choice": "required",
}
OF_MESSAGES: dict[str, Any] = {
    "model": "scripted",
    "max_tokens": 256,
    "messages": [{"role": "user", "content": "weather?"}],
    "tools": [{"name": "weather", "input_schema": PARAMETERS, "strict": True}],
    "tool_choice": {"type": "tool", "name": "weather"},
}


def test_responses(openai_client: openai.OpenAI) -> None:
    said = openai_client.responses.create(**OF_RESPONSES)
    (item,) = said.output
    assert item.type == "function_call" and item.status == said.status == "completed"
    assert (item.name, json.loads(item.arguments)) == ("weather", ARGUMENTS)
    events: list[Any] = list(openai_client.responses.create(**OF_RESPONSES, stream=True))
    kinds = list(dict.fromkeys(event.type for event in events))
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(pieces) == item.arguments == events[-1].response.output[0].arguments
    result = {"type": "function_call_output", "call_id": item.call_id, "output": "rain"}
    talk: Any = [{"role": "user", "content": "weather?"}, item, result]
    after = openai_client.responses.create(**{**OF_RESPONSES, "input": talk, "tool_choice": "none"})
    assert after.output_text == ANSWER and after.status == "completed"


def test_structured_responses(openai_client: openai.OpenAI) -> None:
    said = openai_client.responses.parse(model="scripted", input="where?", text_format=Where)
    assert said.output_parsed == Where(place="")
    wrong: Any = {"type": "json_schema", "name": "x", "strict": True, "schema": {**PARAMETERS, "not": {}}}
    with pytest.raises(openai.BadRequestError) as caught:
        openai_client.responses.create(model="scripted", input="where?", text={"format": wrong})
    assert caught.value.param is not None and caught.value.param.startswith("text.format")


def test_messages(anthropic_client: anthropic.Anthropic) -> None:
    said = anthropic_client.messages.create(**OF_MESSAGES)
    (block,) = said.content
    assert block.type == "tool_use" and (block.name, block.input) == ("weather", ARGUMENTS)
    assert (said.stop_reason, said.stop_sequence) == ("tool_use", None)
    with anthropic_client.messages.stream(**OF_MESSAGES) as stream:
        events = list(stream)
        whole = stream.get_final_message()
    deltas = [event for event in events if event.type == "content_block_delta"]
    assert deltas and all(event.delta.type == "input_json_delta" for event in deltas)
    (told,) = whole.content
    assert told.type == "tool_use" and (told.name, told.input) == ("weather", ARGUMENTS)
    assert whole.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "rain"}]}
    talk = [
        *OF_MESSAGES["messages"],
        {"role": "assistant", "content": said.content},
        {"role": "user", "content": [result, {"type": "text", "text": "so?"}]},
    ]
    asked = {**OF_MESSAGES, "messages": talk, "tool_choice": {"type": "none"}}
    after = anthropic_client.messages.create(**asked)
    (text,) = after.content
    assert text.type == "text" and text.text == ANSWER and after.stop_reason == "end_turn"


def test_a_call_that_is_cut_is_none(anthropic_client: anthropic.Anthropic) -> None:
    said = anthropic_client.messages.create(**{**OF_MESSAGES, "max_tokens": 3})
    assert (said.content, said.stop_reason) == ([], "max_tokens")


def test_a_call_that_a_stop_string_cuts_is_none(
    openai_client: openai.OpenAI, anthropic_client: anthropic.Anthropic
) -> None:
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
    for stop, most, finish in ((["place"], 99, "stop"), (["name"], 99, "stop"), (None, 20, "length")):
        asked = {**OF_CHAT, "tools": [tool], "tool_choice": "required", "stop": stop, "max_tokens": most}
        (choice,) = openai_client.chat.completions.create(**asked).choices
        assert (choice.finish_reason, choice.message.tool_calls) == (finish, None)
        pieces = list(openai_client.chat.completions.create(**asked, stream=True))
        assert pieces[-1].choices[0].finish_reason == finish
    said = anthropic_client.messages.create(**OF_MESSAGES, stop_sequences=["place"])
    assert (said.content, said.stop_reason, said.stop_sequence) == ([], "stop_sequence", "place")
    with anthropic_client.messages.stream(**OF_MESSAGES, stop_sequences=["place"]) as stream:
        assert stream.get_final_message().stop_reason == "stop_sequence"


@pytest.mark.parametrize("most", [1, 14, 17, 20, 23, 26, 99])
def test_a_stream_says_of_a_call_what_the_whole_answer_says(
    openai_client: openai.OpenAI, anthropic_client: anthropic.Anthropic, most: int
) -> None:
    """However long it may be. Where the API has no word for a call that was cut, the whole answer leaves it out."""
    asked = {**OF_RESPONSES, "max_output_tokens": most}
    whole = openai_client.responses.create(**asked)
    *_, before, last = openai_client.responses.create(**asked, stream=True)
    assert last.type == f"response.{whole.status}" and before.type == "response.output_item.done"
    for response in (whole, last.response):
        (item,) = response.output
        assert item.status == response.status
        if item.type == "function_call":
            assert is_whole(item.arguments) == (item.status == "completed")
    unlike = {"id", "call_id"}
    assert whole.output[0].model_dump(exclude=unlike) == last.response.output[0].model_dump(exclude=unlike)
    assert before.item == last.response.output[0]

    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
    of_chat = {**OF_CHAT, "tools": [tool], "tool_choice": "required", "max_tokens": most}
    (choice,) = openai_client.chat.completions.create(**of_chat).choices
    pieces = [one.choices[0] for one in openai_client.chat.completions.create(**of_chat, stream=True)]
    calls = [call.function for one in pieces for call in one.delta.tool_calls or ()]
    told = "".join(call.arguments or "" for call in calls if call)
    assert pieces[-1].finish_reason == choice.finish_reason
    assert (choice.finish_reason == "tool_calls") == (choice.message.tool_calls is not None) == is_whole(told)

    message = anthropic_client.messages.create(**{**OF_MESSAGES, "max_tokens": most})
    with anthropic_client.messages.stream(**{**OF_MESSAGES, "max_tokens": most}) as stream:
        kept = stream.get_final_message()
    assert kept.stop_reason == message.stop_reason == ("tool_use" if is_whole(told) else "max_tokens")
    assert bool(message.content) == is_whole(told)


def is_whole(arguments: str) -> bool:
    try:
        return isinstance(json.loads(arguments), dict)
    except ValueError:
        return False


def test_a_call_that_ends_before_a_stop_string_is_whole(
    openai_client: openai.OpenAI, anthropic_client: anthropic.Anthropic
) -> None:
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
    asked = {**OF_CHAT, "tools": [tool], "tool_choice": "required", "stop": ["</tool_call>"]}
    (choice,) = openai_client.chat.completions.create(**asked).choices
    assert choice.finish_reason == "tool_calls"
    said = anthropic_client.messages.create(**OF_MESSAGES, stop_sequences=["</tool_call>"])
    assert (said.stop_reason, said.stop_sequence) == ("tool_use", None)
    assert [json.loads(one.function.arguments) for one in choice.message.tool_calls or ()] == [ARGUMENTS]


def test_tools_are_counted(anthropic_client: anthropic.Anthropic) -> None:
    asked = {name: value for name, value in OF_MESSAGES.items() if name != "max_tokens"}
    counted = anthropic_client.messages.count_tokens(**asked).input_tokens
    said = anthropic_client.messages.create(**OF_MESSAGES).usage
    assert counted == said.input_tokens + (said.cache_read_input_tokens or 0)
    del asked["tools"], asked["tool_choice"]
    assert anthropic_client.messages.count_tokens(**asked).input_tokens < counted


def test_structured_messages(anthropic_client: anthropic.Anthropic) -> None:
    config: Any = {"format": {"type": "json_schema", "schema": PARAMETERS}}
    asked = {name: OF_MESSAGES[name] for name in ("model", "max_tokens", "messages")}
    said = anthropic_client.messages.create(**asked, output_config=config)
    (block,) = said.content
    assert block.type == "text" and json.loads(block.text) == ARGUMENTS
    config["format"]["schema"] = {**PARAMETERS, "not": {}}
    with pytest.raises(anthropic.BadRequestError, match="output_config"):
        anthropic_client.messages.create(**asked, output_config=config)


def test_tools_that_are_none(openai_client: openai.OpenAI, anthropic_client: anthropic.Anthropic) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        choice: Any = {"type": "function", "name": "other"}
        openai_client.responses.create(**{**OF_RESPONSES, "tool_choice": choice})
    assert caught.value.param == "tool_choice"
    with pytest.raises(anthropic.BadRequestError, match="tool_choice"):
        anthropic_client.messages.create(**{**OF_MESSAGES, "tool_choice": {"type": "tool"}})
    with pytest.raises(anthropic.BadRequestError, match="tool_result is of the user"):
        block: Any = {"type": "tool_result", "tool_use_id": "x"}
        talk = [*OF_MESSAGES["messages"], {"role": "assistant", "content": [block]}, *OF_MESSAGES["messages"]]
        anthropic_client.messages.create(**{**OF_MESSAGES, "messages": talk})


@pytest.mark.parametrize("value", [True, {"lenient": True}, None])
def test_options_of_the_grammar_are_not_for_clients(
    openai_client: openai.OpenAI, anthropic_client: anthropic.Anthropic, value: Any
) -> None:
    schema = {**PARAMETERS, "x-guidance": value}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("response_format", {"response_format": form}),
        ("structured_outputs.json", {"extra_body": {"structured_outputs": {"json": schema}}}),
        ("tools", {"tools": [tool]}),
    ]
    for param, fields in asked:
        with pytest.raises(openai.BadRequestError, match="x-guidance") as caught:
            openai_client.chat.completions.create(**OF_CHAT, **fields)
        assert caught.value.param == param
    with pytest.raises(anthropic.BadRequestError, match="x-guidance"):
        anthropic_client.messages.create(
            **{**OF_MESSAGES, "tools": [{"name": "weather", "input_schema": schema}]}
        )


CALL = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
FUNCTION: dict[str, Any] = {**CALL["function"], "argumens": "{}"}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "contnet": "x"}, "contnet"),
        ({"role": "user", "content": "x", "messages": 1}, "messages"),  # a word of the chat template
        ({"role": "user", "content": "x", "is_error": True}, "is_error"),
        ({"role": "assistant", "content": "x", "refusal": "no"}, "refusal"),
        ({"role": "assistant", "tool_calls": [{**CALL, "nmae": 1}]}, "tool_calls.0.nmae"),
        (
            {"role": "assistant", "tool_calls": [{**CALL, "function": FUNCTION}]},
            "tool_calls.0.function.argumens",
        ),
    ],
)
def test_fields_of_a_message_that_nobody_reads(
    openai_client: openai.OpenAI, message: Any, param: str
) -> None:
    for path in ("/chat/completions", "/../tokenize"):
        with pytest.raises(openai.BadRequestError, match=param) as caught:
            openai_client.post(path, body={"model": "scripted", "messages": [message]}, cast_to=object)
        assert caught.value.param == f"messages.0.{param}"


def test_fields_of_a_message_that_are_known(openai_client: openai.OpenAI) -> None:
    """Also an answer goes back as it came."""
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
    said = openai_client.chat.completions.create(**OF_CHAT, tools=[tool], tool_choice="required")
    answer: Any = said.choices[0].message
    assert answer.tool_calls
    talk: Any = [
        {"role": "user", "content": "weather?", "name": "me"},
        answer,
        answer.model_dump(),
        {"role": "tool", "content": "rain", "tool_call_id": answer.tool_calls[0].id},
        {"role": "assistant", "content": "so", "reasoning_content": "hm", "refusal": None, "audio": None},
        {"role": "user", "content": "and?"},
    ]
    assert openai_client.chat.completions.create(model="scripted", messages=talk).choices[0].message.content


@pytest.mark.parametrize(
    "arguments",
    ['{"a": 9e999}', '{"a": -1e400}', '{"a": ' + "9" * 5000 + "}", '{"a": ' * 3000 + "1" + "}" * 3000],
)
def test_arguments_that_json_cannot_tell(arguments: str) -> None:
    """A grammar allows numbers, and levels, that no client reads."""
    with pytest.raises(ApiError, match=r"The model called 'f' with a number, or with levels") as caught:
        _input(Call("1", "f", arguments))
    assert caught.value.status == 400
    assert _input(Call("1", "f", '{"a": 1e300}')) == {"a": 1e300}
