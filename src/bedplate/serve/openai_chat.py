"""OpenAI's `/v1/chat/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bedplate.runtime.request import TokenLogprobs
from bedplate.runtime.tokenizer import Tokenizer
from bedplate.serve import stream
from bedplate.serve.answers import Choice, timings, usage
from bedplate.serve.chat import Answer, Chat, ChatRequest, Delta
from bedplate.serve.server import Server, body_of

Json = dict[str, Any]


def routes(server: Server) -> list[Route]:
    async def answer(request: Request) -> Response:
        return await _answer(server, request)

    return [Route("/v1/chat/completions", answer, methods=["POST"])]


async def _answer(server: Server, request: Request) -> Response:
    asked = await body_of(request, ChatRequest)
    model = server.catalog.find(asked.model, asked.lora)
    async with server.ticket(request, model, asked.user) as ticket:
        chat = Chat(model, asked, ticket.key)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
        if asked.stream:
            return await ticket.stream(_pieces(chat, head), chat.choices)
        answers = await ticket.whole(chat.answers())
        return JSONResponse(
            {
                **head,
                "object": "chat.completion",
                "choices": [_choice(one, model.tokenizer) for one in answers],
                "usage": usage(chat.choices, asked.n),
                "timings": timings(chat.choices),
            }
        )


def _choice(answer: Answer, tokenizer: Tokenizer) -> Json:
    content = None if answer.calls and not answer.text else answer.text
    message: Json = {"role": "assistant", "content": content, "refusal": None, "annotations": []}
    if answer.calls:
        message["tool_calls"] = [
            {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
            for id, name, arguments in answer.calls
        ]
    return {
        "index": answer.choice.index,
        "message": message,
        "logprobs": chat_logprobs(answer.logprobs, tokenizer),
        "finish_reason": answer.finish,
    }


async def _pieces(chat: Chat, head: Json) -> AsyncGenerator[str]:
    request, tokenizer = chat.request, chat.model.tokenizer
    head = {**head, "object": "chat.completion.chunk"}

    def piece(choice: Choice, delta: Json, logprobs: Json | None = None, finish: str | None = None) -> str:
        one = {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return stream.data({**head, "choices": [one], **({"usage": None} if request.tells_usage else {})})

    for choice in chat.choices:
        yield piece(choice, {"role": "assistant", "content": ""})
    async with aclosing(chat.deltas()) as deltas:
        async for delta in deltas:
            yield piece(delta.choice, _said(delta), chat_logprobs(delta.logprobs, tokenizer), delta.finish)
    if request.tells_usage:
        last = {"usage": usage(chat.choices, request.n), "timings": timings(chat.choices)}
        yield stream.data({**head, "choices": [], **last})
    yield stream.DONE


def _said(delta: Delta) -> Json:
    if delta.call is None:
        return {"content": delta.text} if delta.text else {}
    position, id, name, arguments = delta.call
    if name is None:
        return {"tool_calls": [{"index": position, "function": {"arguments": arguments}}]}
    called = {"name": name, "arguments": arguments}
    return {"tool_calls": [{"index": position, "id": id, "type": "function", "function": called}]}


def chat_logprobs(logprobs: Sequence[TokenLogprobs] | None, tokenizer: Tokenizer) -> Json | None:
    """As chat completions and responses give them."""
    if logprobs is None:
        return None
    return {"content": [_token(one, tokenizer) for one in logprobs], "refusal": None}


def _token(one: TokenLogprobs, tokenizer: Tokenizer) -> Json:
    top = [_named(token, value, tokenizer) for token, value in one.top]
    return {**_named(one.token, one.logprob, tokenizer), "top_logprobs": top}


def _named(token: int, logprob: float, tokenizer: Tokenizer) -> Json:
    text = tokenizer.decode([token])
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
