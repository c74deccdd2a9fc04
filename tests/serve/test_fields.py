"""Every field that the clients know of is honoured, or refused by its name: none is ignored where it matters."""

from __future__ import annotations

import json
import typing
from typing import Any, NamedTuple

import httpx2
import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from pydantic import BaseModel, ValidationError

from bedplate.serve.live_api import LoadAdapterRequest, UnloadAdapterRequest
from bedplate.serve.messages_request import Conversation, MessagesRequest
from bedplate.serve.models import DetokenizeRequest, TokenizeRequest
from bedplate.serve.openai_chat import ChatCompletionRequest
from bedplate.serve.openai_text import CompletionRequest
from bedplate.serve.responses_request import ResponsesRequest
from bedplate.serve.wire import Part

MESSAGES = [{"role": "user", "content": "the fox"}]
SCHEMA = {"type": "object", "properties": {}, "additionalProperties": False}
FUNCTION = {"name": "look", "parameters": SCHEMA}
USER = {"type": "message", "role": "user", "content": "fox"}


class Api(NamedTuple):
    """A route, a request of it, and the types of the client that say what a request may have.

    honoured: a value of each field that is taken.  refused: a value of each that is not.
    """

    path: str
    least: dict[str, Any]
    types: tuple[Any, ...]
    honoured: dict[str, Any]
    refused: dict[str, Any]


OPENAI = {
    "frequency_penalty": 0.5,
    "logit_bias": {"5": 1},
    "presence_penalty": -0.5,
    "seed": 5,
    "temperature": 0.5,
    "top_p": 0.5,
    "user": "me",
}
ACCEPTED = {
    "metadata": {"a": "b"},
    "parallel_tool_calls": False,
    "prompt_cache_key": "key",
    "prompt_cache_retention": "in_memory",
    "safety_identifier": "me",
    "service_tier": "auto",
    "store": False,
}
OF_MESSAGES = {
    "cache_control": {"type": "ephemeral"},
    "messages": MESSAGES,
    "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
    "speed": "standard",
    "system": "be brief",
    "thinking": {"type": "disabled"},
    "tool_choice": {"type": "none"},
    "tools": [{"name": "look", "input_schema": SCHEMA}],
}

