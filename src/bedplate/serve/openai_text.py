"""OpenAI's `/v1/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from itertools import islice
from typing import Annotated, Any

from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from bedplate.runtime.request import TokenLogprobs
from bedplate.runtime.session import Prompt
from bedplate.serve import stream
from bedplate.serve.answers import Choice, Wanted, begin, finished, merged, timings, usage
from bedplate.serve.api import GENERATES, JSON, SSE, Api, post
from bedplate.serve.catalog import Model
from bedplate.serve.described import TextCompletion
from bedplate.serve.errors import ApiError
from bedplate.serve.lengths import check_known
from bedplate.serve.limits import Place
from bedplate.serve.logprobs import OfText
from bedplate.serve.options import sampling_options
from bedplate.serve.server import Server
from bedplate.serve.structured import Constrained, guide_of
from bedplate.serve.told import Told, answered
from bedplate.serve.wire import TokenId

Json = dict[str, Any]
_DEFAULT_TOKENS = 16  # OpenAI's
_AT_ONCE = 64  # tokens of a prompt that are scored while nobody looks whether the client is there


class CompletionRequest(Constrained):
    """`/v1/completions`. prompt: text or token ids, or a list of one of them.

    echo: the prompt is told too. With logprobs, so are those of its tokens; of the first there are none.
    best_of: no more than are answered.
    """

    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    best_of: int | None = None

    @property
    def prompts(self) -> list[Prompt]:
        """Each for itself."""
        return list(self.by_field.values())

    @property
    def by_field(self) -> dict[str, Prompt]:
        """Each by what it is called in the request."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return {"prompt": self.prompt}
        prompts: Sequence[Prompt] = self.prompt
        return {f"prompt.{at}": one for at, one in enumerate(prompts)}

    @property
    def answers(self) -> int:
        return self.n * len(self.prompts)

    def check(self) -> None:
        super().check()
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens: none are wanted, and no echo.", param="max_tokens")
        if self.max_tokens == 0 and self.min_tokens:
            raise ApiError(400, "min_tokens: no tokens are wanted.", param="min_tokens")
        if self.best_of not in (None, self.n):
            raise ApiError(400, "best_of: this server answers `n` times, and chooses none.", param="best_of")


class Echo:
    """What is told of a prompt before its answer.

    ids: its tokens.  scores: how likely they are, but the first; None: nobody asks.
    """

    def __init__(self, model: Model, prompt: Prompt, asked: CompletionRequest, place: Place) -> None:
        self.ids, self.text, self.scores = (
            list[int](),
            "",
            None if asked.logprobs is None else list[TokenLogprobs](),
        )
        self._model, self._prompt, self._asked, self._place = model, prompt, asked, place

    async def read(self) -> None:
        """ApiError, BedplateError: the prompt is not valid."""
        if not self._asked.echo:
            return
        tokenizer, prompt = self._model.tokenizer, self._prompt
        await run_in_threadpool(self._place.check_length, prompt)
        if isinstance(prompt, str):
            self.text, self.ids = prompt, await run_in_threadpool(tokenizer.encode, prompt)
        else:
            self.ids = list(prompt)  # type: ignore[arg-type]
            self.text = await run_in_threadpool(tokenizer.decode, self.ids)
        if not self.ids:
            raise ApiError(400, "prompt: it is empty.", param="prompt")
        self._place.check_prompt(len(self.ids))
        if self.scores is not None:
            scored = await run_in_threadpool(self._scored)
            while some := await run_in_threadpool(lambda: list(islice(scored, _AT_ONCE))):
                self.scores += some
                self._place.scored += len(some)
                if self._place.seconds_left == 0:
                    raise _late()

    def _scored(self) -> Iterator[TokenLogprobs]:
        session = self._model.fixed.session(cache_salt=self._asked.cache_salt)
        return session.logprobs(self.ids, top=self._asked.logprobs or 0)

    def told(self, known: OfText) -> Json | None:
        """Its logprobs."""
        return None if self.scores is None else known.told([*self.ids[:1], *self.scores])


def _late() -> ApiError:
    message = "The time of the request was up before the likelihood of its prompt was known."
    headers = {"Retry-After": "5"}
    return ApiError(503, message, kind="server_error", code="timeout", headers=headers)


