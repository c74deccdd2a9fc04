"""OpenAI's `/v1/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bedplate.runtime.request import TokenLogprobs
from bedplate.runtime.session import Prompt
from bedplate.runtime.tokenizer import Tokenizer
from bedplate.serve import stream
from bedplate.serve.answers import Choice, Wanted, begin, finished, merged, sampling_options, timings, usage
from bedplate.serve.catalog import Model
from bedplate.serve.server import Server, body_of
from bedplate.serve.structured import Constrained, guide_of

Json = dict[str, Any]
_DEFAULT_TOKENS = 16  # OpenAI's


class CompletionRequest(Constrained):
    """`/v1/completions`. prompt: text or token ids, or a list of one of them."""

    prompt: (
        str
        | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[list[int]], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def prompts(self) -> list[Prompt]:
        """Each for itself."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)


def routes(server: Server) -> list[Route]:
    async def answer(request: Request) -> Response:
        return await _answer(server, request)

    return [Route("/v1/completions", answer, methods=["POST"])]


async def _answer(server: Server, request: Request) -> Response:
    asked = await body_of(request, CompletionRequest)
    model = server.catalog.find(asked.model, asked.lora)
    async with server.ticket(request, model, asked.user) as ticket:
        choices = begin(_wanted(model, asked, ticket.key))
        head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": asked.model,
        }
        if asked.stream:
            return await ticket.stream(_pieces(model, asked, choices, head), choices)
        await ticket.whole(finished(choices))
        found = [_choice(one, model.tokenizer) for one in choices]
        counted = {"usage": usage(choices, asked.n), "timings": timings(choices)}
        return JSONResponse({**head, "choices": found, **counted})


def _wanted(model: Model, asked: CompletionRequest, key: str) -> Wanted:
    return Wanted(
        model=model,
        prompts=asked.prompts,
        n=asked.n,
        max_tokens=asked.max_tokens or _DEFAULT_TOKENS,
        logprobs=asked.logprobs,
        cache_salt=asked.cache_salt,
        seed=asked.seed,
        options={**sampling_options(asked), "key": key},
        mask=guide_of(model, asked),
    )


def _choice(choice: Choice, tokenizer: Tokenizer) -> Json:
    said = [one for event in choice.events for one in event.logprobs or ()]
    known = None if choice.options["logprobs"] is None else _logprobs(said, tokenizer, 0)
    return {"index": choice.index, "text": choice.text, "logprobs": known, "finish_reason": choice.finish}


async def _pieces(
    model: Model, asked: CompletionRequest, choices: Sequence[Choice], head: Json
) -> AsyncGenerator[str]:
    offsets = [0] * len(choices)
    async with aclosing(merged(choices)) as events:
        async for choice, event in events:
            known = None
            if event.logprobs is not None:
                known = _logprobs(event.logprobs, model.tokenizer, offsets[choice.index])
                offsets[choice.index] += sum(map(len, known["tokens"]))
            finish = None if event.finish_reason is None else choice.finish
            one = {"index": choice.index, "text": event.text, "logprobs": known, "finish_reason": finish}
            yield stream.data({**head, "choices": [one], **({"usage": None} if asked.tells_usage else {})})
    if asked.tells_usage:
        counted = {"usage": usage(choices, asked.n), "timings": timings(choices)}
        yield stream.data({**head, "choices": [], **counted})
    yield stream.DONE


def _logprobs(said: Sequence[TokenLogprobs], tokenizer: Tokenizer, offset: int) -> Json:
    """offset: of the first token in the answer's text."""
    texts = [tokenizer.decode([one.token]) for one in said]
    return {
        "tokens": texts,
        "token_logprobs": [one.logprob for one in said],
        "top_logprobs": [{tokenizer.decode([token]): value for token, value in one.top} for one in said],
        "text_offset": [offset + sum(map(len, texts[:at])) for at in range(len(texts))],
    }
