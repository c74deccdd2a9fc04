"""A conversation and its answers, whatever API they come by.

The APIs of chat make a `ChatRequest` of what they get, and say the `Delta`s of its answers in their own words.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from bedplate.runtime.messages import Conversation
from bedplate.runtime.request import Event, TokenLogprobs
from bedplate.runtime.tokenizer import Tokenizer
from bedplate.serve.answers import Choice, Wanted, begin, merged
from bedplate.serve.calls import CallReader
from bedplate.serve.catalog import Model
from bedplate.serve.errors import ApiError, about
from bedplate.serve.lengths import check_length
from bedplate.serve.limits import Place
from bedplate.serve.options import sampling_options
from bedplate.serve.structured import Constrained, grammar_of, guide_of
from bedplate.serve.template_reads import Reads, reads_of
from bedplate.serve.tools import Call, Calling, CallPiece, MadeCall, Tool, ToolChoice, calling_of, prompt_of
from bedplate.serve.wire import Part, Strict

MOST_MESSAGES = 2048  # or parts of one


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Part):
    """A turn. Other fields go to the chat template as they are: see `plain_messages`.

    is_error: of the role `tool`: the call has failed.
    """

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str | Annotated[list[TextPart], Field(max_length=MOST_MESSAGES)] | None = None
    is_error: bool | None = None
    tool_calls: Annotated[list[MadeCall], Field(max_length=MOST_MESSAGES)] | None = None


class ChatRequest(Constrained):
    """`/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True


class Delta(NamedTuple):
    """What an answer says next: text, or a piece of a call.

    finish: why it has ended, as OpenAI names the reasons: "stop", "length", "tool_calls". It is in the last one.
    """

    choice: Choice
    text: str
    logprobs: tuple[TokenLogprobs, ...] | None
    finish: str | None
    call: CallPiece | None = None


class Answer(NamedTuple):
    """A whole answer."""

    choice: Choice
    text: str
    logprobs: tuple[TokenLogprobs, ...] | None
    finish: str
    calls: tuple[Call, ...] = ()


class Chat:
    """A conversation that is being answered. It is made in a thread: another process may read its chat template.

    ApiError: a field of the request is not honoured.
    """

    def __init__(self, model: Model, request: ChatRequest, place: Place) -> None:
        self.model, self.request = model, request
        wanted, calling = grammar_of(request), _calling(model, request)
        self.choices = begin(
            Wanted(
                model=model,
                place=place,
                prompts=[_read(model, request, calling)],
                n=request.n,
                max_tokens=request.max_completion_tokens or request.max_tokens,
                logprobs=(request.top_logprobs or 0) if request.logprobs else None,
                cache_salt=request.cache_salt,
                seed=request.seed,
                options=sampling_options(model, request),
                mask=guide_of(model, request, calling.grammar(wanted) if calling else wanted),
            )
        )
        self._readers = (
            [CallReader(calling.form, calling.must_call) for _ in self.choices] if calling else None
        )

    async def deltas(self) -> AsyncGenerator[Delta]:
        """What its answers say, as it comes."""
        async with aclosing(merged(self.choices)) as events:
            async for choice, event in events:
                for delta in self._deltas(choice, event):
                    yield delta

    def _deltas(self, choice: Choice, event: Event) -> list[Delta]:
        """Of an event. The first has what is known of its tokens, the last has the reason of the end."""
        finish = None if event.finish_reason is None else choice.finish
        if self._readers is None:
            return [Delta(choice, event.text, event.logprobs, finish)]
        reader = self._readers[choice.index]
        parts = reader.read(event.text, event.tokens)
        if finish is not None:
            parts += reader.finish()
            finish = "tool_calls" if finish == "stop" and reader.count and reader.is_whole else finish
        if not parts and (finish is not None or event.logprobs):
            parts = [""]
        made = [
            Delta(choice, part, None, None) if isinstance(part, str) else Delta(choice, "", None, None, part)
            for part in parts
        ]
        if made:
            made[0] = made[0]._replace(logprobs=event.logprobs)
            made[-1] = made[-1]._replace(finish=finish)
        return made

    async def answers(self) -> list[Answer]:
        """All of them, when they have ended. A call that was cut is in none: nobody can make it."""
        said: dict[int, list[Delta]] = {choice.index: [] for choice in self.choices}
        async with aclosing(self.deltas()) as deltas:
            async for delta in deltas:
                said[delta.choice.index].append(delta)
        return [_whole(choice, said[choice.index], self.is_cut(choice)) for choice in self.choices]

    def is_cut(self, choice: Choice) -> bool:
        """Whether a piece of a call has been told, and not yet the end of it."""
        return self._readers is not None and self._readers[choice.index].has_cut


def count(model: Model, request: ChatRequest, most: int | None) -> int:
    """The tokens that are read for an answer. ApiError: see `check_length`."""
    with about("messages"):
        conversation = _read(model, request, _calling(model, request))
        check_length(model, conversation, most, param="messages")
        return len(model.tokenizer.encode_chat(conversation))


def _calling(model: Model, request: ChatRequest) -> Calling | None:
    return calling_of(model.tokenizer, request.tools or [], request.tool_choice, request.parallel_tool_calls)


def _read(model: Model, request: ChatRequest, calling: Calling | None) -> Conversation:
    messages = plain_messages(model.tokenizer, request.messages)
    return prompt_of(model.tokenizer, messages, request.tools or [] if calling else [])


def plain_messages(tokenizer: Tokenizer, messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages for the chat template. Where it knows nothing of parts, a message of parts is one text.

    ApiError: a message has a field that nobody reads.
    """
    reads = reads_of(tokenizer.chat_template or "")
    _check_fields(reads, messages)
    plain = [message.model_dump(exclude_none=True) for message in messages]
    if not reads.names("content", "text"):
        for message in plain:
            if isinstance(message.get("content"), list):
                message["content"] = joined(part["text"] for part in message["content"])
    return plain


# What OpenAI's messages have, what a model thought, and labels that clients send back with an answer.
_KNOWN = {"name", "tool_call_id", "reasoning_content", "thinking", "reasoning", "annotations", "index"}


def _check_fields(reads: Reads, messages: Sequence[ChatMessage]) -> None:
    """Null is what is not given."""
    for i, message in enumerate(messages):
        _check_part(reads, (), message, f"messages.{i}")
        if message.is_error is not None and message.role != "tool" and not reads.has("is_error"):
            raise _unread(f"messages.{i}.is_error")
        for n, call in enumerate(message.tool_calls or ()):
            where = f"messages.{i}.tool_calls.{n}"
            _check_part(reads, ("tool_calls",), call, where)
            _check_part(reads, ("tool_calls", "function"), call.function, f"{where}.function")


def _check_part(reads: Reads, path: tuple[str, ...], part: BaseModel, where: str) -> None:
    """path: the fields that lead to it from a message."""
    for name, value in (part.model_extra or {}).items():
        if value is not None and name not in _KNOWN and not reads.has(*path, name):
            raise _unread(f"{where}.{name}")


def _unread(field: str) -> ApiError:
    said = f"{field}: is no field that this server or the chat template of the model knows"
    return ApiError(400, said, param=field)


def joined(texts: Iterable[str]) -> str:
    """Parts of a message as one text, as vLLM joins them."""
    return "\n".join(texts)


def _whole(choice: Choice, deltas: Sequence[Delta], is_cut: bool) -> Answer:
    known = [delta.logprobs for delta in deltas if delta.logprobs is not None]
    calls: dict[str, Call] = {}
    for piece in (delta.call for delta in deltas if delta.call is not None):
        so_far = calls.get(piece.id) or Call(piece.id, piece.name or "", "")
        calls[piece.id] = so_far._replace(arguments=so_far.arguments + piece.arguments)
    return Answer(
        choice=choice,
        text="".join(delta.text for delta in deltas),
        logprobs=tuple(one for part in known for one in part) if known else None,
        finish=deltas[-1].finish or choice.finish,
        calls=tuple(calls.values())[: -1 if is_cut else None],
    )
