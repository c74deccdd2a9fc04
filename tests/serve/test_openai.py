"""OpenAI's completions, by OpenAI's own client."""

from __future__ import annotations

from typing import Any

import openai
import pytest

import bedplate
from bedplate.runtime.tokenizer import Tokenizer
from bedplate.serve.chat import ChatMessage, TextPart, plain_messages

MESSAGES: list[Any] = [{"role": "user", "content": "the fox"}]
MODELS = {"toy": None, "all": "all", "all2": "all2", "toy:all": "all"}


def test_models(client: openai.OpenAI) -> None:
    found = {model.id: model for model in client.models.list()}
    assert list(found) == ["toy", "all", "all2", "all8"]
    extra = {name: model.model_extra for name, model in found.items()}
    assert all(one is not None for one in extra.values())
    assert extra["toy"]["parent"] is None and extra["all"]["parent"] == "toy"  # type: ignore[index]
    assert client.models.retrieve("toy:all").id == "toy:all"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("none")
    assert caught.value.code == "model_not_found" and "all2" in str(caught.value)


@pytest.mark.parametrize("model", MODELS)
def test_a_chat_is_answered_as_the_engine_does(
    model: str, client: openai.OpenAI, alone: bedplate.Engine
) -> None:
    expected = alone.session(MODELS[model]).generate(MESSAGES, max_tokens=12)
    said = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=12, temperature=0)
    assert said.choices[0].message.content == expected and said.choices[0].finish_reason == "length"
    assert said.usage is not None and said.usage.completion_tokens == 12
    stream = client.chat.completions.create(
        model=model,
        messages=MESSAGES,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    pieces = list(stream)
    assert "".join(one.choices[0].delta.content or "" for one in pieces if one.choices) == expected
    assert pieces[-1].usage == said.usage.model_copy(
        update={"prompt_tokens_details": pieces[-1].usage.prompt_tokens_details}  # type: ignore[union-attr]
    )
    assert [one.choices[0].finish_reason for one in pieces if one.choices][-1] == "length"


def test_parts_are_one_text_where_the_template_knows_none(
    client: openai.OpenAI, alone: bedplate.Engine
) -> None:
    parts: Any = [{"type": "text", "text": "the fox"}, {"type": "text", "text": "a dog"}]
    for some, text in ((parts[:1], "the fox"), (parts, "the fox\na dog")):
        messages: Any = [{"role": "user", "content": some}]
        said = client.chat.completions.create(model="all", messages=messages, max_tokens=8, temperature=0)
        expected = alone.session("all").generate([{"role": "user", "content": text}], max_tokens=8)
        assert said.choices[0].message.content == expected


def test_parts_are_shown_to_a_template_that_reads_them(toy_bundle: bedplate.Bundle) -> None:
    source = "{% for m in messages %}{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endfor %}"
    tokenizer = Tokenizer(toy_bundle.tokenizer_file, chat_template=source, special_tokens={})
    parts = [TextPart(type="text", text="a"), TextPart(type="text", text="b")]
    shown = plain_messages(tokenizer, [ChatMessage(role="user", content=parts)])
    assert tokenizer.render(shown) == "[a][b]"


def test_n_answers_and_a_seed(client: openai.OpenAI, alone: bedplate.Engine) -> None:
    said = client.chat.completions.create(
        model="all", messages=MESSAGES, max_tokens=8, temperature=1, seed=7, n=4
    )
    texts = [choice.message.content for choice in said.choices]
    expected = [
        alone.session("all").generate(MESSAGES, max_tokens=8, temperature=1, seed=seed)
        for seed in range(7, 11)
    ]
    assert texts == expected and len(set(texts)) > 1


def test_logprobs(client: openai.OpenAI) -> None:
    said = client.chat.completions.create(
        model="all", messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = said.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content) == 4
    for one in logprobs.content:
        assert len(one.top_logprobs) == 3 and one.top_logprobs[0].logprob == one.logprob


def test_text(client: openai.OpenAI, alone: bedplate.Engine) -> None:
    prompts = ["the fox", "a dog"]
    expected = [alone.session("all").generate(prompt, max_tokens=6) for prompt in prompts]
    said = client.completions.create(model="all", prompt=prompts, max_tokens=6, temperature=0)
    assert [choice.text for choice in said.choices] == expected
    ids = alone.tokenizer.encode("the fox")
    said = client.completions.create(model="all", prompt=ids, max_tokens=6, temperature=0)
    assert said.choices[0].text == expected[0]


def test_scales_of_a_request(client: openai.OpenAI, alone: bedplate.Engine) -> None:
    mixed = {"all": 0.5, "all2": 1.5}
    expected = alone.session(mixed).generate(MESSAGES, max_tokens=12)
    lora = [{"id": name, "scale": scale} for name, scale in mixed.items()]
    said = client.chat.completions.create(
        model="toy", messages=MESSAGES, max_tokens=12, temperature=0, extra_body={"lora": lora}
    )
    assert said.choices[0].message.content == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", []),
        ("temperature", -1),
        ("temperature", "0"),
        ("n", 0),
        ("audio", {}),
        ("lora", [{"id": 5}]),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(client: openai.OpenAI, field: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="all", messages=MESSAGES, extra_body={field: value})
    assert caught.value.param is not None and caught.value.param.startswith(field)


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_is_a_400(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError, match="do not fit the context"):
        client.chat.completions.create(
            model="all", messages=[{"role": "user", "content": "fox " * 500}], stream=stream
        )
