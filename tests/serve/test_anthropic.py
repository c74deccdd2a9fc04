"""Anthropic's messages, by Anthropic's own client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from live import serving

import bedplate
from bedplate.serve.keys import Keys
from bedplate.serve.settings import Settings

TALK: list[Any] = [
    {"role": "user", "content": "the fox"},
    {"role": "assistant", "content": "jumps"},
    {"role": "user", "content": "where"},
]
GREEDY = {"temperature": 0}  # the client no longer names it
ASKED: dict[str, Any] = {"model": "all", "messages": TALK[:1], "max_tokens": 8, "extra_body": GREEDY}


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as client:
        yield client


def text_of(message: anthropic.types.Message) -> str:
    (block,) = message.content
    assert isinstance(block, anthropic.types.TextBlock)
    return block.text


@pytest.mark.parametrize("form", ["text", "blocks"])
def test_text(form: str, client: anthropic.Anthropic, alone: bedplate.Engine) -> None:
    system: Any = "be brief"
    talk = TALK
    if form == "blocks":
        mark = {"cache_control": {"type": "ephemeral"}}
        system = [{"type": "text", "text": system, **mark}]
        talk = [{**turn, "content": [{"type": "text", "text": turn["content"], **mark}]} for turn in TALK]
    said = client.messages.create(model="all", system=system, messages=talk, max_tokens=8, extra_body=GREEDY)
    conversation = [{"role": "system", "content": "be brief"}, *TALK]
    assert text_of(said) == alone.session("all").generate(conversation, max_tokens=8)
    assert said.stop_reason == "max_tokens" and said.usage.output_tokens == 8
    read = said.usage.input_tokens + (said.usage.cache_read_input_tokens or 0)
    assert read == len(alone.tokenizer_of("all").encode_chat(conversation))
    counted = client.messages.count_tokens(model="all", system=system, messages=talk)
    assert counted.input_tokens == read
    assert said._request_id is not None and said._request_id.startswith("req_")


def test_events(client: anthropic.Anthropic) -> None:
    said = client.messages.create(**ASKED)
    events = list(client.messages.create(**ASKED, stream=True))
    kinds = [event.type for event in events]
    deltas = kinds.count("content_block_delta")
    assert kinds == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    with client.messages.stream(**ASKED) as stream:
        pieces = list(stream.text_stream)
        whole = stream.get_final_message()
    assert "".join(pieces) == text_of(whole) == text_of(said) and len(pieces) == deltas
    assert whole.stop_reason == "max_tokens" and whole.usage.output_tokens == 8
    assert whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0) == (
        said.usage.input_tokens + (said.usage.cache_read_input_tokens or 0)
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_sequence_is_named(client: anthropic.Anthropic, stream: bool) -> None:
    text = text_of(client.messages.create(**ASKED))
    stop = text[3:5]
    asked = {**ASKED, "stop_sequences": ["never said", stop]}
    if stream:
        with client.messages.stream(**asked) as helped:
            said = helped.get_final_message()
    else:
        said = client.messages.create(**asked)
    assert (said.stop_reason, said.stop_sequence) == ("stop_sequence", stop)
    assert text_of(said) == text[: text.index(stop)]


def test_an_end_token_ends_the_turn(client: anthropic.Anthropic, alone: bedplate.Engine) -> None:
    (end,) = alone.tokenizer_of("all").end_ids
    said = client.messages.create(**{**ASKED, "extra_body": {"logit_bias": {str(end): 100}}})
    assert (said.content, said.stop_reason, said.stop_sequence) == ([], "end_turn", None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("thinking", {"type": "enabled", "budget_tokens": 1024}),
        ("container", "c"),
        ("inference_geo", "eu"),
        ("service_tier", "fast"),
        ("output_config", {"effort": "high"}),
        ("max_tokens", 0),
        ("messages", [{"role": "user", "content": [{"type": "image", "source": {}}]}]),
        ("messages", TALK[:2]),
        ("tools", [{"type": "web_search_20250305", "name": "web_search"}]),
        ("tool_choice", {"type": "any"}),
        ("mcp_servers", []),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(client: anthropic.Anthropic, field: str, value: Any) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(**{**ASKED, "extra_body": {field: value}})
    body: Any = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert body["error"]["message"].startswith(field)
    assert caught.value.request_id == body["request_id"]


@pytest.mark.parametrize("stream", [False, True])
def test_errors(client: anthropic.Anthropic, stream: bool) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(**{**ASKED, "model": "none"}, stream=stream)
    assert caught.value.type == "not_found_error"
    long = [{"role": "user", "content": "fox " * 500}]
    with pytest.raises(anthropic.BadRequestError, match="do not fit the context"):
        client.messages.create(**{**ASKED, "messages": long}, stream=stream)


def test_errors_of_the_server_are_in_the_same_words(toy_bundle: bedplate.Bundle) -> None:
    settings = Settings(keys=Keys({"me": "secret"}), max_body=2000)
    with serving({"toy": toy_bundle}, settings) as address:
        with anthropic.Anthropic(base_url=address, api_key="wrong", max_retries=0) as client:
            with pytest.raises(anthropic.AuthenticationError) as caught:
                client.messages.create(**ASKED)
            assert caught.value.type == "authentication_error"
        with anthropic.Anthropic(base_url=address, api_key="secret", max_retries=0) as client:
            assert text_of(client.messages.create(**ASKED))
            with pytest.raises(anthropic.APIStatusError) as long:
                client.messages.create(**{**ASKED, "system": "fox " * 1000})
            assert long.value.status_code == 413 and long.value.type == "request_too_large"


@pytest.mark.parametrize(("method", "path"), [("POST", "/messages/batches"), ("GET", "/messages")])
def test_paths_that_there_are_not_are_refused_in_the_same_words(
    client: anthropic.Anthropic, method: str, path: str
) -> None:
    ask = client.get if method == "GET" else client.post
    with pytest.raises(anthropic.APIStatusError) as caught:
        ask(f"/v1{path}", cast_to=object)
    assert caught.value.status_code in (404, 405)
    body: Any = caught.value.body
    assert body["type"] == "error" and body["request_id"] and body["error"]["message"]


def test_metadata_and_nulls_change_nothing(client: anthropic.Anthropic) -> None:
    more: dict[str, Any] = {"metadata": {"user_id": "me"}, "service_tier": "auto"}
    nulls = {"top_k": None, "system": None, "container": None, "thinking": None}
    said = client.messages.create(**{**ASKED, **more, "extra_body": {**GREEDY, **nulls}})
    assert text_of(said) == text_of(client.messages.create(**ASKED))
