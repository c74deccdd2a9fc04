"""`/v1/models`, `/tokenize`, `/detokenize`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bedplate.serve.api import UNKNOWN_MODEL, Api, get, post
from bedplate.serve.catalog import Model
from bedplate.serve.chat import MOST_MESSAGES, ChatMessage, plain_messages
from bedplate.serve.described import ModelCard, ModelCards, Text, Tokens
from bedplate.serve.errors import ApiError, about
from bedplate.serve.lengths import check_known, check_length
from bedplate.serve.server import Server
from bedplate.serve.tools import prompt_of
from bedplate.serve.wire import Strict, TokenId


class TokenizeRequest(Strict):
    """`/tokenize`: of a text, or of a conversation."""

    model: str
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(max_length=MOST_MESSAGES)] | None = None


class DetokenizeRequest(Strict):
    """`/detokenize`."""

    model: str
    tokens: list[TokenId]


def routes(server: Server) -> list[Api]:
    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": server.catalog.cards()})

    async def model(request: Request) -> Response:
        return JSONResponse(server.catalog.card(request.path_params["name"]))

    async def tokenize(request: Request, body: TokenizeRequest) -> Response:
        return await _tokenize(server, request, body)

    async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
        model = server.model(request, body.model)
        # In a thread also the tokenizer is found, which may wait for weights that load.
        prompt = await run_in_threadpool(_decoded, model, body.tokens)
        return JSONResponse({"prompt": prompt})

    return [
        get("/v1/models", models, "All models: bases and adapters", said=ModelCards),
        get("/v1/models/{name:path}", model, "One model", said=ModelCard, errors=UNKNOWN_MODEL),
        post(
            "/tokenize",
            TokenizeRequest,
            tokenize,
            "The tokens of a text, or of a conversation",
            said=Tokens,
            errors=UNKNOWN_MODEL,
        ),
        post(
            "/detokenize",
            DetokenizeRequest,
            detokenize,
            "The text of tokens",
            said=Text,
            errors=UNKNOWN_MODEL,
        ),
    ]


async def _tokenize(server: Server, request: Request, body: TokenizeRequest) -> Response:
    model = server.model(request, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "Give prompt or messages, and not both.", param="prompt")
    async with server.counting:
        tokens = await run_in_threadpool(_encoded, model, body, server.settings.max_prompt)
    most = model.base.engine.limits.max_context
    return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": most})


def _decoded(model: Model, tokens: list[int]) -> str:
    check_length(model, tokens, None, param="tokens")
    check_known(model, tokens, "tokens")
    return model.tokenizer.decode(tokens)


def _encoded(model: Model, body: TokenizeRequest, most: int | None) -> list[int]:
    if body.prompt is not None:
        with about("prompt"):
            check_length(model, body.prompt, most)
            return model.tokenizer.encode(body.prompt)
    with about("messages"):
        messages = plain_messages(model.tokenizer, body.messages or ())
        conversation = prompt_of(model.tokenizer, messages, [])
        check_length(model, conversation, most, param="messages")
        return model.tokenizer.encode_chat(conversation)
