"""What other people's packages do with the server."""

from __future__ import annotations

import asyncio
import gc
import json
import warnings
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

import bedplate

pytestmark = pytest.mark.slow

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


def langchain(address: str, model: str, by: str, **more: Any) -> ChatOpenAI:
    key: Any = "none"
    more |= {"use_responses_api": by == "responses", "max_retries": 0, "temperature": 0}
    return ChatOpenAI(model=model, base_url=f"{address}/v1", api_key=key, **more)


def run_agent(kind: Any, address: str, name: str, **more: Any) -> Any:
    async def ask() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            model = kind(name, provider=OpenAIProvider(openai_client=client))
            return await Agent(model, instructions="be brief", **more).run("the fox")

    return asyncio.run(ask())


@pytest.mark.parametrize("by", ["chat", "responses"])
def test_langchain(by: str, address: str, expected: str) -> None:
    chat = langchain(address, "all", by, max_completion_tokens=8)
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

        loop = asyncio.new_event_loop()  # it would make one, and leave it open
        asyncio.set_event_loop(loop)
        yield litellm
        with warnings.catch_warnings(action="ignore"):  # connections and tasks that it leaves
            asyncio.set_event_loop(None)
            loop.close()
            litellm.in_memory_llm_clients_cache.flush_cache()
            litellm.module_level_client.close()
            gc.collect()


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


@pytest.mark.parametrize("by", ["openai/scripted", "anthropic/scripted"])
def test_litellm_calls(by: str, litellm: Any, scripted_address: str) -> None:
    function = {"name": "look", "parameters": Where.model_json_schema()}
    base = scripted_address if by.startswith("anthropic") else f"{scripted_address}/v1"
    asked: dict[str, Any] = {"model": by, "api_key": "none", "api_base": base, "max_tokens": 256}
    asked["messages"] = [{"role": "user", "content": "where?"}]
    asked |= {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    (call,) = litellm.completion(**asked).choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("look", {"place": ""})
    pieces = list(litellm.completion(**asked, stream=True))
    whole = litellm.stream_chunk_builder(pieces).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert json.loads(whole.message.tool_calls[0].function.arguments) == {"place": ""}


@pytest.mark.parametrize("kind", [OpenAIChatModel, OpenAIResponsesModel])
def test_pydantic_ai(kind: Any, address: str, alone: bedplate.Engine) -> None:
    said = run_agent(kind, address, "all", model_settings={"max_tokens": 8, "temperature": 0})
    assert said.output == alone.session("all").generate(TALK[:2], max_tokens=8)
    assert said.usage.output_tokens == 8


class Where(BaseModel):
    """Look where something is."""

    model_config = ConfigDict(extra="forbid")  # what a model that is not able would add

    place: str


@pytest.mark.parametrize("by", ["chat", "responses"])
def test_langchain_calls_and_fills_in(by: str, scripted_address: str) -> None:
    chat = langchain(scripted_address, "scripted", by, max_completion_tokens=256)
    said = chat.bind_tools([Where], tool_choice="required").invoke("where?")
    (call,) = said.tool_calls
    assert (call["name"], call["args"]) == ("Where", {"place": ""})
    for method in ("json_schema", "function_calling"):
        assert chat.with_structured_output(Where, method=method).invoke("where?") == Where(place="")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [OpenAIChatModel, OpenAIResponsesModel])
@pytest.mark.parametrize("how", [ToolOutput, NativeOutput])
def test_pydantic_ai_fills_in(kind: Any, how: Any, scripted_address: str) -> None:
    said = run_agent(kind, scripted_address, "scripted", output_type=how(Where))
    assert said.output == Where(place="")


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
