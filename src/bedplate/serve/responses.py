"""OpenAI's `/v1/responses`, for text."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bedplate.runtime.request import TokenLogprobs
from bedplate.serve import logprobs, stream
from bedplate.serve.answers import timings, usage
from bedplate.serve.api import GENERATES, JSON, OF_BODY, SSE, Api
from bedplate.serve.as_chat import named
from bedplate.serve.chat import Answer, Chat, Delta
from bedplate.serve.described import ResponseBegun
from bedplate.serve.errors import ApiError, api_error_of
from bedplate.serve.responses_request import NAMES, ResponsesRequest, as_chat
from bedplate.serve.server import Server, body_of
from bedplate.serve.tools import CallPiece

Json = dict[str, Any]


def routes(server: Server) -> list[Api]:
    async def answer(request: Request) -> Response:
        with named(NAMES):
            return await _answer(server, request)

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


async def _answer(server: Server, request: Request) -> Response:
    asked = await body_of(request, ResponsesRequest)
    asked.check()
    model = server.catalog.find(asked.model, asked.lora)
    async with server.ticket(request, model, asked) as ticket:
        chat = await run_in_threadpool(Chat, model, as_chat(asked), ticket.place)
        if asked.stream:
            return await ticket.stream(_Told(asked, chat).lines(), chat.choices)
        (answered,) = await ticket.whole(chat.answers())
        return JSONResponse(
            _ended(asked, chat, _head(asked), answered.finish, _output(asked, answered, chat))
        )


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


def _output(asked: ResponsesRequest, answer: Answer, chat: Chat) -> list[Json]:
    status = _status(answer.finish)
    calls = [_call(_id("fc"), one.id, one.name, one.arguments, status) for one in answer.calls]
    if calls and not answer.text:
        return calls
    return [_message(_id("msg"), status, [_part(answer.text, _logprobs(answer.logprobs, chat))]), *calls]


def _status(finish: str) -> str:
    return "incomplete" if finish == "length" else "completed"


def _message(id: str, status: str, content: list[Json]) -> Json:
    return {"id": id, "type": "message", "status": status, "role": "assistant", "content": content}


def _part(text: str, known: list[Json]) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": known}


def _call(id: str, call_id: str, name: str, arguments: str, status: str) -> Json:
    head = {"id": id, "type": "function_call", "status": status, "call_id": call_id}
    return {**head, "name": name, "arguments": arguments}


def _logprobs(said: tuple[TokenLogprobs, ...] | None, chat: Chat) -> list[Json]:
    return logprobs.of_chat(said or (), chat.model.tokenizer)


def _id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


class _Told:
    """A response that is told in events. Text and each call are an item: one is open at a time."""

    def __init__(self, asked: ResponsesRequest, chat: Chat) -> None:
        self._asked, self._chat = asked, chat
        self._head = _head(asked)
        self._number = 0
        self._done: list[Json] = []
        self._open: Json | None = None
        self._position: int | None = None  # of the call that is open
        self._logprobs: list[Json] = []

    async def lines(self) -> AsyncGenerator[str]:
        yield self._say("response.created", response=self._head)
        yield self._say("response.in_progress", response=self._head)
        finish = "stop"
        try:
            async with aclosing(self._chat.deltas()) as deltas:
                async for delta in deltas:
                    finish = delta.finish or finish
                    for line in self._told(delta):
                        yield line
        except Exception as error:
            yield self._failed(api_error_of(error))
            return
        if self._open is None and not self._done:
            for line in self._opened(_message(_id("msg"), "in_progress", [])):
                yield line
        for line in self._closed(_status(finish)):
            yield line
        last = _ended(self._asked, self._chat, self._head, finish, self._done)
        yield self._say(f"response.{last['status']}", response=last)

    def _told(self, delta: Delta) -> Iterator[str]:
        in_message = self._open is not None and self._open["type"] == "message"
        if delta.text or (delta.logprobs and in_message):
            if not in_message:
                yield from self._closed("completed")
                yield from self._opened(_message(_id("msg"), "in_progress", []))
            known = _logprobs(delta.logprobs, self._chat)
            self._logprobs += known
            part = self._open["content"][0]  # type: ignore[index]
            part["text"] += delta.text
            yield self._of_part("response.output_text.delta", delta=delta.text, logprobs=known)
        if delta.call is not None:
            yield from self._called(delta.call)

    def _called(self, piece: CallPiece) -> Iterator[str]:
        if self._position != piece.position:
            yield from self._closed("completed")
            self._position = piece.position
            yield from self._opened(_call(_id("fc"), piece.id, piece.name or "", "", "in_progress"))
        assert self._open is not None
        if piece.arguments:
            self._open["arguments"] += piece.arguments
            yield self._of_item("response.function_call_arguments.delta", delta=piece.arguments)

    def _opened(self, item: Json) -> Iterator[str]:
        self._open = item
        yield self._say("response.output_item.added", output_index=len(self._done), item=item)
        if item["type"] == "message":
            item["content"] = [_part("", [])]
            yield self._of_part("response.content_part.added", part=item["content"][0])

    def _closed(self, status: str) -> Iterator[str]:
        item, self._position = self._open, None
        if item is None:
            return
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            part["logprobs"], self._logprobs = self._logprobs, []
            yield self._of_part("response.output_text.done", text=part["text"], logprobs=part["logprobs"])
            yield self._of_part("response.content_part.done", part=part)
        else:
            told = {"name": item["name"], "arguments": item["arguments"]}
            yield self._of_item("response.function_call_arguments.done", **told)
        yield self._say("response.output_item.done", output_index=len(self._done), item=item)
        self._done.append(item)
        self._open = None

    def _failed(self, error: ApiError) -> str:
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        last = {**self._head, "status": "failed", "error": {"code": code, "message": error.message}}
        return self._say("response.failed", response={**last, "output": self._done})

    def _of_part(self, event: str, **fields: Any) -> str:
        return self._of_item(event, content_index=0, **fields)

    def _of_item(self, event: str, **fields: Any) -> str:
        assert self._open is not None
        return self._say(event, item_id=self._open["id"], output_index=len(self._done), **fields)

    def _say(self, event: str, **fields: Any) -> str:
        number, self._number = self._number, self._number + 1
        return stream.data({"type": event, "sequence_number": number, **fields}, event)
