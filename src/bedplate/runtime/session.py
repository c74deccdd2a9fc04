"""One conversation: its keys and values, the tokens that they stand for, and generation."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Unpack, cast, overload

from bedplate import _native
from bedplate.errors import ArgumentError, ContextFullError, RunError
from bedplate.runtime import arguments
from bedplate.runtime.events import Events, asynchronous
from bedplate.runtime.generation import Generation, Request, texts
from bedplate.runtime.held import Held, State
from bedplate.runtime.lengths import too_long
from bedplate.runtime.lookup import Habits, Lookup
from bedplate.runtime.messages import Conversation, Message
from bedplate.runtime.request import Event, Options, Statistics, TokenLogprobs, Wish
from bedplate.runtime.sampling import Sampler
from bedplate.runtime.scheduler import Scheduler
from bedplate.runtime.scoring import scored
from bedplate.runtime.steps import LOGITS_ROWS, Part
from bedplate.runtime.tokenizer import Tokenizer
from bedplate.runtime.weights import Limits, Weights

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_Before = tuple[Held, State]  # what is held, and what it held
Prompt = str | Sequence[Message] | Sequence[int] | Conversation
_SHORTEN = "shorten the text, reset the session, or give the engine a larger max_context"


class Host(NamedTuple):
    """What a session needs of its engine, by the adapters that it uses, each with its scale (none: the base).

    load_for_text: what makes an answer, of the same files.
    check: whether adapters can be used so.
    adopt: takes in a session that was made of another.
    reserve: takes memory for positions [begin, end) of keys and values. RunError: there is none.
    habits: what usually follows what in answers. None: generations propose no tokens by lookup.
    """

    load: Callable[[Mapping[str, float]], Weights]
    load_for_text: Callable[[Mapping[str, float]], tuple[Weights, Tokenizer]]
    check: Callable[[Mapping[str, float]], None]
    adopt: Callable[[Session], None]
    reserve: Callable[[Sequence[tuple[_native.Kv, int, int]]], None]
    scheduler: Scheduler
    limits: Limits
    habits: Habits | None


class Session:
    """A conversation with the base, with an adapter, or with several at once. `Engine.session` makes it.

    last: statistics of the latest generation. None before the first. You can call a session from any thread.
    """

    def __init__(self, host: Host, adapters: Mapping[str, float], held: Held) -> None:
        self._host = host
        self._adapters = adapters
        self._held = held
        self._changing = threading.RLock()  # see `_alone`
        self._running: Generation | None = None
        self.last: Statistics | None = None

    @property
    def adapters(self) -> dict[str, float]:
        """What the session uses: adapters by name, each with its scale. `use` takes it. Empty: the base."""
        return dict(self._adapters)

    @property
    def adapter(self) -> str | None:
        """The name of the session's one adapter. None: it uses the base, or several adapters."""
        return next(iter(self._adapters)) if len(self._adapters) == 1 else None

    @property
    def scale(self) -> float:
        """What A and B of the session's one adapter are multiplied by. 1: it uses the base, or several adapters."""
        return next(iter(self._adapters.values())) if len(self._adapters) == 1 else 1.0

    @property
    def running(self) -> Generation | None:
        """The generation that goes on."""
        running = self._running
        return None if running is None or running.ended else running

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens whose keys and values the session holds."""
        return tuple(self._held.tokens)

    @property
    def kv_bytes(self) -> int:
        """How many bytes its keys and values take now, also those that it shares."""
        kv = self._held.kv
        return 0 if kv is None else kv.nbytes

    def use(self, adapter: str | Mapping[str, float] | None, *, scale: float = 1.0) -> None:
        """Switch to another adapter, to several at once, or to the base (None). The keys and values so far are
        dropped, because something else computed them. Those that the base computed stay for the base and for activated
        LoRAs.

        adapter: a name, or a mapping from names to scales: `{"a": 0.7, "b": 0.3}`.
        scale: multiplies what A and B of the one adapter add, as PEFT's `set_scale` does. It may be 0 or negative.
        NotFoundError: the bundle has no such adapter.  RunError: the scale is not a number.  UnsupportedError: an
        adapter has something that no scale fits, or that cannot be used together with others.
        """
        adapters = arguments.adapters(adapter, scale)
        self._host.check(adapters)
        begins_with_base = self._begins_with_base(adapters)  # which may load them
        with _alone([self]), self._host.scheduler.turn():
            if adapters != self._adapters:
                if begins_with_base:
                    self.cancel()
                    self._held.keep_of_base()
                else:
                    self._reset()
                self._adapters = adapters

    def _begins_with_base(self, adapters: Mapping[str, float]) -> bool:
        """Whether the base's keys and values are also theirs, if the session holds some."""
        if not adapters or not self._held.of_base:
            return not adapters
        return self._host.load(adapters).invocation is not None

    def fork(self) -> Session:
        """Another session that has come as far as this one. From there, each goes on alone. What they have in common
        takes memory once.
        """
        with _alone([self]), self._host.scheduler.turn():
            other = Session(self._host, self._adapters, self._held.fork())
        self._host.adopt(other)
        return other

    def save(self, path: str | Path) -> None:
        """Write the session to a file, for `Engine.load_session`. The file is there as a whole or not at all."""
        from bedplate.runtime import session_file

        other = self.fork()  # which nothing changes meanwhile
        session_file.save(path, other._held, other._load(), other._adapters)

    def reset(self) -> None:
        """Forget the conversation and free its memory."""
        with _alone([self]), self._host.scheduler.turn():
            self._reset()

    def _reset(self) -> None:
        self.cancel()
        self._held = Held(self._held.salt)

    def cancel(self) -> None:
        """End the running generation. It says no more, but what it has said can still be read."""
        running, self._running = self._running, None
        if running is not None:
            self._host.scheduler.end(running)

    def step(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens. Returns the logits of the last one, float32 [vocab]: as many as the adapter has tokens.

        RunError: the context is full, or token ids are not in the vocabulary. The session is then as it was before.
        """
        row: NDArray[np.float32] = self.step_together([(self, token_ids)])[0]
        return row

    @staticmethod
    def step_together(parts: Sequence[tuple[Session, Sequence[int]]]) -> NDArray[np.float32]:
        """Append tokens to sessions of one engine, see `Engine.step`."""
        import numpy as np

        sessions = [session for session, _ in parts]
        host = sessions[0]._host
        with _alone(sessions):
            loaded = [session._load() for session in sessions]  # before others have to wait
            with host.scheduler.turn():
                appended, before = Session._begin_step(parts, loaded)
            with _restored_after_errors(before):
                logits: dict[int, NDArray[np.float32]] = {}  # of the last tokens, by what holds them
                for piece, found in host.scheduler.in_turns(appended, host.limits.max_rows):
                    logits |= zip((id(part.held) for part in piece if part.wanted), found.array, strict=True)
        width = max(map(len, logits.values()))
        return np.stack([_widened(logits[id(part.held)], width) for part in appended])

    @staticmethod
    def _begin_step(
        parts: Sequence[tuple[Session, Sequence[int]]], of_sessions: Sequence[Weights]
    ) -> tuple[list[Part], list[_Before]]:
        """What is to be computed, and what the sessions held. All is checked before any session changes."""
        wanted = [(session, _ids(token_ids)) for session, token_ids in parts]
        for session, ids in wanted:
            session._check_room(len(session._held.tokens) + len(ids))
        loaded = [
            session._held.weights_for(weights, ids)
            for (session, ids), weights in zip(wanted, of_sessions, strict=True)
        ]
        for (_, ids), weights in zip(wanted, loaded, strict=True):
            _check_known(ids, weights)
        before = [(session._held, session._held.state) for session, _ in wanted]
        with _restored_after_errors(before):
            texts = [
                session._held.extend(weights, ids, len(session._held.tokens) + len(ids))
                for (session, ids), weights in zip(wanted, loaded, strict=True)
            ]
            _reserve([(session, len(text)) for (session, _), text in zip(wanted, texts, strict=True)])
            for session, _ in wanted:
                session.cancel()
        appended = [
            Part(session._held, weights, text, wanted=1)
            for (session, _), weights, text in zip(wanted, loaded, texts, strict=True)
        ]
        return appended, before

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits at every position of a new text, float32 [T, vocab], as of `step`. The session then holds this text
        only.

        RunError: the text is longer than the context.
        """
        import numpy as np

        ids = _ids(token_ids)
        self._check_room(len(ids))
        scheduler = self._host.scheduler
        with _alone([self]):
            weights = self._load().for_text(ids)  # before others have to wait
            with scheduler.turn():
                held = self._held
                _check_known(ids, weights)
                before = [(held, held.state)]
                with _restored_after_errors(before):
                    held.clear(weights, len(ids))
                    _reserve([(self, len(ids))])
                    self.cancel()
            with _restored_after_errors(before):
                whole = Part(held, weights, ids, wanted=len(ids))
                rows = [logits.array for _, logits in scheduler.in_turns([whole], LOGITS_ROWS)]
        return np.concatenate(rows)

    def logprobs(self, token_ids: Sequence[int], *, top: int = 0) -> Iterator[TokenLogprobs]:
        """How likely a text is: the logarithms of the probabilities of its tokens, but of the first, which nothing
        comes before. They are computed as you ask for them, some at a time, between the steps of others. What the
        session holds does not change.

        top: so many likeliest tokens are told at each place.
        RunError: the text is longer than the context, or an argument has a wrong type or value.
        """
        ids, top = _ids(token_ids), arguments.count("top", top)
        self._check_room(len(ids))
        weights = self._load().for_text(ids)
        _check_known(ids, weights)
        scheduler, held = self._host.scheduler, Held(self._held.salt)
        return scored(held, weights, ids, top, scheduler=scheduler)

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int,
        stream: Literal[False] = ...,
        **options: Unpack[Options],
    ) -> str: ...

    @overload
    def generate(
        self, prompt: Prompt, *, max_tokens: int, stream: Literal[True], **options: Unpack[Options]
    ) -> Iterator[str]: ...

    def generate(
        self, prompt: Prompt, *, max_tokens: int, stream: bool = False, **options: Unpack[Options]
    ) -> str | Iterator[str]:
        """Continue a prompt, see `events`. Returns the text, or with `stream` an iterator over pieces of it."""
        arguments.flag("stream", stream)
        pieces = texts(self._started(prompt, max_tokens, None, options))
        return pieces if stream else "".join(pieces)

    async def generate_async(self, prompt: Prompt, *, max_tokens: int, **options: Unpack[Options]) -> str:
        """As `generate`, for a task of asyncio. If the task is cancelled, so is the generation."""
        async with aclosing(self.events_async(prompt, max_tokens=max_tokens, **options)) as events:
            return "".join([event.text async for event in events])

    def events(
        self, prompt: Prompt, *, max_tokens: int, logprobs: int | None = None, **options: Unpack[Options]
    ) -> Iterator[Event]:
        """Continue a text (used as it is), token ids, or a conversation (with the adapter's chat template).

        `Sampling` says how tokens are chosen: without options, the most likely token each time. The text ends at an
        end token or before a string of `stop`, after max_tokens, at the end of the context, or after `cancel`. If
        there are several strings in `stop`, the one that is complete first counts.

        If the session already holds the beginning of the prompt, this part is not computed again. A generation that is
        still going on ends when the session gets another request.

        Generations that go on at the same time are computed together, whichever threads or tasks ask for their events:
        who waits for an event moves all of them on. One can be a few events ahead of its caller. A long prompt is read
        in chunks, between the tokens of others. After each chunk, `on_prefill` gets two numbers: the tokens that are
        done, and all tokens of the prompt.

        key: whose request it is. If a step has no room for all, the key that was given the fewest tokens comes first.
        deadline: the text ends after so many seconds.
        mask: a function that gets the tokens so far, and gives packed bits of those that are allowed next. If it also
            says which tokens it forces (`ForcingMask`), these take no steps of their own.
        allow_special: the text of a special token in a message becomes that token, see `Tokenizer.encode_chat`.
        logprobs: events have the logarithms of probabilities, also of so many likeliest tokens.

        Returns an iterator over events, see `Event`. Statistics are in `last`.
        RunError: the prompt is empty or longer than the context, or an argument has a wrong type or value.
        """
        return self._started(prompt, max_tokens, logprobs, options)

    async def events_async(
        self, prompt: Prompt, *, max_tokens: int, logprobs: int | None = None, **options: Unpack[Options]
    ) -> AsyncGenerator[Event]:
        """As `events`, for a task of asyncio. It starts with the first event that is asked for. Close it (`aclose`, or
        `contextlib.aclosing`) if you leave it before its end.
        """
        async with aclosing(
            await self.begin_async(prompt, max_tokens=max_tokens, logprobs=logprobs, **options)
        ) as events:
            async for event in events:
                yield event

    async def begin_async(
        self, prompt: Prompt, *, max_tokens: int, logprobs: int | None = None, **options: Unpack[Options]
    ) -> AsyncGenerator[Event]:
        """As `events_async`, but the generation has begun when this returns: it raises what is wrong with the request.
        If you do not ask for the events, `cancel` it.
        """
        generation = await self._start_async(prompt, max_tokens, logprobs, options)
        return asynchronous(self._host.scheduler, generation, options.get("on_prefill"))

    def _started(self, prompt: Prompt, max_tokens: int, logprobs: int | None, options: Options) -> Events:
        generation = self._start(prompt, max_tokens, logprobs, options)
        return Events(self._host.scheduler, generation, options.get("on_prefill"))

    async def _start_async(
        self, prompt: Prompt, max_tokens: int, logprobs: int | None, options: Options
    ) -> Generation:
        """In a thread, because it may load weights. If the task is cancelled, so is what the thread begins."""
        import asyncio  # who has no tasks does without it

        begun: list[Generation] = []
        left = threading.Event()

        def start() -> Generation:
            generation = self._start(prompt, max_tokens, logprobs, options)
            begun.append(generation)
            if left.is_set():
                self._host.scheduler.end(generation)
            return generation

        try:
            return await asyncio.to_thread(start)
        except asyncio.CancelledError:
            left.set()
            for generation in begun:
                self._host.scheduler.end(generation)
            raise

    def _start(self, prompt: Prompt, max_tokens: int, logprobs: int | None, options: Options) -> Generation:
        """Everything is checked and loaded before the session changes."""
        self._host.scheduler.check_outside()
        given: dict[str, Any] = {**options}
        allow_special = arguments.flag("allow_special", given.pop("allow_special", False))
        wish = Wish.of(max_tokens=max_tokens, logprobs=logprobs, **given)
        weights, tokenizer = self._host.load_for_text(self._adapters)
        start = time.perf_counter()
        ids = _ids(self._encode(tokenizer, prompt, allow_special), "prompt")
        weights = weights.for_text(ids)  # as in PEFT, what is generated does not turn an adapter on
        self._check_room(len(ids))
        _check_known(ids, weights, "prompt")
        _check_known(list(wish.sampling.logit_bias), weights, "logit_bias")
        _check_known(wish.sampling.banned_tokens, weights, "banned_tokens")
        sampler = Sampler(wish.sampling, prompt=ids, ends=sorted(tokenizer.end_ids), mask=wish.mask)
        request = Request(
            prompt=ids,
            weights=weights,
            tokenizer=tokenizer,
            wish=wish,
            sampler=sampler,
            # The keys and values of the last token are not needed: it may stand just beyond the context.
            room=self._host.limits.max_context - len(ids) + 1,
            lookup=self._lookup(weights, ids),
        )
        stats = Statistics(prompt_tokens=len(ids), seed=sampler.seed)
        with _alone([self]), self._host.scheduler.turn():
            with _restored_after_errors([(self._held, self._held.state)]):
                # The last token is computed in any case: its logits are what is asked for.
                stats.reused_tokens = self._held.begin(weights, ids, len(ids))
                _reserve([(self, len(ids) - stats.reused_tokens)])
            self.cancel()
            generation = Generation(request, self._held, stats)
            self._running, self.last = generation, stats
            self._host.scheduler.begin(generation)
            stats.prefill_seconds = time.perf_counter() - start
            return generation

    def _encode(self, tokenizer: Tokenizer, prompt: Prompt, allow_special: bool) -> list[int]:
        """RunError: it is no prompt, or is longer than the context."""
        if _are_ids(prompt):
            return arguments.token_ids(prompt, "prompt")
        if not isinstance(prompt, (str, Conversation)):
            hint = 'give text, token ids, or a list of messages: [{"role": "user", "content": "…"}]'
            prompt = Conversation(
                cast("Sequence[Message]", arguments.instance("prompt", prompt, Sequence, hint))
            )
        most = self._host.limits.max_context
        length = too_long(tokenizer, prompt, most)  # to tokenize it could take all memory
        if length is not None:
            raise ContextFullError(
                f"{length} characters do not fit the context of {most} tokens", hint=_SHORTEN
            )
        if isinstance(prompt, str):
            return tokenizer.encode(prompt)
        return tokenizer.encode_chat(prompt, allow_special=allow_special)

    def _lookup(self, weights: Weights, ids: list[int]) -> Lookup | None:
        habits = self._host.habits
        return None if habits is None else Lookup(ids, habits.of(weights.habit(self._held.salt)))

    def _load(self) -> Weights:
        """The weights of the session's adapters."""
        return self._host.load(self._adapters)

    def _check_room(self, count: int) -> None:
        limit = self._host.limits.max_context
        if count > limit:
            raise ContextFullError(f"{count} tokens do not fit the context of {limit}", hint=_SHORTEN)


