"""What other people's packages do with the server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

import bedplate

TALK: list[Any] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the fox"},
    {"role": "assistant", "content": "jumps"},
    {"role": "user", "content": "where"},
]
LANGCHAIN = [SystemMessage("be brief"), HumanMessage("the fox"), AIMessage("jumps"), HumanMessage("where")]


@pytest.fixture(scope="module")
def expected(alone: bedplate.Engine) -> str:
    return alone.session("all").generate(TALK, max_tokens=8)


@pytest.mark.parametrize("by", ["chat", "responses"])
def test_langchain(by: str, address: str, expected: str) -> None:
    chat = ChatOpenAI(
        model="all",
        base_url=f"{address}/v1",
        api_key="none",  # type: ignore[arg-type]
        temperature=0,
        max_completion_tokens=8,
        max_retries=0,
        use_responses_api=by == "responses",
    )
    said = chat.invoke(LANGCHAIN)
    assert said.text == expected and said.usage_metadata is not None
    assert said.usage_metadata["output_tokens"] == 8
    pieces = list(chat.stream(LANGCHAIN))
    assert "".join(piece.text for piece in pieces) == expected and len(pieces) > 2


def test_langchain_text(address: str, alone: bedplate.Engine) -> None:
    text = OpenAI(model="all", base_url=f"{address}/v1", api_key="none", temperature=0, max_tokens=8)  # type: ignore[arg-type]
    expected = alone.session("all").generate("the fox", max_tokens=8)
    assert text.invoke("the fox") == expected == "".join(text.stream("the fox"))


@pytest.fixture(scope="module")
def litellm() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it would be fetched
        import litellm

        yield litellm


@pytest.mark.parametrize("by", ["openai/all", "anthropic/all", "text-completion-openai/all"])
def test_litellm(by: str, litellm: Any, address: str, expected: str, alone: bedplate.Engine) -> None:
    asked: dict[str, Any] = {"model": by, "messages": TALK, "max_tokens": 8, "temperature": 0}
    asked |= {"api_key": "none", "api_base": address if by.startswith("anthropic") else f"{address}/v1"}
    if by.startswith("text"):
        asked["messages"] = [{"role": "user", "content": "the fox"}]
        expected = alone.session("all").generate("the fox", max_tokens=8)
    said = litellm.completion(**asked)
    assert said.choices[0].message.content == expected
    assert (said.choices[0].finish_reason, said.usage.completion_tokens) == ("length", 8)
    pieces = [piece.choices[0].delta.content or "" for piece in litellm.completion(**asked, stream=True)]
    assert "".join(pieces) == expected


def test_litellm_tells_errors_by_class(litellm: Any, address: str) -> None:
    asked: dict[str, Any] = {
        "messages": TALK,
        "api_base": f"{address}/v1",
        "api_key": "none",
        "max_retries": 0,
    }
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(model="openai/none", **asked)
    with pytest.raises(litellm.BadRequestError, match="audio"):
        litellm.completion(model="openai/all", **asked, extra_body={"audio": {}})


@pytest.mark.parametrize("kind", [OpenAIChatModel, OpenAIResponsesModel])
def test_pydantic_ai(kind: Any, address: str, alone: bedplate.Engine) -> None:
    async def ask() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            model = kind("all", provider=OpenAIProvider(openai_client=client))
            settings: Any = {"max_tokens": 8, "temperature": 0}
            return await Agent(model, instructions="be brief", model_settings=settings).run("the fox")

    said = asyncio.run(ask())
    assert said.output == alone.session("all").generate(TALK[:2], max_tokens=8)
    assert said.usage.output_tokens == 8


def test_errors_of_the_official_client_by_class(client: openai.OpenAI) -> None:
    for call in (client.chat.completions.create, client.completions.create, client.responses.create):
        given = {"messages": TALK} if call == client.chat.completions.create else {"prompt": "fox"}
        given = {"input": "fox"} if call == client.responses.create else given
        with pytest.raises(openai.NotFoundError) as missing:
            call(model="none", **given)  # type: ignore[operator]
        assert missing.value.code == "model_not_found" and missing.value.param == "model"
        with pytest.raises(openai.BadRequestError) as wrong:
            call(model="all", **given, temperature=-1)  # type: ignore[operator]
        assert wrong.value.param == "temperature" and wrong.value.type == "invalid_request_error"
