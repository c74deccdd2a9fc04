"""OpenAI's `/v1/responses`, for text."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from bedplate.serve import logprobs, stream
from bedplate.serve.answers import timings, usage
from bedplate.serve.api import GENERATES, JSON, OF_BODY, SSE, Api
from bedplate.serve.catalog import Model
from bedplate.serve.chat import Chat, Delta
from bedplate.serve.described import ResponseBegun
from bedplate.serve.errors import ApiError, named
from bedplate.serve.limits import Place
from bedplate.serve.responses_request import NAMES, ResponsesRequest, as_chat
from bedplate.serve.server import Server, body_of
from bedplate.serve.told import Told, answered
from bedplate.serve.tools import CallPiece

Json = dict[str, Any]


def routes(server: Server) -> list[Api]:
    async def answer(request: Request) -> Response:
        asked = await body_of(request, ResponsesRequest)
        with named(NAMES):
            return await answered(server, request, asked, _Told)

    return [
        Api(
            "POST",
            "/v1/responses",
            answer,
            "Answers to a conversation, in the words of OpenAI's Responses",
            body=ResponsesRequest,
            said=ResponseBegun,
            media=(JSON, SSE),
            errors={*OF_BODY, *GENERATES},
        )
    ]


def _head(asked: ResponsesRequest) -> Json:
    """What is known before the answer begins."""
    form = asked.text.format
    return {
        "id": _id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "frequency_penalty": asked.frequency_penalty,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "max_tool_calls": asked.max_tool_calls,
        "metadata": asked.metadata or {},
        "model": asked.model,
        "output": [],
        "parallel_tool_calls": asked.parallel_tool_calls,
        "presence_penalty": asked.presence_penalty,
        "previous_response_id": None,
        "prompt_cache_key": asked.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": asked.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": asked.temperature,
        "text": {
            "format": {"type": "text"} if form is None else form.model_dump(exclude_none=True, by_alias=True),
            "verbosity": "medium",
        },
        "tool_choice": asked.tool_choice
        if isinstance(asked.tool_choice, str)
        else asked.tool_choice.model_dump(),
        "tools": [tool.model_dump() for tool in asked.tools],
        "top_logprobs": asked.top_logprobs or 0,
        "top_p": asked.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": asked.user,
    }


def _ended(asked: ResponsesRequest, chat: Chat, head: Json, finish: str, output: list[Json]) -> Json:
    """The response when its answer has ended."""
    cut = finish == "length"
    counted = usage(chat.choices, 1)
    return {
        **head,
        "completed_at": None if cut else int(time.time()),
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": output,
        "usage": {
            "input_tokens": counted["prompt_tokens"],
            "input_tokens_details": {**counted["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": counted["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counted["total_tokens"],
        },
        "timings": timings(chat.choices),
    }


def _message() -> Json:
    return {
        "id": _id("msg"),
        "type": "message",
        "status": "in_progress",
        "role": "assistant",
        "content": [],
    }


def _call(call_id: str, name: str) -> Json:
    head = {"id": _id("fc"), "type": "function_call", "status": "in_progress", "call_id": call_id}
    return {**head, "name": name, "arguments": ""}


def _id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


class _Told(Told):
    """Events, of which the last one has the whole response. Text and each call are an item: one is open at a time, and
    only the last one can be incomplete.
    """

    def __init__(self, asked: ResponsesRequest, model: Model, place: Place) -> None:
        self._asked, self._chat = asked, Chat(model, as_chat(asked), place)
        self.choices = self._chat.choices
        self._head = _head(asked)
        self._number = 0
        self._done: list[Json] = []
        self._open: Json | None = None
        self._position: int | None = None  # of the call that is open
        self._logprobs: list[Json] = []  # that are not told yet

    async def whole(self) -> Json:
        last: Json = {}
        async with aclosing(self._events()) as events:
            async for event in events:
                last = event
        response: Json = last["response"]
        return response

    async def lines(self) -> AsyncGenerator[str]:
        async with aclosing(self._events()) as events:
            async for event in events:
                yield stream.data(event, event["type"])

    async def _events(self) -> AsyncGenerator[Json]:
        yield self._say("response.created", response=self._head)
        yield self._say("response.in_progress", response=self._head)
        finish = "stop"
        async with aclosing(self._chat.deltas()) as deltas:
            async for delta in deltas:
                finish = delta.finish or finish
                for event in self._told(delta):
                    yield event
        if self._open is None and not self._done:
            for event in self._opened(_message()):
                yield event
        is_call = self._open is not None and self._open["type"] == "function_call"
        cut = self._chat.is_cut(self.choices[0]) if is_call else finish == "length"
        for event in self._closed("incomplete" if cut else "completed"):
            yield event
        last = _ended(self._asked, self._chat, self._head, finish, self._done)
        yield self._say(f"response.{last['status']}", response=last)

    def _told(self, delta: Delta) -> Iterator[Json]:
        in_message = self._open is not None and self._open["type"] == "message"
        self._logprobs += logprobs.of_chat(delta.logprobs or (), self._chat.model.tokenizer)
        if delta.text or (self._logprobs and in_message):
            if not in_message:
                yield from self._closed("completed")
                yield from self._opened(_message())
            assert self._open is not None
            part = self._open["content"][0]
            known, self._logprobs = self._logprobs, []
            part["text"] += delta.text
            part["logprobs"] += known
            yield self._of_part("response.output_text.delta", delta=delta.text, logprobs=known)
        if delta.call is not None:
            yield from self._called(delta.call)

    def _called(self, piece: CallPiece) -> Iterator[Json]:
        if self._position != piece.position:
            yield from self._closed("completed")
            self._position = piece.position
            self._logprobs = []
            yield from self._opened(_call(piece.id, piece.name or ""))
        assert self._open is not None
        if piece.arguments:
            self._open["arguments"] += piece.arguments
            yield self._of_item("response.function_call_arguments.delta", delta=piece.arguments)

    def _opened(self, item: Json) -> Iterator[Json]:
        self._open = item
        yield self._say("response.output_item.added", output_index=len(self._done), item=item)
        if item["type"] == "message":
            item["content"] = [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]
            yield self._of_part("response.content_part.added", part=item["content"][0])

    def _closed(self, status: str) -> Iterator[Json]:
        item, self._position = self._open, None
        if item is None:
            return
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            part["logprobs"] += self._logprobs
            yield self._of_part("response.output_text.done", text=part["text"], logprobs=part["logprobs"])
            yield self._of_part("response.content_part.done", part=part)
        else:
            told = {"name": item["name"], "arguments": item["arguments"]}
            yield self._of_item("response.function_call_arguments.done", **told)
        yield self._say("response.output_item.done", output_index=len(self._done), item=item)
        self._done.append(item)
        self._open = None

    def failed(self, error: ApiError) -> str:
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        last = {**self._head, "status": "failed", "error": {"code": code, "message": error.message}}
        event = self._say("response.failed", response={**last, "output": self._done})
        return stream.data(event, event["type"])

    def _of_part(self, event: str, **fields: Any) -> Json:
        return self._of_item(event, content_index=0, **fields)

    def _of_item(self, event: str, **fields: Any) -> Json:
        assert self._open is not None
        return self._say(event, item_id=self._open["id"], output_index=len(self._done), **fields)

    def _say(self, event: str, **fields: Any) -> Json:
        number, self._number = self._number, self._number + 1
        return {"type": event, "sequence_number": number, **fields}
