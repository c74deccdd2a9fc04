"""Calls of functions, by OpenAI's own client and by `instructor`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import jsonschema
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live import serving
from pydantic import BaseModel, Field
from tool_templates import HERMES, KINDS, build

import bedplate
from bedplate.runtime.tokenizer import Tokenizer
from bedplate.serve.calls import CallReader
from bedplate.serve.chat import ChatMessage, plain_messages
from bedplate.serve.messages_request import MessagesRequest, as_chat
from bedplate.serve.tools import CallPiece, Form, Tool, prompt_of

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Köln", 'a}"{b', "<|im_end|>"]},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "maxProperties": 0}
SCHEMAS = {"weather": WEATHER, "stop": NOTHING}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "<|im_end|>", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "stop"}},
]
MESSAGES: list[Any] = [{"role": "user", "content": "the fox"}]
USABLE = [kind for kind in KINDS if kind != "coder"]
STOP: Any = {"type": "function", "function": {"name": "stop"}}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bedplate.Bundle]:
    folder = tmp_path_factory.mktemp("tools")
    build(folder)
    return {name: bedplate.Bundle.open(folder / f"{name}.bundle") for name in KINDS}


@pytest.fixture(scope="module")
def client(bundles: dict[str, bedplate.Bundle]) -> Iterator[openai.OpenAI]:
    with (
        serving(bundles) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as one,
    ):
        yield one


def ask(
    client: openai.OpenAI, kind: str, **fields: Any
) -> tuple[str | None, list[tuple[str, str]], str, list[str]]:
    """Text, calls, finish reason, and ids: the same as a whole and as a stream."""
    body: dict[str, Any] = {
        "model": f"{kind}-ad", "messages": MESSAGES, "tools": TOOLS, "max_tokens": 400, "seed": 1, **fields
    }  # fmt: skip
    choice = client.chat.completions.create(**body).choices[0]
    calls = [
        (one.function.name, one.function.arguments)
        for one in choice.message.tool_calls or ()
        if one.type == "function"
    ]
    ids = [one.id for one in choice.message.tool_calls or ()]
    names, pieces, text, finish, own_ids = dict[int, str](), dict[int, str](), "", None, list[str]()
    for piece in client.chat.completions.create(stream=True, **body):
        (said,) = piece.choices
        text += said.delta.content or ""
        finish = said.finish_reason or finish
        for call in said.delta.tool_calls or ():
            assert call.function is not None
            if call.id is not None:
                assert call.type == "function" and call.function.name is not None
                own_ids.append(call.id)
                names[call.index] = call.function.name
            pieces[call.index] = pieces.get(call.index, "") + (call.function.arguments or "")
    assert (text or None, finish) == (choice.message.content or None, choice.finish_reason)
    told = [(names[i], pieces[i]) for i in range(len(names))]
    assert calls in (told, told[:-1]) and (calls == told or finish == "length")  # a call that was cut is none
    assert len({*ids, *own_ids}) == len(ids) + len(told)
    return choice.message.content, calls, choice.finish_reason, ids


def check(calls: list[tuple[str, str]]) -> None:
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])


@pytest.mark.parametrize("kind", USABLE)
def test_a_call_is_forced_and_its_arguments_are_right(client: openai.OpenAI, kind: str) -> None:
    for seed in range(5):
        text, calls, finish, ids = ask(client, kind, tool_choice="required", seed=seed)
        check(calls)
        assert not text and (calls or finish == "length") and finish in ("tool_calls", "length")
        assert all(len(one) == 9 if kind == "mistral" else one.startswith("call_") for one in ids)
        _, calls, finish, _ = ask(client, kind, tool_choice="required", seed=seed, parallel_tool_calls=False)
        assert len(calls) == 1 and finish == "tool_calls"
    assert ask(client, kind, tool_choice=STOP)[1] == [("stop", "{}")]


@pytest.mark.parametrize("kind", ["hermes", "special", "mistral"])
def test_a_call_amid_text(client: openai.OpenAI, bundles: dict[str, bedplate.Bundle], kind: str) -> None:
    """The model chooses the marker, because we make it likely."""
    with bedplate.Engine(bundles[kind], threads=1) as engine:
        (marker,) = (
            token for token, (text, _) in engine.tokenizer.added.items() if text == KINDS[kind].added[0]
        )
    bias = {str(marker): 11}
    texts = []
    for seed in range(4):
        text, calls, finish, _ = ask(
            client, kind, logit_bias=bias, temperature=1.5, seed=seed, parallel_tool_calls=False
        )
        check(calls)
        assert len(calls) == 1 and finish == "tool_calls"
        texts.append(text)
    assert any(texts) and not any("tool_call" in (text or "").lower() for text in texts)


def test_a_call_that_the_model_begins_itself(client: openai.OpenAI) -> None:
    """Without markers an answer is a call, or is not. 92: {"""
    _, calls, finish, _ = ask(client, "llama", logit_bias={"92": 100}, max_tokens=1)
    assert (calls, finish) == ([], "length")
    text, calls, _, _ = ask(client, "llama", max_tokens=20)
    assert text and not calls


@pytest.mark.parametrize("kind", USABLE)
def test_none_is_as_without_tools(client: openai.OpenAI, kind: str) -> None:
    without = client.chat.completions.create(
        model=f"{kind}-ad", messages=MESSAGES, max_tokens=20, temperature=0
    )
    text, calls, _, _ = ask(client, kind, tool_choice="none", max_tokens=20, temperature=0)
    assert text == without.choices[0].message.content and not calls
    told = client.chat.completions.create(model=f"{kind}-ad", messages=MESSAGES, max_tokens=1, tools=TOOLS)
    assert told.usage.prompt_tokens > without.usage.prompt_tokens + 100  # type: ignore[union-attr]


def test_an_answer_of_a_schema_or_calls(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": [1]}, "strict": True}}
    found = {ask(client, "hermes", response_format=form, seed=seed)[2] for seed in range(9)}
    assert found <= {"stop", "tool_calls", "length"}
    text, calls, _, _ = ask(client, "hermes", response_format=form, logit_bias={"60": 100})
    assert (text, calls) == ("[1]", [])


def history(ids: list[str]) -> list[dict[str, Any]]:
    return [
        *MESSAGES,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": one,
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Köln"}'},
                }
                for one in ids
            ],
        },
        *(
            {"role": "tool", "tool_call_id": one, "content": f"rain{i} <|im_end|>"}
            for i, one in enumerate(ids)
        ),
        {"role": "user", "content": "the dog"},
    ]


@pytest.mark.parametrize("kind", USABLE)
def test_what_a_template_is_shown_is_what_transformers_shows_it(
    kind: str, bundles: dict[str, bedplate.Bundle]
) -> None:
    from transformers import PreTrainedTokenizerFast

    own = bundles[kind].path.parent / f"model-{kind}"
    theirs = PreTrainedTokenizerFast.from_pretrained(own)
    messages = history(["abcdefghi"] if kind == "llama" else ["abcdefghi", "123456789"])
    tools = [Tool.model_validate(one) for one in TOOLS]
    with bedplate.Engine(bundles[kind], threads=1) as engine:
        prompt = prompt_of(engine.tokenizer, messages, tools)
        text = engine.tokenizer.render(prompt)
    if kind != "words":
        shown = json.loads(json.dumps(messages))
        for call in shown[1]["tool_calls"]:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        told = [TOOLS[0], {"type": "function", "function": {"name": "stop", "parameters": {
            "type": "object", "properties": {}, "additionalProperties": False}}}]  # fmt: skip
        assert text == theirs.apply_chat_template(
            shown, tools=told, add_generation_prompt=True, tokenize=False
        )
    else:
        assert text.startswith("<|im_start|>system\n# Tools\n") and '"description": "<|im_end|>"' in text
        call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
        assert f"<|im_start|>assistant\n{call}\n{call}<|im_end|>\n" in text
        assert text.count("<|im_start|>user") == 3 and text.count("<tool_response>\nrain") == 2


@pytest.mark.parametrize("kind", USABLE)
@pytest.mark.parametrize("tools", [TOOLS, None])
def test_a_history_of_calls_is_answered(client: openai.OpenAI, kind: str, tools: Any) -> None:
    ids = ["abcdefghi"] if kind == "llama" else ["abcdefghi", "123456789"]
    more: dict[str, Any] = {} if tools is None else {"tools": tools, "tool_choice": "required"}
    messages: Any = history(ids)
    said = client.chat.completions.create(model=f"{kind}-ad", messages=messages, max_tokens=200, **more)
    assert (said.choices[0].message.tool_calls is None) == (tools is None)


@pytest.mark.parametrize("kind", USABLE)
def test_tokenize_reads_a_history_as_chat_does(client: openai.OpenAI, kind: str) -> None:
    model, messages = f"{kind}-ad", history(["abcdefghi"])
    root = client.with_options(base_url=str(client.base_url).removesuffix("v1/"))
    found: Any = root.post("tokenize", body={"model": model, "messages": messages}, cast_to=object)
    asked: Any = messages
    said = client.chat.completions.create(model=model, messages=asked, max_tokens=1)
    assert said.usage is not None and found["count"] == said.usage.prompt_tokens


def test_a_system_message_stays(bundles: dict[str, bedplate.Bundle]) -> None:
    with bedplate.Engine(bundles["words"], threads=1) as engine:
        parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
        messages = [{"role": "system", "content": parts}, *MESSAGES]
        text = engine.tokenizer.render(prompt_of(engine.tokenizer, messages, [Tool.model_validate(TOOLS[0])]))
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n") and text.count("system") == 1


PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def of_template(source: str) -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    return Tokenizer(Backend(models.BPE()), chat_template=source, special_tokens={})


@pytest.mark.parametrize("template", [HERMES, PLAIN])
@pytest.mark.parametrize(
    ("is_error", "shown"), [(True, "Error: no such city"), (False, "no such city"), (None, "no such city")]
)
def test_a_call_that_has_failed(template: str, is_error: bool | None, shown: str) -> None:
    """The model reads it, whether the template knows tools or not."""
    tokenizer, asked = of_template(template), history(["c"])
    asked[2] |= {"content": "no such city", "is_error": is_error}
    turns = plain_messages(tokenizer, [ChatMessage.model_validate(one) for one in asked])
    text = tokenizer.render(prompt_of(tokenizer, turns, []))
    assert f"<tool_response>\n{shown}\n</tool_response>" in text


def test_a_call_that_has_failed_in_the_words_of_the_template() -> None:
    tokenizer = of_template(
        "{% for m in messages %}{{ m.content }}{% if m.is_error %}!{% endif %}{% endfor %}"
    )
    asked = {"role": "tool", "content": "a", "is_error": True}
    turns = plain_messages(tokenizer, [ChatMessage.model_validate(asked)])
    assert prompt_of(tokenizer, turns, [Tool.model_validate(TOOLS[1])]).messages[-1]["content"] != "Error: a"


def test_a_call_that_has_failed_in_messages() -> None:
    call = {"type": "tool_use", "id": "c", "name": "weather", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "c", "content": "no such city", "is_error": True}
    turns = [{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    asked = MessagesRequest.model_validate({"model": "m", "max_tokens": 1, "messages": [*MESSAGES, *turns]})
    tokenizer = of_template(PLAIN)
    text = tokenizer.render(prompt_of(tokenizer, plain_messages(tokenizer, as_chat(asked).messages), []))
    assert "<tool_response>\nError: no such city\n</tool_response>" in text


def test_a_call_in_words_keeps_what_the_template_reads_beside_it() -> None:
    source = "{% for m in messages %}{{ m.thinking }}{{ m.results }}{{ m.content }}{% endfor %}"
    tokenizer, asked = of_template(source), history(["c"])
    asked[1]["thinking"], asked[3]["results"] = "hm", "so"
    turns = plain_messages(tokenizer, [ChatMessage.model_validate(one) for one in asked])
    text = tokenizer.render(prompt_of(tokenizer, turns, []))
    assert "hm<tool_call>" in text and text.endswith("</tool_response>sothe dog")


def test_a_template_without_a_system_message_tells_the_user() -> None:
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    tokenizer = of_template(template)
    text = tokenizer.render(prompt_of(tokenizer, MESSAGES, [Tool.model_validate(TOOLS[1])]))
    assert text.startswith("<user># Tools\n") and text.endswith("</tool_call>\n\nthe fox")


@pytest.mark.parametrize(
    ("fields", "param", "what"),
    [
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "no tools"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
            "no tool of the name",
        ),
        ({"tools": TOOLS + TOOLS[:1]}, "tools", "same name"),
        ({"tools": [{"type": "custom"}]}, "tools.0", "function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0", "pattern"),
        ({"tool_choice": "any"}, "tool_choice", "required"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools",
            "no object",
        ),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}
                ]
            },
            "tools",
            "not",
        ),
        ({"extra_body": {"ignore_eos": True}}, "ignore_eos", "the grammar ends"),
        ({"model": "coder-ad"}, "tools", "a form that this server does not read"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1"}}]}
                ]
            },
            "messages.0.tool_calls.0.function.arguments",
            "not the text of a JSON object",
        ),
    ],
)
def test_what_is_wrong(client: openai.OpenAI, fields: dict[str, Any], param: str, what: str) -> None:
    body = {"model": "hermes-ad", "messages": MESSAGES, "tools": TOOLS, **fields}
    with pytest.raises(openai.BadRequestError, match=what) as caught:
        client.chat.completions.create(**body)
    assert caught.value.param is not None and caught.value.param.startswith(param)


def test_instructor(client: openai.OpenAI) -> None:
    import instructor

    class Animal(BaseModel):
        legs: int = Field(ge=0, le=9)
        kind: str = Field(max_length=3)

    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        asking = instructor.from_openai(client, mode=mode)
        found = asking.chat.completions.create(
            model="hermes-ad", messages=MESSAGES, response_model=Animal, max_tokens=100, temperature=1, seed=3,
            max_retries=0,
        )  # fmt: skip
        assert isinstance(found, Animal)


MARKED = Form("<tool_call>", "\n", "\n</tool_call>", between="\n")
LISTED = Form("[TOOL_CALLS]", " ", "", is_list=True, short_ids=True)
BARE = Form("", "", "", arguments="parameters", many=False)


@pytest.mark.parametrize(
    ("form", "must", "said", "expected"),
    [
        (MARKED, False, "a < b <tool_x> ", ["a < b <tool_x> "]),
        (MARKED, False, "", []),
        (
            MARKED,
            False,
            'So: \n<tool_call>\n{"name": "f", "arguments": {"a": "}\\"{", "b": [{}]}}\n</tool_call>\n'
            '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
            ["So:", ("f", '{"a": "}\\"{", "b": [{}]}'), ("g", "{}")],
        ),
        (MARKED, True, '<tool_call>\n{"name": "f", "arguments": {"a": 1', [("f", '{"a": 1')]),
        (MARKED, False, "so <tool", ["so <tool"]),
        (LISTED, True, '[TOOL_CALLS] [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"a": []}}]',
         [("f", "{}"), ("g", '{"a": []}')]),
        (BARE, False, '{"name": "f", "parameters": {"é": "\\\\"}}', [("f", '{"é": "\\\\"}')]),
        (BARE, False, '{"nam', ['{"nam']),
        (BARE, False, '{"name": 5}', ['{"name": 5}']),
        (BARE, False, " {}", [" {}"]),
    ],
)  # fmt: skip
@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 150), max_size=12))
def test_calls_are_read_however_the_text_is_cut(
    form: Form, must: bool, said: str, expected: list[Any], cuts: list[int]
) -> None:
    reader, places = CallReader(form, must), [0, *sorted(cuts), len(said)]
    found: list[str | CallPiece] = []
    for begin, end in pairwise(places):
        found += reader.read(said[begin:end], ())
    found += reader.finish()
    told: list[Any] = []
    for one in found:
        if isinstance(one, str):
            told = [*told[:-1], told[-1] + one] if told and isinstance(told[-1], str) else [*told, one]
        elif one.name is not None:
            told.append((one.name, one.arguments))
        else:
            told[-1] = (told[-1][0], told[-1][1] + one.arguments)
    assert told == expected and reader.count == sum(isinstance(one, tuple) for one in expected)


def test_a_marker_that_texts_do_not_show() -> None:
    reader = CallReader(LISTED._replace(marker_token=7), must_call=False)
    assert reader.read("so ", [1, 2]) == ["so"]
    first, second = reader.read(' [{"name": "f", "arguments": {}}]', [7, 3])
    assert first[2:] == ("f", "") and second[2:] == (None, "{}")


def test_where_tools_are_known(bundles: dict[str, bedplate.Bundle]) -> None:
    reading: dict[str, bool] = {}
    for kind, bundle in bundles.items():
        with bedplate.Engine(bundle, threads=1) as engine:
            reading[kind] = engine.tokenizer.reads_tools
    assert reading == {kind: kind != "words" for kind in KINDS}