APIS = {
    "completions": Api(
        "/v1/completions",
        {"model": "scripted", "prompt": "the fox", "max_tokens": 1},
        (
            completion_create_params.CompletionCreateParamsNonStreaming,
            completion_create_params.CompletionCreateParamsStreaming,
        ),
        {
            **OPENAI,
            "best_of": 1,
            "echo": True,
            "logprobs": 2,
            "max_tokens": 2,
            "n": 2,
            "prompt": ["a", "b"],
            "stop": ["x"],
            "stream": False,
            "stream_options": {"include_usage": True},
        },
        {"best_of": 2, "suffix": "end", "stream_options": {"include_obfuscation": True}},
    ),
    "chat": Api(
        "/v1/chat/completions",
        {"model": "scripted", "messages": MESSAGES, "max_tokens": 1},
        (
            chat_create_params.CompletionCreateParamsNonStreaming,
            chat_create_params.CompletionCreateParamsStreaming,
        ),
        {
            **OPENAI,
            **ACCEPTED,
            "logprobs": True,
            "max_completion_tokens": 1,
            "max_tokens": 2,
            "messages": MESSAGES,
            "modalities": ["text"],
            "n": 2,
            "response_format": {"type": "json_object"},
            "stop": "x",
            "stream": False,
            "stream_options": {"include_usage": True},
            "tool_choice": "none",
            "tools": [{"type": "function", "function": FUNCTION}],
            "top_logprobs": 0,
            "verbosity": "medium",
        },
        {
            "audio": {"format": "wav", "voice": "alloy"},
            "function_call": "auto",
            "functions": [FUNCTION],
            "max_completion_tokens": 2,
            "modalities": ["text", "audio"],
            "moderation": {"model": "omni-moderation-latest"},
            "prediction": {"type": "content", "content": "fox"},
            "prompt_cache_options": {"mode": "implicit"},
            "prompt_cache_retention": "24h",
            "reasoning_effort": "low",
            "service_tier": "flex",
            "store": True,
            "top_logprobs": 2,
            "verbosity": "low",
            "web_search_options": {},
        },
    ),
    "responses": Api(
        "/v1/responses",
        {"model": "scripted", "input": "the fox", "max_output_tokens": 1},
        (
            response_create_params.ResponseCreateParamsNonStreaming,
            response_create_params.ResponseCreateParamsStreaming,
        ),
        {
            **ACCEPTED,
            "background": False,
            "include": ["message.output_text.logprobs"],
            "input": [USER],
            "instructions": "be brief",
            "max_output_tokens": 2,
            "max_tool_calls": 1,
            "reasoning": {"effort": "none"},
            "stream": False,
            "stream_options": {"include_obfuscation": False},
            "temperature": 0.5,
            "text": {
                "format": {"type": "json_schema", "name": "any", "schema": SCHEMA},
                "verbosity": "medium",
            },
            "tool_choice": "none",
            "tools": [{"type": "function", **FUNCTION}],
            "top_logprobs": 2,
            "top_p": 0.5,
            "truncation": "disabled",
            "user": "me",
        },
        {
            "access_programs": {"cyber": "standard"},
            "background": True,
            "background_options": {"completion_window": "soonest"},
            "context_management": [{"type": "compaction"}],
            "conversation": "conv_1",
            "image": {"context_compression": "auto"},
            "moderation": {"model": "omni-moderation-latest"},
            "previous_response_id": "resp_1",
            "prompt": {"id": "pmpt_1"},
            "prompt_cache_options": {"mode": "implicit"},
            "reasoning": {"summary": "auto"},
            "store": True,
            "text": {"verbosity": "low"},
            "truncation": "auto",
        },
    ),
    "messages": Api(
        "/v1/messages",
        {"model": "scripted", "messages": MESSAGES, "max_tokens": 1},
        (
            message_create_params.MessageCreateParamsNonStreaming,
            message_create_params.MessageCreateParamsStreaming,
        ),
        {
            **OF_MESSAGES,
            "max_tokens": 2,
            "metadata": {"user_id": "me"},
            "service_tier": "standard_only",
            "stop_sequences": ["x"],
            "stream": False,
        },
        {
            "container": "c",
            "diagnostics": {},
            "inference_geo": "eu",
            "output_config": {"effort": "low"},
            "speed": "fast",
            "thinking": {"type": "adaptive"},
            "user_profile_id": "me",
            "workspace_id": "here",
        },
    ),
    "count_tokens": Api(
        "/v1/messages/count_tokens",
        {"model": "scripted", "messages": MESSAGES},
        (message_count_tokens_params.MessageCountTokensParams,),
        OF_MESSAGES,
        {
            "output_config": {"effort": "low"},
            "speed": "fast",
            "user_profile_id": "me",
            "workspace_id": "here",
        },
    ),
}


def fields_of(api: Api) -> dict[str, Any]:
    return {name: kind for one in api.types for name, kind in typing.get_type_hints(one).items()}


@pytest.fixture(scope="module")
def http(scripted_address: str) -> typing.Iterator[httpx2.Client]:
    with httpx2.Client(base_url=scripted_address) as client:
        yield client


def refused_field(said: httpx2.Response) -> str:
    """The field that a 400 names."""
    assert said.status_code == 400, said.text
    error = said.json()["error"]
    return str(error.get("param") or error["message"])


@pytest.mark.parametrize("name", APIS)
def test_every_field_of_the_client_is_known(name: str) -> None:
    api = APIS[name]
    assert {"model", *api.honoured, *api.refused} >= set(fields_of(api))


@pytest.mark.parametrize("name", APIS)
def test_fields_are_honoured(name: str, http: httpx2.Client) -> None:
    api = APIS[name]
    for field, value in api.honoured.items():
        least = {
            other: it
            for other, it in api.least.items()
            if (field, other) != ("max_completion_tokens", "max_tokens")
        }
        least |= {"stream": True} if field == "stream_options" else {}
        said = http.post(api.path, json={**least, field: value})
        assert said.status_code == 200, (field, said.text)


@pytest.mark.parametrize("name", APIS)
def test_fields_are_refused_by_name(name: str, http: httpx2.Client) -> None:
    api = APIS[name]
    for field, value in {**api.refused, "never_heard_of": 1, "temprature": 0}.items():
        said = http.post(api.path, json={**api.least, field: value})
        expected = "max_tokens" if field == "max_completion_tokens" else field
        assert refused_field(said).startswith(expected), said.text