def _are_ids(prompt: object) -> bool:
    """Whether it begins with a number, or is an array."""
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray):
        return bool(prompt) and isinstance(prompt[0], Integral)
    return hasattr(prompt, "__array__")


def _ids(token_ids: object, name: str = "token_ids") -> list[int]:
    ids = arguments.token_ids(token_ids, name)
    if not ids:
        raise RunError("there are no tokens", hint="give at least one token: is the prompt empty?")
    return ids


def _check_known(ids: Sequence[int], weights: Weights, name: str = "token_ids") -> None:
    wrong = next((token for token in ids if token >= weights.vocab), None)
    if wrong is not None:
        hint = f"token ids are 0 … {weights.vocab - 1}"
        raise ArgumentError(name, f"token {wrong} is not in the vocabulary", hint=hint)


def _widened(logits: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """Logits, and -inf for what they have no token for."""
    import numpy as np

    return np.pad(logits, (0, width - len(logits)), constant_values=-np.inf)


@contextmanager
def _alone(sessions: Sequence[Session]) -> Iterator[None]:
    """Meanwhile, only this call changes the sessions, in one turn or in several. Generations that run go on, until it
    ends them. RunError: it is within such a call, as the handler of a signal can be.
    """
    sessions[0]._host.scheduler.check_outside()  # before it waits for who waits for this thread
    if any(session._changing._is_owned() for session in sessions):  # type: ignore[attr-defined]
        hint = "a signal's handler can only cancel: do this before the call, or after it"
        raise RunError("a session is used within a call that changes it", hint=hint)
    with ExitStack() as stack:
        for session in sorted(sessions, key=id):  # in one order, or two calls could wait for each other
            stack.enter_context(session._changing)
        yield


@contextmanager
def _restored_after_errors(before: Sequence[_Before]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for held, state in before:
            held.restore(state)
        raise


def _reserve(parts: Sequence[tuple[Session, int]]) -> None:
    """Take memory for so many more positions of each session. RunError: there is none."""
    helds = [(session._held, count) for session, count in parts]
    positions = [
        (held.kv, len(held.tokens), len(held.tokens) + count) for held, count in helds if held.kv is not None
    ]
    parts[0][0]._host.reserve(positions)