def routes(server: Server) -> list[Api]:
    async def answer(request: Request, asked: CompletionRequest) -> Response:
        most = server.settings.max_running
        if len(asked.prompts) > most:
            message = (
                f"prompt: it has {len(asked.prompts)} prompts; this server answers at most {most} at once."
            )
            raise ApiError(400, message, param="prompt")
        return await answered(server, request, asked, _Told)

    return [
        post(
            "/v1/completions",
            CompletionRequest,
            answer,
            "Continuations of texts",
            said=TextCompletion,
            media=(JSON, SSE),
            errors=GENERATES,
        )
    ]


def _wanted(model: Model, asked: CompletionRequest, place: Place) -> Wanted:
    return Wanted(
        model=model,
        place=place,
        prompts=asked.prompts,
        n=asked.n,
        max_tokens=place.default_tokens(_DEFAULT_TOKENS) if asked.max_tokens is None else asked.max_tokens,
        logprobs=asked.logprobs,
        cache_salt=asked.cache_salt,
        seed=asked.seed,
        options=sampling_options(model, asked),
        mask=guide_of(model, asked),
    )


class _Told(Told):
    """Without tokens to generate, there are no choices of the engine: only the echoes."""

    def __init__(self, asked: CompletionRequest, model: Model, place: Place) -> None:
        self._asked = asked
        self._prompts = [Echo(model, prompt, asked, place) for prompt in asked.prompts]
        self.choices = self._checked(_wanted(model, asked, place))
        self._echoes = [echo for echo in self._prompts for _ in range(asked.n)]
        self._known = [OfText(model.tokenizer) for _ in self._echoes]
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": asked.model,
        }

    def _checked(self, wanted: Wanted) -> list[Choice]:
        """The answers. Of none, nobody would check the fields."""
        for field, prompt in self._asked.by_field.items():
            if not isinstance(prompt, str):
                check_known(wanted.model, prompt, field)  # type: ignore[arg-type]
        choices = begin(wanted)
        if self._asked.max_tokens != 0:
            return choices
        if wanted.mask is not None:
            wanted.mask()
        return []

    async def begin(self) -> None:
        await self._read()
        await super().begin()

    async def _read(self) -> None:
        for echo in self._prompts:
            await echo.read()

    async def whole(self) -> Json:
        await self._read()
        await finished(self.choices)
        found = [self._echoed(index) for index in range(len(self._echoes))]
        for one, choice in zip(found, self.choices, strict=False):
            said = [score for event in choice.events for score in event.logprobs or ()]
            one["text"] += choice.text
            one["finish_reason"] = choice.finish
            self._add(one, choice, said, ended=True)
        return {**self._head, "choices": found, **self._counted()}

    async def lines(self) -> AsyncGenerator[str]:
        for index in range(len(self._echoes) if self._asked.echo else 0):
            yield self._line(self._echoed(index))
        async with aclosing(merged(self.choices)) as events:
            async for choice, event in events:
                ended = event.finish_reason is not None
                one = {"index": choice.index, "text": event.text, "logprobs": None}
                one["finish_reason"] = choice.finish if ended else None
                self._add(one, choice, event.logprobs or (), ended=ended)
                yield self._line(one)
        if self._asked.tells_usage:
            yield stream.data({**self._head, "choices": [], **self._counted()})
        yield stream.DONE

    def _echoed(self, index: int) -> Json:
        """The beginning of an answer. It is all of it where nothing is generated."""
        known = self._echoes[index].told(self._known[index]) if self._asked.echo else None
        finish = None if self.choices else "length"
        return {"index": index, "text": self._echoes[index].text, "logprobs": known, "finish_reason": finish}

    def _add(self, one: Json, choice: Choice, said: Sequence[TokenLogprobs], *, ended: bool) -> None:
        """The logprobs of what was generated. The end token is one of them: it was chosen, as all the others."""
        if self._asked.logprobs is None:
            return
        last = choice.stats.end_logprobs if ended else None
        known = self._known[choice.index].told([*said, *([] if last is None else [last])])
        before = one["logprobs"] or {}
        one["logprobs"] = {name: [*before.get(name, ()), *values] for name, values in known.items()}

    def _line(self, one: Json) -> str:
        counted = {"usage": None} if self._asked.tells_usage else {}
        return stream.data({**self._head, "choices": [one], **counted})

    def _counted(self) -> Json:
        if self.choices:
            return {"usage": usage(self.choices, self._asked.n), "timings": timings(self.choices)}
        read = sum(len(echo.ids) for echo in self._prompts)
        details = {"prompt_tokens_details": {"cached_tokens": 0}}
        return {"usage": {"prompt_tokens": read, "completion_tokens": 0, "total_tokens": read, **details}}
