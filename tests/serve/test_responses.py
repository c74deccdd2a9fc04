"""OpenAI's responses, by OpenAI's own client."""

from __future__ import annotations

from typing import Any

import openai
import pytest

import bedplate

TALK: list[Any] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the fox"},
    {"role": "assistant", "content": "jumps"},
    {"role": "user", "content": "where"},
]


def expected(alone: bedplate.Engine, messages: list[Any], tokens: int = 8) -> str:
    return alone.session("all").generate(messages, max_tokens=tokens)


def test_text(client: openai.OpenAI, alone: bedplate.Engine) -> None:
    said = client.responses.create(model="all", input="the fox", max_output_tokens=8, temperature=0)
    assert said.output_text == expected(alone, [{"role": "user", "content": "the fox"}])
    assert said.status == "incomplete" and said.incomplete_details is not None
    assert said.incomplete_details.reason == "max_output_tokens"
    assert said.usage is not None and said.usage.output_tokens == 8
    assert said.usage.total_tokens == said.usage.input_tokens + 8


@pytest.mark.parametrize("form", ["instructions", "items", "parts", "echoed"])
def test_all_forms_of_a_conversation_are_the_same(
    form: str, client: openai.OpenAI, alone: bedplate.Engine
) -> None:
    given: dict[str, Any] = {"input": TALK}
    if form == "instructions":
        given = {"instructions": TALK[0]["content"], "input": TALK[1:]}
    elif form == "parts":
        given["input"] = [
            {**turn, "type": "message", "content": [{"type": "input_text", "text": turn["content"]}]}
            for turn in TALK
        ]
    elif form == "echoed":  # as a client sends back what it got
        said = {"type": "output_text", "text": "jumps", "annotations": [], "logprobs": []}
        item = {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [said],
        }
        given["input"] = [TALK[0], TALK[1], item, TALK[3]]
    said = client.responses.create(model="all", **given, max_output_tokens=8, temperature=0)
    assert said.output_text == expected(alone, TALK)


def test_events(client: openai.OpenAI, alone: bedplate.Engine) -> None:
    asked: Any = {"model": "all", "input": "the fox", "max_output_tokens": 8, "temperature": 0}
    with client.responses.create(**asked, stream=True) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    text = expected(alone, [{"role": "user", "content": "the fox"}])
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert deltas > 1 and "".join(pieces) == text
    last: Any = events[-1]
    assert last.response.output_text == text and last.response.usage.output_tokens == 8
    with client.responses.stream(**asked) as helped:  # which keeps count of the events itself
        helped.until_done()
        assert [event.type for event in list(helped)] == []


def test_logprobs(client: openai.OpenAI) -> None:
    asked: Any = {
        "model": "all",
        "input": "the fox",
        "max_output_tokens": 4,
        "temperature": 0,
        "top_logprobs": 2,
        "include": ["message.output_text.logprobs"],
    }
    said: Any = client.responses.create(**asked)
    (part,) = said.output[0].content
    assert len(part.logprobs) == 4 and all(len(one.top_logprobs) == 2 for one in part.logprobs)
    assert "".join(one.token for one in part.logprobs) == part.text
    events: list[Any] = list(client.responses.create(**asked, stream=True))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    told = [one.logprob for event in deltas for one in event.logprobs]
    assert told == [one.logprob for one in part.logprobs]
    assert events[-1].response.output[0].content[0].logprobs == part.logprobs


def test_what_changes_nothing_is_accepted_and_told(client: openai.OpenAI) -> None:
    said = client.responses.create(
        model="all",
        input="the fox",
        max_output_tokens=2,
        store=False,
        metadata={"a": "b"},
        user="me",
        safety_identifier="you",
        prompt_cache_key="key",
        service_tier="auto",
        truncation="disabled",
        background=False,
        parallel_tool_calls=False,
        include=["reasoning.encrypted_content"],
        text={"format": {"type": "text"}, "verbosity": "medium"},
        temperature=None,
        previous_response_id=None,
    )
    assert said.metadata == {"a": "b"} and said.user == "me" and said.temperature == 1
    assert said.prompt_cache_key == "key" and said.model_extra is not None and not said.model_extra["store"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("previous_response_id", "resp_1"),
        ("background", True),
        ("store", True),
        ("conversation", "conv_1"),
        ("prompt", {"id": "pmpt_1"}),
        ("truncation", "auto"),
        ("reasoning", {"effort": "low"}),
        ("service_tier", "flex"),
        ("tools", [{"type": "web_search"}]),
        ("max_output_tokens", 0),
        ("input", [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]),
        ("input", [{"type": "item_reference", "id": "msg_1"}]),
        ("tool_choice", "required"),
        ("text", {"format": {"type": "json_object", "schema": {"type": "object"}}}),
        ("text", {"format": {"type": "text", "strict": True}}),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(client: openai.OpenAI, field: str, value: Any) -> None:
    asked = {"model": "all", "input": "the fox", field: value}
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**asked)
    assert caught.value.param is not None and caught.value.param.startswith(field)


@pytest.mark.parametrize("stream", [False, True])
def test_errors(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError, match="do not fit the context"):
        client.responses.create(model="all", input="fox " * 500, stream=stream)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="none", input="fox", stream=stream)
