"""From a request of any API to the engine's generations, and their events together.

A route makes a `Wanted` of its request. `begin` makes a `Choice` of each answer that is wanted. The route then reads
`merged`, and says what it reads in its API's words.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bedplate.errors import MemoryFullError
from bedplate.runtime.request import Event, FinishReason, Statistics
from bedplate.runtime.sampling import MaskFunction
from bedplate.runtime.session import Prompt, Session
from bedplate.serve.catalog import Model
from bedplate.serve.errors import about
from bedplate.serve.limits import Place
from bedplate.serve.room import ALONE, too_large

# A deadline is the server's limit on time, as max_tokens is one on tokens.
FINISH: dict[FinishReason, str] = {
    "stop": "stop",
    "length": "length",
    "deadline": "length",
    "cancelled": "stop",
}


class Wanted(NamedTuple):
    """What a request wants of the engine. place: for as many answers.  prompts: each gets `n` answers.
    options: of `Session.events`.  mask: makes a mask for one answer, in a thread; or None.
    """

    model: Model
    place: Place
    prompts: Sequence[Prompt]
    n: int
    max_tokens: int | None
    logprobs: int | None
    cache_salt: str
    seed: int | None
    options: Mapping[str, Any]
    mask: Callable[[], MaskFunction] | None = None


@dataclass(kw_only=True, eq=False)
class Choice:
    """One answer of a request, as far as it has come. events: all of it.

    heard: when the latest event came, a time of `time.perf_counter`. None: none has come.  mask: makes a mask for each
    start, in a thread.
    """

    index: int
    model: Model
    place: Place
    session: Session
    prompt: Prompt
    options: dict[str, Any]
    mask: Callable[[], MaskFunction] | None = None
    heard: float | None = None
    events: list[Event] = field(default_factory=list)
    _begun: AsyncGenerator[Event] | None = None

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)

    @property
    def stats(self) -> Statistics:
        assert self.session.last is not None, "it has begun"
        return self.session.last

    @property
    def finish(self) -> str:
        """As OpenAI names the reasons."""
        return FINISH[self.stats.finish_reason or "cancelled"]

    async def start(self, *, waits: bool = True) -> None:
        """Begin, when there is memory. Raises what is wrong with the request. MemoryFullError: there is none."""
        if waits:
            room, holding = self.model.base.room, self.model.fixed.is_loaded
            self._begun = await room.enter(self._begin, holding=holding, seconds=self.place.seconds_left)
        else:
            self._begun = await self._begin()

    async def _begin(self) -> AsyncGenerator[Event]:
        mask = None if self.mask is None else await asyncio.to_thread(self.mask)
        with about("prompt"):
            begun = await self.session.begin_async(
                self.prompt, key=self.place.key, deadline=self.place.seconds_left, mask=mask, **self.options
            )
        self.place.check_prompt(self.stats.prompt_tokens)
        return begun

    async def _begin_again(self) -> None:
        """After its memory was needed. The same seed gives the same events: those that were said are left out."""
        self.options["seed"] = self.stats.seed
        await asyncio.to_thread(self.session.reset)
        self._begun = await self.model.base.room.enter(
            self._begin, holding=True, again=True, seconds=self.place.seconds_left
        )

    async def stream(self) -> AsyncGenerator[Event]:
        """Its events. It can be called once."""
        if self._begun is None:
            await self.start()
        watch, failed = self.model.base.watch, None
        try:
            async with aclosing(self._whole()) as events:
                async for event in events:
                    self.events.append(event)
                    watch.said(self, event)
                    self.heard = time.perf_counter()
                    yield event
        except Exception as error:
            failed = error
            raise
        finally:
            watch.ended(self, failed)
            del failed  # as in `merged`
            self.model.base.room.left()

    async def _whole(self) -> AsyncGenerator[Event]:
        """Its events, also where it has to begin again."""
        room, in_vain = self.model.base.room, 0
        while True:
            assert self._begun is not None
            known, mark = len(self.events), room.mark()
            with suppress(MemoryFullError):  # while it is known, it holds what the step held
                async with aclosing(self._begun) as events:
                    async for event in events:
                        if known:
                            known -= 1
                        else:
                            yield event
                if (
                    self.model.base.engine.memory_bytes is not None
                ):  # others need it, also those of this request
                    await asyncio.to_thread(self.session.reset)
                return
            # Others may have ended just now, and not yet have given up what they had.
            in_vain = in_vain + 1 if room.was_alone(mark) else 0
            if in_vain == ALONE:
                raise too_large()
            await self._begin_again()


def begin(wanted: Wanted) -> list[Choice]:
    """The answers that are wanted: `n` of each prompt, prompt by prompt. None has started. Call it in a thread.

    ApiError: the request wants more than it may have.
    """
    model, place, made = wanted.model, wanted.place, list[Choice]()
    most = place.max_tokens(wanted.max_tokens)
    for prompt in wanted.prompts:
        place.check_length(prompt)
        for _ in range(wanted.n):
            session = model.fixed.session(cache_salt=wanted.cache_salt)
            options = dict(wanted.options)
            options["max_tokens"] = most
            options["logprobs"] = wanted.logprobs
            if wanted.seed is not None:  # so that they differ, and can be had again
                options["seed"] = (wanted.seed + len(made)) % 2**64
            place.sessions.append(session)
            made.append(
                Choice(
                    index=len(made),
                    model=model,
                    place=place,
                    session=session,
                    prompt=prompt,
                    options=options,
                    mask=wanted.mask,
                )
            )
    return made


async def start(made: Sequence[Choice]) -> None:
    """Begin the first answer of each prompt: see `merged`. Only one waits for memory, which others may wait for."""
    firsts = list({id(choice.prompt): choice for choice in reversed(made)}.values())[::-1]
    if not firsts:
        return
    await firsts[0].start()
    with suppress(MemoryFullError):
        for choice in firsts[1:]:
            await choice.start(waits=False)


async def merged(made: Sequence[Choice]) -> AsyncGenerator[tuple[Choice, Event]]:
    """The events of all answers as they come. If one fails, or nobody reads on, all are cancelled.

    The answers of a prompt begin when its first one has read it: they find it in the cache.
    """
    queue: asyncio.Queue[tuple[Choice, Event] | BaseException | None] = asyncio.Queue(maxsize=len(made))
    read = {id(choice.prompt): asyncio.Event() for choice in made}
    firsts = {id(choice.prompt): choice for choice in reversed(made)}

    async def feed(choice: Choice) -> None:
        known, is_first = read[id(choice.prompt)], firsts[id(choice.prompt)] is choice
        try:
            if not is_first:
                await known.wait()
            async with aclosing(choice.stream()) as events:
                async for event in events:
                    known.set()
                    await queue.put((choice, event))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(feed(choice)) for choice in made]
    try:
        left = len(made)
        while left:
            found = await queue.get()
            if isinstance(found, BaseException):
                try:
                    raise found
                finally:
                    del found  # else it and this frame hold each other, and the sessions
            if found is None:
                left -= 1
            else:
                yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def finished(made: Sequence[Choice]) -> None:
    """Wait for all answers."""
    async with aclosing(merged(made)) as events:
        async for _ in events:
            pass


def usage(made: Sequence[Choice], n: int) -> dict[str, Any]:
    """Tokens of a request. A prompt counts once for all its answers."""
    firsts = made[::n]
    prompt = sum(choice.stats.prompt_tokens for choice in firsts)
    generated = sum(choice.stats.generated_tokens for choice in made)
    cached = sum(choice.stats.reused_tokens for choice in firsts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def timings(made: Sequence[Choice]) -> dict[str, Any]:
    """Of the first answer, under the names that llama.cpp's server gives them."""
    stats = made[0].stats
    read = stats.prompt_tokens - stats.reused_tokens
    return {
        "cache_n": stats.reused_tokens,
        "prompt_n": read,
        "prompt_ms": round(1000 * stats.prefill_seconds, 3),
        "prompt_per_second": _rate(read, stats.prefill_seconds),
        "predicted_n": stats.generated_tokens,
        "predicted_ms": round(1000 * stats.decode_seconds, 3),
        "predicted_per_second": _rate(max(0, stats.generated_tokens - 1), stats.decode_seconds),
        "draft_n": stats.drafted_tokens,
        "draft_n_accepted": stats.accepted_tokens,
    }


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 3) if seconds > 0 else 0.0
