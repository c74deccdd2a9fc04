"""What answers look like, for the OpenAPI document. Tests hold the answers against it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Json = dict[str, Any]


class Said(BaseModel):
    """It has these fields, and no others."""

    model_config = ConfigDict(extra="forbid")


class Begun(BaseModel):
    """It has these fields, and more, as the API's own documentation tells."""

    model_config = ConfigDict(extra="allow")


class Health(Said):
    """The server answers."""

    status: Literal["ok"]


class ErrorDetail(Said):
    """What is wrong. param: the field that it is about.  code: a word for programs, or the status."""

    message: str
    type: str
    param: str | None
    code: str | int | None


class Error(Said):
    """An answer with a status from 400 on, as OpenAI says it."""

    error: ErrorDetail


class AnthropicErrorDetail(Said):
    """What is wrong."""

    type: str
    message: str


class AnthropicError(Said):
    """An answer with a status from 400 on, as Anthropic says it."""

    type: Literal["error"]
    error: AnthropicErrorDetail
    request_id: str


class ModelCard(Said):
    """A model. root: where its files are.  parent: of an adapter, the name of its base."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelCards(Said):
    """All models."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokens(Said):
    """What a text is for a model. max_model_len: how many it can read and write together."""

    tokens: list[int]
    count: int
    max_model_len: int


class Text(Said):
    """What tokens are as text."""

    prompt: str


class CachedTokens(Said):
    """Tokens of the prompt whose keys and values were known."""

    cached_tokens: int


class Usage(Said):
    """Tokens of a request. A prompt counts once for all its answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Timings(Said):
    """Of the first answer, as llama.cpp's server gives them."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_second: float
    draft_n: int
    draft_n_accepted: int


class TokenLogprob(Said):
    """bytes: null if the token is no whole character."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenLogprob(TokenLogprob):
    """A token of an answer."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Said):
    """Of the tokens of an answer."""

    content: list[ChosenLogprob]
    refusal: None


class CalledFunction(Said):
    """arguments: the text of a JSON object."""

    name: str
    arguments: str


class ToolCall(Said):
    """A call that an answer makes."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Said):
    """An answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    annotations: list[Json]
    tool_calls: list[ToolCall] = Field(default=[])


class ChatChoice(Said):
    """One of the answers."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(Said):
    """Answers to a conversation. In a stream, OpenAI's `chat.completion.chunk`s."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings


class TextLogprobs(Said):
    """Of the tokens of a text, the lists side by side."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Said):
    """One of the texts."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(Said):
    """Continuations of texts. timings: not if nothing was generated."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    timings: Timings | None = None


class ResponseBegun(Begun):
    """A response of OpenAI's Responses. In a stream, its events."""

    id: str
    object: Literal["response"]
    status: Literal["completed", "incomplete"]
    model: str
    output: list[Json]
    usage: Json


class MessageBegun(Begun):
    """A message of Anthropic's Messages. In a stream, its events."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Json]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    usage: Json


class TokenCount(Said):
    """How many tokens a conversation has."""

    input_tokens: int
