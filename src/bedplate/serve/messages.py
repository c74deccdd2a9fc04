"""Anthropic's `/v1/messages` and `/v1/messages/count_tokens`, for text."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bedplate.errors import BedplateError
from bedplate.serve import stream
from bedplate.serve.answers import timings, usage
from bedplate.serve.api import GENERATES, JSON, OF_BODY, SSE, UNKNOWN_MODEL, Api
from bedplate.serve.catalog import Model
from bedplate.serve.chat import Answer, Chat, Delta, count
from bedplate.serve.described import AnthropicError, MessageBegun, TokenCount
from bedplate.serve.errors import ApiError, api_error_of, named
from bedplate.serve.limits import Place
from bedplate.serve.messages_request import NAMES, Conversation, MessagesRequest, as_chat, counted
from bedplate.serve.server import Server, body_of
from bedplate.serve.told import Told, answered
from bedplate.serve.tools import Call, CallPiece
from bedplate.serve.wire import not_finite

Json = dict[str, Any]


def routes(server: Server) -> list[Api]:
    async def answer(request: Request) -> Response:
        asked = await body_of(request, MessagesRequest)
        with named(NAMES):
            return await answered(server, request, asked, _Told)

    async def tell_count(request: Request) -> Response:
        asked = await body_of(request, Conversation)
        with named(NAMES):
            return await _count(server, request, asked)

    return [
        Api(
            "POST",
            "/v1/messages",
            _in_its_words(answer),
            "An answer to a conversation, in the words of Anthropic's Messages",
            body=MessagesRequest,
            said=MessageBegun,
            media=(JSON, SSE),
            errors={*OF_BODY, *GENERATES},
            fault=AnthropicError,
        ),
        Api(
            "POST",
            "/v1/messages/count_tokens",
            _in_its_words(tell_count),
            "How many tokens a conversation has",
            body=Conversation,
            said=TokenCount,
            errors={*OF_BODY, *UNKNOWN_MODEL},
            fault=AnthropicError,
        ),
    ]


def _in_its_words(
    answer: Callable[[Request], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    """As Anthropic answers: also errors have a `request-id`."""

    async def endpoint(request: Request) -> Response:
        id = f"req_{uuid.uuid4().hex}"
        try:
            response = await answer(request)
        except (ApiError, BedplateError) as error:
            response = _refused(api_error_of(error), id)
        response.headers["request-id"] = id
        return response

    return endpoint


def _refused(error: ApiError, id: str) -> Response:
    return JSONResponse(error.in_anthropics_words(id), status_code=error.status, headers=error.headers)


async def _count(server: Server, request: Request, asked: Conversation) -> Response:
    model = server.model(request, asked.model, asked.lora)
    async with server.counting:
        tokens = await run_in_threadpool(count, model, counted(asked), server.settings.max_prompt)
    return JSONResponse({"input_tokens": tokens})


def _head(asked: MessagesRequest) -> Json:
    """What is known before the answer begins."""
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": asked.model,
        "content": [],
        "container": None,
        "stop_details": None,
        "stop_reason": None,
        "stop_sequence": None,
    }


def _usage(chat: Chat) -> Json:
    """Tokens that the cache had are not among the input's."""
    found = usage(chat.choices, 1)
    cached = found["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": found["prompt_tokens"] - cached,
        "output_tokens": found["completion_tokens"],
        "cache_creation": None,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "inference_geo": None,
        "output_tokens_details": None,
        "server_tool_use": None,
        "service_tier": "standard",
    }


def _stopped(chat: Chat, finish: str) -> Json:
    """Why an answer has ended."""
    by = chat.choices[0].stats.stopped_by
    reasons = {"length": "max_tokens", "tool_calls": "tool_use"}
    reason = reasons.get(finish, "stop_sequence" if isinstance(by, str) else "end_turn")
    return {"stop_reason": reason, "stop_sequence": by if reason == "stop_sequence" else None}


def _content(answer: Answer) -> list[Json]:
    text = [{"type": "text", "text": answer.text, "citations": None}] if answer.text else []
    return [*text, *(_tool_use(one.id, one.name, _input(one)) for one in answer.calls)]


def _input(call: Call) -> Json:
    """ApiError: its arguments cannot be told as JSON, as a client reads it."""
    try:
        read: Json = json.loads(call.arguments)
        json.dumps(read)  # which goes as deep
        if not_finite(read) is None:
            return read
    except (ValueError, RecursionError):
        pass
    what = f"The model called {call.name!r} with a number, or with levels, that are too much for JSON."
    raise ApiError(400, what, param="tools")


def _tool_use(id: str, name: str, input: Json) -> Json:
    return {"type": "tool_use", "id": id, "name": name, "input": input, "caller": {"type": "direct"}}


class _Told(Told):
    """In events, text and each call are a block: one is open at a time."""

    def __init__(self, asked: MessagesRequest, model: Model, place: Place) -> None:
        self._asked, self._chat = asked, Chat(model, as_chat(asked), place)
        self.choices = self._chat.choices
        self._index = -1
        self._open: str | None = None
        self._position: int | None = None  # of the call that is open

    async def whole(self) -> Json:
        (answer,) = await self._chat.answers()
        ended = {**_stopped(self._chat, answer.finish), "usage": _usage(self._chat)}
        return {
            **_head(self._asked),
            "content": _content(answer),
            **ended,
            "timings": timings(self.choices),
        }

    async def lines(self) -> AsyncGenerator[str]:
        head = {**_head(self._asked), "usage": {**_usage(self._chat), "output_tokens": 0}}
        yield _say("message_start", message=head)
        yield _say("ping")
        finish = "stop"
        async with aclosing(self._chat.deltas()) as deltas:
            async for delta in deltas:
                finish = delta.finish or finish
                for line in self._told(delta):
                    yield line
        for line in self._closed():
            yield line
        stopped = {**_stopped(self._chat, finish), "container": None, "stop_details": None}
        yield _say("message_delta", delta=stopped, usage=_usage(self._chat))
        yield _say("message_stop")

    def failed(self, error: ApiError) -> str:
        return stream.data(error.in_anthropics_words(), "error")

    def _told(self, delta: Delta) -> Iterator[str]:
        if delta.text:
            if self._open != "text":
                yield from self._opened({"type": "text", "text": "", "citations": None})
            yield self._piece({"type": "text_delta", "text": delta.text})
        if delta.call is not None:
            yield from self._called(delta.call)

    def _called(self, piece: CallPiece) -> Iterator[str]:
        if self._position != piece.position:
            yield from self._opened(_tool_use(piece.id, piece.name or "", {}))
            self._position = piece.position
        if piece.arguments:
            yield self._piece({"type": "input_json_delta", "partial_json": piece.arguments})

    def _opened(self, block: Json) -> Iterator[str]:
        yield from self._closed()
        self._index += 1
        self._open = block["type"]
        yield _say("content_block_start", index=self._index, content_block=block)

    def _closed(self) -> Iterator[str]:
        if self._open is not None:
            self._open, self._position = None, None
            yield _say("content_block_stop", index=self._index)

    def _piece(self, delta: Json) -> str:
        return _say("content_block_delta", index=self._index, delta=delta)


def _say(event: str, **fields: Any) -> str:
    return stream.data({"type": event, **fields}, event)