@pytest.mark.parametrize("name", ["completions", "chat", "responses"])
def test_options_of_a_stream_need_one(name: str, http: httpx2.Client) -> None:
    api = APIS[name]
    for more in ({}, {"stream": False}):
        said = http.post(api.path, json={**api.least, **more, "stream_options": {}})
        assert said.status_code == 400 and said.json()["error"]["param"] == "stream_options"


TEXT = {"type": "text", "text": "a"}
RESULT = {"type": "tool_result", "tool_use_id": "a"}


@pytest.mark.parametrize(
    ("name", "fields", "param", "said"),
    [
        ("completions", {"prompt": 5}, "prompt", "valid string"),
        ("completions", {"prompt": [5, "a"]}, "prompt.1", "valid integer"),
        ("completions", {"prompt": [[5], ["a"]]}, "prompt.1.0", "valid integer"),
        ("completions", {"prompt": []}, "prompt", "at least 1 item"),
        ("completions", {"stop": [5]}, "stop.0", "valid string"),
        ("completions", {"stop": ["a"] * 17}, "stop", "at most 16 items"),
        ("chat", {"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "valid string"),
        ("chat", {"messages": [{"content": "a"}]}, "messages.0.role", "required"),
        (
            "chat",
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages.0.content.0.text",
            "required",
        ),
        ("chat", {"tool_choice": {"type": "function"}}, "tool_choice.function", "required"),
        ("chat", {"response_format": {"type": "x"}}, "response_format", "json_object"),
        ("responses", {"input": 5}, "input", "valid string"),
        (
            "responses",
            {"input": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "input.0.content.0.text",
            "valid string",
        ),
        (
            "responses",
            {"input": [{"type": "function_call", "call_id": "c", "name": 5, "arguments": "{}"}]},
            "input.0.name",
            "valid string",
        ),
        ("responses", {"input": [{"type": "function_call", "name": "look"}]}, "input.0.call_id", "required"),
        ("responses", {"input": [{"type": "item_reference"}]}, "input.0", "The type is message"),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{**TEXT, "citations": [1]}]}]},
            "messages.0.content.0.citations",
            "null",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{**RESULT, "content": [{"type": "text"}]}]}]},
            "messages.0.content.0.content.0.text",
            "required",
        ),
    ],
)
def test_a_wrong_field_is_named_as_it_was_sent(
    name: str, fields: dict[str, Any], param: str, said: str, http: httpx2.Client
) -> None:
    """Without the names of the kinds that it could have been."""
    error = http.post(APIS[name].path, json={**APIS[name].least, **fields}).json()["error"]
    assert error.get("param", param) == param
    assert error["message"].startswith(f"{param}: ") and said in error["message"]


@pytest.mark.parametrize("name", APIS)
def test_each_word_that_a_field_may_be_is_honoured_or_refused_by_name(name: str, http: httpx2.Client) -> None:
    api = APIS[name]
    for field, kind in fields_of(api).items():
        for word in words_of(kind) if field != "model" else ():
            said = http.post(api.path, json={**api.least, field: word})
            assert said.status_code == 200 or refused_field(said).startswith(field), (word, said.text)


def words_of(kind: Any) -> set[str]:
    if typing.get_origin(kind) is typing.Literal:
        return {word for word in typing.get_args(kind) if isinstance(word, str)}
    if typing.get_origin(kind) is list:
        return set()
    return {word for part in typing.get_args(kind) for word in words_of(part)}


@pytest.mark.parametrize("name", APIS)
def test_null_is_what_is_not_given(name: str, http: httpx2.Client) -> None:
    api = APIS[name]
    nulls = {field: None for field in fields_of(api) if field not in api.least}
    said = http.post(api.path, json={**api.least, **nulls})
    assert said.status_code == 200, said.text
    for field in ("model", *(field for field in api.least if not field.startswith("max"))):
        assert refused_field(http.post(api.path, json={**api.least, field: None})).startswith(field)


def parts_of(kind: Any) -> set[type[Part]]:
    """All models that a type is made of."""
    if isinstance(kind, type) and issubclass(kind, Part):
        return {kind}.union(*(parts_of(field.annotation) for field in kind.model_fields.values()))
    return set[type[Part]]().union(*map(parts_of, typing.get_args(kind)))


