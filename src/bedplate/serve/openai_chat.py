"""OpenAI's `/v1/chat/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Literal

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bedplate.runtime.request import TokenLogprobs
from bedplate.runtime.tokenizer import Tokenizer
from bedplate.serve import logprobs, stream
from bedplate.serve.answers import Choice, timings, usage
from bedplate.serve.api import GENERATES, JSON, SSE, Api, post
from bedplate.serve.chat import Answer, Chat, ChatRequest, Delta
from bedplate.serve.described import ChatCompletion
from bedplate.serve.errors import ApiError
from bedplate.serve.server import Server
from bedplate.serve.wire import Accepted

Json = dict[str, Any]


class ChatCompletionRequest(ChatRequest, Accepted):
    """`/v1/chat/completions`. modalities and verbosity: as they are."""

    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs: it needs logprobs.", param="top_logprobs")
        most = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(most) > 1:
            raise ApiError(400, "max_tokens: it is not max_completion_tokens.", param="max_tokens")


def routes(server: Server) -> list[Api]:
    async def answer(request: Request, asked: ChatCompletionRequest) -> Response:
        return await _answer(server, request, asked)

    return [
        post(
            "/v1/chat/completions",
            ChatCompletionRequest,
            answer,
            "Answers to a conversation",
            said=ChatCompletion,
            media=(JSON, SSE),
            errors=GENERATES,
        )
    ]


async def _answer(server: Server, request: Request, asked: ChatCompletionRequest) -> Response:
    asked.check()
    model = server.catalog.find(asked.model, asked.lora)
    async with server.ticket(request, model, asked, asked.n) as ticket:
        chat = await run_in_threadpool(Chat, model, asked, ticket.place)
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
    message: Json = {"role": "assistant", "content": answer.text, "refusal": None, "annotations": []}
    if answer.calls:
        message["content"] = answer.text or None
        message["tool_calls"] = [_call(one.id, one.name, one.arguments) for one in answer.calls]
    return {
        "index": answer.choice.index,
        "message": message,
        "logprobs": _logprobs(answer.logprobs, tokenizer),
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
            yield piece(delta.choice, _said(delta), _logprobs(delta.logprobs, tokenizer), delta.finish)
    if request.tells_usage:
        last = {"usage": usage(chat.choices, request.n), "timings": timings(chat.choices)}
        yield stream.data({**head, "choices": [], **last})
    yield stream.DONE


def _said(delta: Delta) -> Json:
    said: Json = {"content": delta.text} if delta.text else {}
    piece = delta.call
    if piece is None:
        return said
    if piece.name is not None:
        begun = _call(piece.id, piece.name, piece.arguments)
        return {**said, "tool_calls": [{"index": piece.position, **begun}]}
    more = {"index": piece.position, "function": {"arguments": piece.arguments}}
    return {**said, "tool_calls": [more]}


def _call(id: str, name: str, arguments: str) -> Json:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _logprobs(said: Sequence[TokenLogprobs] | None, tokenizer: Tokenizer) -> Json | None:
    return None if said is None else {"content": logprobs.of_chat(said, tokenizer), "refusal": None}
