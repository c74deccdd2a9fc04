"""Who gets a place: so many answers run at once, so many requests wait, and who was served least comes first."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from bedplate.runtime.session import Prompt, Session
from bedplate.serve.catalog import Model
from bedplate.serve.errors import ApiError
from bedplate.serve.lengths import check_length
from bedplate.serve.settings import Settings

if TYPE_CHECKING:
    from bedplate.serve.wire import Asking


class Place:
    """What a request may use of the engine, and what it has used.

    key: fair shares are counted for it, in the queue and in steps: an API key's name, or the model.  user: fair shares
    within the key.  answers: how many it makes.  deadline: a time of `time.perf_counter`.  sessions: of its answers.
    scored: tokens of prompts whose likelihood it was told.
    """

    def __init__(self, model: Model, key: str, asked: Asking, answers: int, settings: Settings) -> None:
        self.model, self.key, self.user = model, key, asked.caller or ""
        self.answers = answers
        self.came = time.perf_counter()
        self.deadline = self.came + min(settings.timeout, asked.timeout or math.inf)
        self.sessions: list[Session] = []
        self.scored = 0
        self._settings = settings

    @property
    def seconds_left(self) -> float | None:
        """None: there is no limit."""
        return None if self.deadline == math.inf else max(0.0, self.deadline - time.perf_counter())

    @property
    def tokens(self) -> int:
        """Computed for it so far."""
        known = [session.last for session in self.sessions if session.last is not None]
        return self.scored + sum(
            one.prompt_tokens - one.reused_tokens + one.generated_tokens for one in known
        )

    def max_tokens(self, wanted: int | None) -> int:
        """Of an answer. ApiError: the request wants more than it may have."""
        most = self._settings.max_tokens
        if wanted is not None and most is not None and wanted > most:
            message = f"The answer may have {wanted} tokens; this server makes at most {most}."
            raise ApiError(400, message, param="max_tokens")
        return wanted or most or self.model.base.engine.limits.max_context

    def default_tokens(self, usual: int) -> int:
        """Of an answer, where the request names no number. usual: where more are allowed."""
        return min(usual, self._settings.max_tokens or usual)

    def check_length(self, prompt: Prompt) -> None:
        """In a thread. ApiError: it is too long in any case, so that its tokens need not be counted."""
        check_length(self.model, prompt, self._settings.max_prompt)

    def check_prompt(self, tokens: int) -> None:
        """ApiError: it is too long."""
        most = self._settings.max_prompt
        if most is not None and tokens > most:
            message = f"The prompt has {tokens} tokens; this server takes at most {most}."
            raise ApiError(400, message, param="prompt", code="context_length_exceeded")

    def cancel(self) -> None:
        """End its answers."""
        for session in self.sessions:
            session.cancel()


class Places:
    """All places of a server. One event loop uses it.

    running: that are taken.  waiting: requests that have none yet.
    """

    def __init__(self, settings: Settings) -> None:
        self.running: list[Place] = []
        self.waiting: list[Place] = []
        self._settings = settings
        self._calls: dict[Place, asyncio.Future[None]] = {}
        self._keys = _Served()
        self._users: dict[str, _Served] = {}
        self._rate = _Rate(settings.tokens_per_minute)
        self._usual = 1.0  # seconds that a place is taken

    @property
    def answers(self) -> int:
        """That run now."""
        return sum(place.answers for place in self.running)

    def headers(self, key: str) -> dict[str, str]:
        """What a client is told of its rate."""
        return self._rate.headers(key)

    @asynccontextmanager
    async def place(self, place: Place) -> AsyncIterator[None]:
        """Wait for it, hold it, and give it back. Then its answers have ended.

        ApiError: too many wait, or its time is up.
        """
        self._rate.check(place.key)
        if place.answers > self._settings.max_running:
            message = (
                f"{place.answers} answers are wanted; this server makes at most {self._settings.max_running}."
            )
            raise ApiError(400, message, param="n")
        waits = bool(self.waiting) or self.answers + place.answers > self._settings.max_running
        if waits and len(self.waiting) >= self._settings.max_queue:
            message = "Too many requests wait for an answer."
            raise self._later(429, message, "requests", "rate_limit_exceeded")
        self._enter(place)
        try:
            await self._called(place)
            begun = time.perf_counter()
            yield
            self._usual += (time.perf_counter() - begun - self._usual) / 8
        finally:
            place.cancel()
            self._leave(place)

    async def _called(self, place: Place) -> None:
        self.waiting.append(place)
        called = self._calls[place] = asyncio.get_running_loop().create_future()
        self._call()
        try:
            async with asyncio.timeout(place.seconds_left):
                await called
        except TimeoutError:
            message = "The time of the request was up before it got a place: many are answered now."
            raise self._later(503, message, "server_error", "timeout") from None

    def _later(self, status: int, message: str, kind: str, code: str) -> ApiError:
        wait = self._usual * (len(self.waiting) + 1) / self._settings.max_running
        retry = {"Retry-After": str(min(60, math.ceil(wait)))}
        return ApiError(status, message, kind=kind, code=code, headers=retry)

    def _call(self) -> None:
        """Give places to those that come first. One that does not fit yet is not passed by smaller ones."""
        while self.waiting:
            # Of equal ones, the one that came first. Each name is counted once.
            key = min(dict.fromkeys(place.key for place in self.waiting), key=self._keys.of)
            firsts: dict[str, Place] = {}
            for place in self.waiting:
                if place.key == key:
                    firsts.setdefault(place.user, place)
            first = firsts[min(firsts, key=self._users[key].of)]
            if self.answers + first.answers > self._settings.max_running:
                return
            self.waiting.remove(first)
            self.running.append(first)
            self._keys.begin(first.key, first)
            self._users[first.key].begin(first.user, first)
            call = self._calls.pop(first)
            if not call.done():  # else it is about to leave
                call.set_result(None)

    def _enter(self, place: Place) -> None:
        self._keys.enter(place.key)
        self._users.setdefault(place.key, _Served()).enter(place.user)

    def _leave(self, place: Place) -> None:
        self._calls.pop(place, None)
        for places in (self.running, self.waiting):
            if place in places:
                places.remove(place)
        self._rate.take(place.key, place.tokens)
        self._users[place.key].leave(place.user, place)
        self._keys.leave(place.key, place)
        if place.key not in self._keys:
            del self._users[place.key]
        self._call()


class _Served:
    """The virtual token counter of arXiv:2401.00588: tokens served of each name. Who comes anew, or comes back, has no
    more claim than those that are there.

    Of a name that is there, only places that run are looked at: the others have used nothing.
    """

    def __init__(self) -> None:
        self._settled: Counter[str] = Counter()  # of places that were given back
        self._there: Counter[str] = Counter()  # places
        self._running: dict[str, set[Place]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._settled or name in self._there

    def of(self, name: str) -> int:
        return self._settled[name] + sum(place.tokens for place in self._running.get(name, ()))

    def enter(self, name: str) -> None:
        if name not in self._there:
            self._settled[name] = max(self._settled[name], min(map(self.of, self._there), default=0))
        self._there[name] += 1

    def begin(self, name: str, place: Place) -> None:
        """From now on it uses something."""
        self._running.setdefault(name, set()).add(place)

    def leave(self, name: str, place: Place) -> None:
        self._settled[name] += place.tokens
        running = self._running.get(name, set())
        running.discard(place)
        if not running:
            self._running.pop(name, None)
        self._there[name] -= 1
        if not self._there[name]:
            del self._there[name]
        # Of one that is away, and would be lifted to those that are there, nothing need be known.
        least = min(map(self.of, self._there), default=math.inf)
        self._settled = Counter(
            {one: count for one, count in self._settled.items() if one in self._there or count > least}
        )


class _Rate:
    """A bucket of tokens for each name. It may be overdrawn by what has begun, and fills up with time."""

    def __init__(self, per_minute: int | None) -> None:
        self._most = per_minute
        self._taken: dict[str, tuple[float, float]] = {}  # tokens, and when

    def check(self, name: str) -> None:
        """ApiError: it is empty."""
        if self._most is not None and (over := self._now(name) - self._most) >= 0:
            message = f"The limit of {self._most} tokens a minute is reached."
            wait = max(1, math.ceil((over + 1) * 60 / self._most))
            retry = {"Retry-After": str(wait)}
            raise ApiError(429, message, kind="tokens", code="rate_limit_exceeded", headers=retry)

    def take(self, name: str, tokens: int) -> None:
        if self._most is not None:
            self._taken[name] = (self._now(name) + tokens, time.monotonic())
            self._taken = {one: known for one, known in self._taken.items() if self._now(one) > 0}

    def headers(self, name: str) -> dict[str, str]:
        """As OpenAI names them."""
        if self._most is None:
            return {}
        taken = self._now(name)
        return {
            "x-ratelimit-limit-tokens": str(self._most),
            "x-ratelimit-remaining-tokens": str(max(0, math.floor(self._most - taken))),
            "x-ratelimit-reset-tokens": f"{taken * 60 / self._most:.3f}s",
        }

    def _now(self, name: str) -> float:
        """Tokens that are missing in its bucket."""
        tokens, when = self._taken.get(name, (0.0, 0.0))
        return max(0.0, tokens - (time.monotonic() - when) * (self._most or 0) / 60)
