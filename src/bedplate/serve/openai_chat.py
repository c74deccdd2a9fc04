"""OpenAI's `/v1/chat/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response

from bedplate.runtime.request import TokenLogprobs
from bedplate.runtime.tokenizer import Tokenizer
from bedplate.serve import logprobs, stream
from bedplate.serve.answers import Choice, timings, usage
from bedplate.serve.api import GENERATES, JSON, SSE, Api, post
from bedplate.serve.catalog import Model
from bedplate.serve.chat import Answer, Chat, ChatRequest, Delta
from bedplate.serve.described import ChatCompletion
from bedplate.serve.errors import ApiError, named
from bedplate.serve.limits import Place
from bedplate.serve.server import Server
from bedplate.serve.told import Told, answered
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
        names = {"prompt": "messages"}
        if asked.max_tokens is None:
            names["max_tokens"] = "max_completion_tokens"
        with named(names):
            return await answered(server, request, asked, _Told)

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


class _Told(Told):
    def __init__(self, asked: ChatCompletionRequest, model: Model, place: Place) -> None:
        self._asked, self._chat, self._tokenizer = asked, Chat(model, asked, place), model.tokenizer
        self.choices = self._chat.choices
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}

    async def whole(self) -> Json:
        choices = [_choice(one, self._tokenizer) for one in await self._chat.answers()]
        return {**self._head, "object": "chat.completion", "choices": choices, **self._counted()}

    async def lines(self) -> AsyncGenerator[str]:
        for choice in self.choices:
            yield self._piece(choice, {"role": "assistant", "content": ""})
        async with aclosing(self._chat.deltas()) as deltas:
            async for delta in deltas:
                known = _logprobs(delta.logprobs, self._tokenizer)
                yield self._piece(delta.choice, _said(delta), known, delta.finish)
        if self._asked.tells_usage:
            yield self._line([], **self._counted())
        yield stream.DONE

    def _piece(
        self, choice: Choice, delta: Json, known: Json | None = None, finish: str | None = None
    ) -> str:
        one = {"index": choice.index, "delta": delta, "logprobs": known, "finish_reason": finish}
        return self._line([one], **({"usage": None} if self._asked.tells_usage else {}))

    def _line(self, choices: list[Json], **counted: Any) -> str:
        return stream.data({**self._head, "object": "chat.completion.chunk", "choices": choices, **counted})

    def _counted(self) -> Json:
        return {"usage": usage(self.choices, self._asked.n), "timings": timings(self.choices)}


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
