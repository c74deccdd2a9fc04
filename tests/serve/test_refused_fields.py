"""What the server refuses, and that the error names the field that it is about."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from bedplate.errors import ArgumentError, MemoryFullError, RunError, UnsupportedError
from bedplate.serve.errors import ApiError, about

MESSAGES = [{"role": "user", "content": "the fox"}]
SCHEMA = {"type": "object", "properties": {}, "additionalProperties": False}
USER = {"type": "message", "role": "user", "content": "fox"}
CALL = {"type": "function_call", "call_id": "c", "name": "look"}
PATHS = {
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}
LEAST: dict[str, dict[str, Any]] = {
    "completions": {"model": "scripted", "prompt": "the fox", "max_tokens": 1},
    "chat": {"model": "scripted", "messages": MESSAGES, "max_tokens": 1},
    "responses": {"model": "scripted", "input": "the fox", "max_output_tokens": 1},
    "messages": {"model": "scripted", "messages": MESSAGES, "max_tokens": 1},
}


@pytest.fixture(scope="module")
def http(scripted_address: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=scripted_address) as client:
        yield client


@pytest.mark.parametrize(
    ("error", "param"),
    [
        (RunError("wrong"), "prompt"),
        (UnsupportedError("not to be mixed"), "lora"),
        (ArgumentError("min_tokens", "wrong"), None),
        (MemoryFullError("full"), None),
    ],
)
def test_what_the_engine_refuses(error: Exception, param: str | None) -> None:
    """None: the error goes on as it is. It has a name already, or is no refusal."""
    with pytest.raises(type(error) if param is None else ApiError) as caught, about("prompt"):
        raise error
    assert param is None or caught.value.param == param  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/detokenize", {"tokens": [5, 320]}, "tokens.1"),
        ("/detokenize", {"tokens": [2**32 - 1]}, "tokens.0"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        *(
            ("/v1/completions", {**fields, **more}, param)
            for fields, param in (
                ({"prompt": [5, 320]}, "prompt.1"),
                ({"prompt": [5, -1]}, "prompt.1"),
                ({"prompt": [5, 2**40]}, "prompt.1"),
                ({"prompt": [[5], [5, 320]]}, "prompt.1.1"),
                ({"logit_bias": {"5": 1, "320": 1}}, "logit_bias.320"),
                ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
                ({"logit_bias": {"fox": 1}}, "logit_bias.fox"),
            )
            for more in ({}, {"echo": True, "max_tokens": 0}, {"echo": True, "logprobs": 1})
        ),
        ("/v1/chat/completions", {"messages": MESSAGES, "logit_bias": {"320": 1}}, "logit_bias.320"),
        ("/v1/responses", {"input": "fox", "logit_bias": {"320": 1}}, "logit_bias.320"),
    ],
)
def test_tokens_that_the_model_does_not_know(
    path: str, fields: dict[str, Any], param: str, http: httpx2.Client
) -> None:
    """The model has 320."""
    text = {"prompt": "fox"} if path == "/v1/completions" else {}
    said = http.post(path, json={"model": "scripted", **text, **fields})
    assert said.status_code == 400 and said.json()["error"]["param"] == param, said.text
    assert said.json()["error"]["message"].startswith(f"{param}: ")


def test_tokens_that_the_model_knows(http: httpx2.Client) -> None:
    said = http.post("/detokenize", json={"model": "scripted", "tokens": [5, 319]})
    assert said.status_code == 200
    body = {"model": "scripted", "prompt": [5, 319], "logit_bias": {"319": 1}, "max_tokens": 1}
    assert http.post("/v1/completions", json=body).status_code == 200


def calls(arguments: str) -> list[dict[str, Any]]:
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": arguments}}
    return [*MESSAGES, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "a"}]


TOO_DEEP: list[Any] = []
for _ in range(70):
    TOO_DEEP = [TOO_DEEP]
OF_CALL = "messages.1.tool_calls.0.function.arguments"
STRICT = {"name": "a", "strict": True, "schema": {"not": {}}}


@pytest.mark.parametrize(
    ("name", "fields", "param"),
    [
        ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"prompt": ["fox", ""]}, "prompt"),
        ("completions", {"prompt": [[5], []]}, "prompt.1"),
        ("completions", {"lora": [{"id": "all", "scale": 1e39}]}, "lora.0.scale"),
        ("completions", {"min_tokens": 5}, "min_tokens"),
        ("completions", {"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ("chat", {"messages": [{"role": "user"}]}, "messages"),
        ("chat", {"messages": [{"role": "user", "content": "a", "name": TOO_DEEP}]}, "messages"),
        ("chat", {"messages": calls('{"a": "\\ud800"}')}, OF_CALL),
        ("chat", {"messages": calls('{"\\ud800": 1}')}, OF_CALL),
        ("chat", {"messages": calls('{"a": NaN}')}, OF_CALL),
        ("chat", {"messages": calls('{"a": 1e999}')}, OF_CALL),
        ("chat", {"messages": calls("[]")}, OF_CALL),
        (
            "responses",
            {"input": [{**USER, "content": "a"}, {**CALL, "arguments": "[]"}]},
            "input.1.arguments",
        ),
        ("responses", {"text": {"format": {"type": "json_schema", "schema": SCHEMA}}}, "text.format.name"),
        ("responses", {"text": {"format": {"type": "json_schema", "name": "a b"}}}, "text.format.name"),
        ("responses", {"text": {"format": {"type": "json_schema", **STRICT}}}, "text.format"),
        ("messages", {"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        ("messages", {"tool_choice": {"type": "auto", "name": "look"}}, "tool_choice.name"),
        ("messages", {"tool_choice": {"type": "none", "name": "look"}}, "tool_choice.name"),
        ("messages", {"tool_choice": {"type": "any", "name": "look"}}, "tool_choice.name"),
        ("messages", {"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        (
            "messages",
            {"tool_choice": {"type": "none", "disable_parallel_tool_use": True}},
            "tool_choice.disable_parallel_tool_use",
        ),
    ],
)
def test_each_refusal_names_its_field(
    name: str, fields: dict[str, Any], param: str, http: httpx2.Client
) -> None:
    said = http.post(PATHS[name], json={**LEAST[name], **fields})
    assert said.status_code == 400, said.text
    error = said.json()["error"]
    if name == "messages":  # Anthropic's errors have no other place for it
        assert error["message"].startswith(f"{param}: ")
    else:
        assert error["param"] == param, said.text


def test_tokenize_names_its_field(http: httpx2.Client) -> None:
    for fields in ([], [{"role": "user"}]):
        said = http.post("/tokenize", json={"model": "scripted", "messages": fields})
        assert said.status_code == 400 and said.json()["error"]["param"] == "messages"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": STRICT}}, "response_format"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"response_format": {"type": "json_object"}, "min_tokens": 1}, "min_tokens"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"min_tokens": 1}, "min_tokens"),
        ({"prompt": ""}, "prompt"),
    ],
)
def test_fields_are_checked_where_nothing_is_generated(
    fields: dict[str, Any], param: str, http: httpx2.Client
) -> None:
    body = {"model": "scripted", "prompt": "fox", "echo": True, "max_tokens": 0}
    assert http.post("/v1/completions", json=body).status_code == 200
    for more in ({}, {"logprobs": 1}, {"stream": True}):
        said = http.post("/v1/completions", json={**body, **more, **fields})
        assert said.status_code == 400 and said.json()["error"]["param"] == param, said.text