def least_of(kind: Any) -> Any:
    """What a type takes, with nothing that may be left out."""
    first = next(iter(typing.get_args(kind)), None)
    if isinstance(kind, type) and issubclass(kind, Part):
        fields = kind.model_fields.items()
        return {
            field.alias or name: least_of(field.annotation) for name, field in fields if field.is_required()
        }
    if typing.get_origin(kind) is list:
        return [least_of(first)]
    if typing.get_origin(kind) is dict or kind is dict:
        return {}
    if typing.get_origin(kind) is typing.Literal:
        return first
    return {str: "a", int: 1}[kind] if kind in (str, int) else least_of(first)


BODIES = (
    ChatCompletionRequest,
    CompletionRequest,
    ResponsesRequest,
    MessagesRequest,
    Conversation,
    TokenizeRequest,
    DetokenizeRequest,
    LoadAdapterRequest,
    UnloadAdapterRequest,
)


@pytest.mark.parametrize(
    "part", sorted(set().union(*map(parts_of, BODIES)), key=str), ids=lambda part: part.__name__
)
def test_null_is_what_is_not_given_in_each_part_of_a_body(part: type[Part]) -> None:
    least = least_of(part)
    without = part.model_validate(least)
    for name, field in part.model_fields.items():
        if not field.is_required():
            assert part.model_validate({**least, field.alias or name: None}) == without
    many = {f"x{i}": None for i in range(100)}
    assert part.model_validate({**many, **least}) == without


def test_nulls_in_requests(http: httpx2.Client) -> None:
    asked: list[tuple[str, dict[str, Any]]] = [
        ("chat", {"stream": True, "stream_options": {"include_usage": None}}),
        ("chat", {"messages": [*MESSAGES, {"role": "user", "content": "a", "is_error": None, "name": None}]}),
        ("messages", {"tool_choice": {"type": "auto", "disable_parallel_tool_use": None}}),
        ("responses", {"text": {"format": {"type": "text", "name": None}, "verbosity": None}}),
    ]
    for name, fields in asked:
        said = http.post(APIS[name].path, json={**APIS[name].least, **fields})
        assert said.status_code == 200, said.text


WRONG: list[None] = [None] * 200_000
MANY: dict[str, list[None]] = {f"x{i}": [] for i in range(200_000)}


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (ChatCompletionRequest, "messages", WRONG),
        (ChatCompletionRequest, "messages", [{"role": "user", "content": WRONG}]),
        (ChatCompletionRequest, "messages", [{"role": "user", "content": [{"type": "text", **MANY}]}]),
        (ChatCompletionRequest, "messages", [{"role": "user", "tool_calls": WRONG}]),
        (ChatCompletionRequest, "messages", [{"role": "user", "content": WRONG[:2000]}]),
        (ChatCompletionRequest, "messages", [{"role": "user", "tool_calls": WRONG[:2000]}]),
        (ChatCompletionRequest, "stop", WRONG),
        (ChatCompletionRequest, "lora", WRONG),
        (ChatCompletionRequest, "lora", MANY),
        (ChatCompletionRequest, "tools", WRONG),
        (ChatCompletionRequest, "metadata", MANY),
        (ChatCompletionRequest, "structured_outputs", {"choice": WRONG}),
        (CompletionRequest, "prompt", WRONG),
        (CompletionRequest, "prompt", [WRONG]),
        (CompletionRequest, "logit_bias", MANY),
        (CompletionRequest, "stream_options", MANY),
        (ResponsesRequest, "input", WRONG),
        (ResponsesRequest, "input", [{"role": "user", "content": WRONG}]),
        (ResponsesRequest, "include", WRONG),
        (MessagesRequest, "messages", WRONG),
        (MessagesRequest, "messages", [{"role": "user", "content": WRONG}]),
        (MessagesRequest, "stop_sequences", WRONG),
        (DetokenizeRequest, "tokens", WRONG),
    ],
)
def test_what_is_wrong_many_times_is_one_error(kind: type[BaseModel], field: str, value: Any) -> None:
    """An error of each item would take the server a kilobyte and some microseconds. A union has one of each kind."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate_json(json.dumps({field: value}))
    of_field = [one for one in caught.value.errors(include_input=False) if one["loc"][0] == field]
    assert 1 <= len(of_field) < 20


def test_unknown_names_are_few_errors() -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate_json(
            json.dumps({"model": "m", "prompt": "a"} | dict.fromkeys(MANY, 1))
        )
    assert caught.value.error_count() < 50
