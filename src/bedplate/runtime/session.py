"""One conversation: its keys and values, the tokens that they stand for, and generation."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar, Unpack, cast, overload

from bedplate import _native
from bedplate.errors import RunError
from bedplate.runtime import arguments, session_file
from bedplate.runtime.generation import Source, events, texts
from bedplate.runtime.held import Held
from bedplate.runtime.messages import Message
from bedplate.runtime.request import Event, Options, Request, Statistics, Wish
from bedplate.runtime.sampling import Sampler
from bedplate.runtime.tokenizer import Tokenizer
from bedplate.runtime.weights import Limits, Weights

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_T = TypeVar("_T")
Prompt = str | Sequence[Message] | Sequence[int]
_LOGITS_ROWS = 64  # whose logits are computed at once: those of many positions take much memory


class Host(NamedTuple):
    """What a session needs of its engine, by the name of an adapter (None: of the base).

    load_for_text: what makes an answer, of the same files.
    adopt: takes in a session that was made of another.
    reserve: takes memory for positions [begin, end) of keys and values. RunError: there is none.
    """

    load: Callable[[str | None], Weights]
    load_for_text: Callable[[str | None], tuple[Weights, Tokenizer]]
    tokenizer_of: Callable[[str | None], Tokenizer]
    adopt: Callable[[Session], None]
    reserve: Callable[[Sequence[tuple[_native.Kv, int, int]]], None]
    limits: Limits


class Session:
    """A conversation with the base or with one adapter at a time. `Engine.session` makes it.

    last: statistics of the latest generation. None before the first. You can call `cancel` from any thread.
    """

    def __init__(self, host: Host, adapter: str | None, held: Held, scale: float = 1.0) -> None:
        self._host = host
        self._adapter, self._scale = adapter, scale
        self._held = held
        self._running: Request | None = None
        self._lock = threading.RLock()
        self.last: Statistics | None = None

    @property
    def adapter(self) -> str | None:
        return self._adapter

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens whose keys and values the session holds."""
        return tuple(self._held.tokens)

    @property
    def kv_bytes(self) -> int:
        """How many bytes its keys and values take now, also those that it shares."""
        kv = self._held.kv
        return 0 if kv is None else kv.nbytes

    @property
    def scale(self) -> float:
        """What the adapter's A and B are multiplied by."""
        return self._scale

    def use(self, adapter: str | None, *, scale: float = 1.0) -> None:
        """Switch to another adapter, or to the base (None). The keys and values so far are dropped, because something
        else computed them. Those that the base computed stay for the base and for activated LoRAs.

        scale: multiplies what A and B of the adapter add, as PEFT's `set_scale` does. It may be 0 or negative.
        NotFoundError: the bundle has no such adapter.  RunError: the scale is not a number.  UnsupportedError: the
        adapter has something that no scale fits.
        """
        self._host.tokenizer_of(adapter)
        factor = arguments.scale(scale, of_base=adapter is None)
        if factor != 1:
            self._host.load(adapter).scaled(factor)
        with self._lock:
            if (adapter, factor) != (self._adapter, self._scale):
                if self._begins_with_base(adapter):
                    self._running = None
                    self._held.keep_of_base()
                else:
                    self.reset()
                self._adapter, self._scale = adapter, factor

    def _begins_with_base(self, adapter: str | None) -> bool:
        """Whether the base's keys and values are also its own, if the session holds some."""
        if adapter is None or not self._held.of_base:
            return adapter is None
        return self._host.load(adapter).invocation is not None

    def fork(self) -> Session:
        """Another session that has come as far as this one. From there, each goes on alone. What they have in common
        takes memory once.
        """
        with self._lock:
            other = Session(self._host, self._adapter, self._held.fork(), self._scale)
        self._host.adopt(other)
        return other

    def save(self, path: str | Path) -> None:
        """Write the session to a file, for `Engine.load_session`. The file is there as a whole or not at all."""
        with self._lock:
            session_file.save(path, self._held, self._load(), self._adapter)

    def reset(self) -> None:
        """Forget the conversation and free its memory."""
        with self._lock:
            self._running = None
            self._held = Held(self._held.salt)

    def cancel(self) -> None:
        """End the running generation after its current step."""
        self._running = None

    def held(self) -> AbstractContextManager[object]:
        """A lock: while it is held, nothing else runs in this session."""
        return self._lock

    def step(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens. Returns the logits of the last one, float32 [vocab]: as many as the adapter has tokens.

        RunError: the context is full, or token ids are not in the vocabulary. The session is then as it was before.
        """
        with self.held():
            row: NDArray[np.float32] = self.step_together([(self, token_ids)])[0]
            return row

    @staticmethod
    def step_together(parts: Sequence[tuple[Session, Sequence[int]]]) -> NDArray[np.float32]:
        """Append tokens to sessions whose lock the caller holds, see `Engine.step`."""
        import numpy as np

        # All parts are checked and loaded before any session changes.
        wanted = [(session, _ids(token_ids)) for session, token_ids in parts]
        for session, ids in wanted:
            session._check_room(len(session._held.tokens) + len(ids))
        loaded = [session._held.weights_for(session._load(), ids) for session, ids in wanted]
        for (_, ids), weights in zip(wanted, loaded, strict=True):
            _check_known(ids, weights)
        before = [session._held.state for session, _ in wanted]
        host = parts[0][0]._host
        try:
            texts = [
                session._held.extend(weights, ids, len(session._held.tokens) + len(ids))
                for (session, ids), weights in zip(wanted, loaded, strict=True)
            ]
            _reserve([(session, len(text)) for (session, _), text in zip(wanted, texts, strict=True)])
            for session, _ in wanted:
                session._running = None
            rows = [
                _Row(session, weights, token, wanted=at == len(text) - 1)
                for (session, _), weights, text in zip(wanted, loaded, texts, strict=True)
                for at, token in enumerate(text)
            ]
            logits = _steps(rows, host.limits.max_rows)
            width = max(map(len, logits.values()))
            return np.stack([_widened(logits[id(session)], width) for session, _ in wanted])
        except BaseException:
            for (session, _), state in zip(wanted, before, strict=True):
                session._held.restore(state)
            raise

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits at every position of a new text, float32 [T, vocab], as of `step`. The session then holds this text
        only.

        RunError: the text is longer than the context.
        """
        import numpy as np

        with self.held():
            ids = _ids(token_ids)
            self._check_room(len(ids))
            weights, before = self._load().for_text(ids), self._held.state
            _check_known(ids, weights)
            try:
                self._held.clear(weights, len(ids))
                _reserve([(self, len(ids))])
                self._running = None
                rows = [
                    self._append(weights, chunk, every=True).array for chunk in _chunks(ids, _LOGITS_ROWS)
                ]
                return np.concatenate(rows)
            except BaseException:
                self._held.restore(before)
                raise

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
        pieces = texts(self._start(prompt, max_tokens=max_tokens, **options))
        return pieces if stream else "".join(pieces)

    def events(
        self, prompt: Prompt, *, max_tokens: int, logprobs: int | None = None, **options: Unpack[Options]
    ) -> Iterator[Event]:
        """Continue a text (used as it is), token ids, or a conversation (with the adapter's chat template).

        `Sampling` says how tokens are chosen: without options, the most likely token each time. The text ends at an
        end token or before a string of `stop`, after max_tokens, at the end of the context, or after `cancel`. If
        there are several strings in `stop`, the one that is complete first counts.

        If the session already holds the beginning of the prompt, this part is not computed again. A generation that is
        still going on ends when the session gets another request.

        A long prompt is read in chunks. After each chunk, `on_prefill` gets two numbers: the tokens that are done, and
        all tokens of the prompt. `cancel` also works between two chunks.

        mask: a function that gets the tokens so far, and gives packed bits of those that are allowed next.
        allow_special: the text of a special token in a message becomes that token, see `Tokenizer.encode_chat`.
        logprobs: events have the logarithms of probabilities, also of so many likeliest tokens.

        Returns an iterator over events, see `Event`. Statistics are in `last`.
        RunError: the prompt is empty or longer than the context, or an argument has a wrong type or value.
        """
        return self._start(prompt, max_tokens=max_tokens, logprobs=logprobs, **options)

    def _start(
        self, prompt: Prompt, *, max_tokens: int, logprobs: int | None = None, **options: Unpack[Options]
    ) -> Generator[Event]:
        allow_special = arguments.flag("allow_special", options.pop("allow_special", False))
        wish = Wish.of(max_tokens=max_tokens, logprobs=logprobs, **options)
        with self._lock:
            loaded, tokenizer = self._host.load_for_text(self._adapter)
            start = time.perf_counter()
            ids = _ids(_encode(tokenizer, prompt, allow_special))
            # As in PEFT, what is generated does not turn an adapter on.
            weights = loaded.scaled(self._scale).for_text(ids)
            self._check_room(len(ids))
            _check_known(ids, weights)
            _check_known(wish.sampling.tokens, weights)
            sampler = Sampler(wish.sampling, prompt=ids, ends=sorted(tokenizer.end_ids), mask=wish.mask)
            stats = Statistics(prompt_tokens=len(ids), seed=sampler.seed)
            request = Request(
                prompt=ids, weights=weights, tokenizer=tokenizer, wish=wish, sampler=sampler, stats=stats
            )
            before = self._held.state
            try:
                # The last token is computed in any case: its logits are what is asked for.
                stats.reused_tokens = self._held.begin(weights, ids, len(ids))
                _reserve([(self, len(ids) - stats.reused_tokens)])
            except BaseException:
                self._held.restore(before)
                raise
            self._running, self.last = request, request.stats
            stats.prefill_seconds = time.perf_counter() - start
        source = Source(
            prefill=self._prefill,
            go_on=self._go_on,
            ended=self._ended,
            decode=tokenizer.decode,
            end_ids=tokenizer.end_ids,
            # The keys and values of the last token are not needed: it may stand just beyond the context.
            room=self._host.limits.max_context - len(ids) + 1,
        )
        return events(request, source)

    def _ended(self, request: Request) -> None:
        with self._lock:
            if self._running is request:
                self._running = None  # which holds the weights

    def _prefill(self, request: Request) -> _native.Logits | None:
        """Logits of the prompt's last position; None: cancelled."""
        logits, done = None, request.stats.reused_tokens
        for chunk in _chunks(request.prompt[done:], self._host.limits.max_rows):
            logits = self._continue(request, chunk, length=len(request.prompt))
            if logits is None:
                return None
            done += len(chunk)
            if request.wish.on_prefill is not None:
                request.wish.on_prefill(done, len(request.prompt))
        return logits

    def _go_on(self, request: Request, token: int) -> _native.Logits | None:
        """Logits after a token that was generated; None: cancelled."""
        return self._continue(request, [token], length=len(request.prompt) + request.stats.generated_tokens)

    def _continue(self, request: Request, ids: Sequence[int], *, length: int) -> _native.Logits | None:
        """Logits of the last of some more tokens of a text of `length` tokens; None: cancelled."""
        with self._lock:
            if self._running is not request:
                return None
            before = self._held.state
            try:
                text = self._held.extend(request.weights, ids, length)
                _reserve([(self, len(text))])
                for chunk in _chunks(text, self._host.limits.max_rows):
                    logits = self._append(request.weights, chunk)
            except BaseException:
                self._held.restore(before)
                raise
            return logits

    def _load(self) -> Weights:
        """The weights of the session's adapter."""
        return self._host.load(self._adapter).scaled(self._scale)

    def _append(self, weights: Weights, ids: Sequence[int], *, every: bool = False) -> _native.Logits:
        """Compute tokens after those that the session holds. Returns the logits of the last one, or of every one."""
        last = len(ids) - 1
        return _step([_Row(self, weights, token, every or at == last) for at, token in enumerate(ids)])

    def _check_room(self, count: int) -> None:
        limit = self._host.limits.max_context
        if count > limit:
            hint = "shorten the text, reset the session, or give the engine a larger max_context"
            raise RunError(f"{count} tokens do not fit the context of {limit}", hint=hint)


def _are_ids(prompt: object) -> bool:
    """Whether it begins with a number, or is an array."""
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray):
        return bool(prompt) and isinstance(prompt[0], Integral)
    return hasattr(prompt, "__array__")


def _encode(tokenizer: Tokenizer, prompt: Prompt, allow_special: bool) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    if _are_ids(prompt):
        return arguments.token_ids(prompt, "prompt")
    hint = 'give text, token ids, or a list of messages: [{"role": "user", "content": "…"}]'
    messages = cast("Sequence[Message]", arguments.instance("prompt", prompt, Sequence, hint))
    return tokenizer.encode_chat(messages, allow_special=allow_special)


def _ids(token_ids: object) -> list[int]:
    ids = arguments.token_ids(token_ids)
    if not ids:
        raise RunError("there are no tokens", hint="give at least one token: is the prompt empty?")
    return ids


def _check_known(ids: Sequence[int], weights: Weights) -> None:
    wrong = next((token for token in ids if token >= weights.vocab), None)
    if wrong is not None:
        raise RunError(
            f"token {wrong} is not in the vocabulary", hint=f"token ids are 0 … {weights.vocab - 1}"
        )


def _widened(logits: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """Logits, and -inf for what they have no token for."""
    import numpy as np

    return np.pad(logits, (0, width - len(logits)), constant_values=-np.inf)


class _Row(NamedTuple):
    """A token to compute next in a session. wanted: return its logits."""

    session: Session
    weights: Weights
    token: int
    wanted: bool


def _steps(rows: Sequence[_Row], most: int) -> dict[int, NDArray[np.float32]]:
    """Compute rows in steps of at most `most`. Returns the logits of the one that each session wants, by its id."""
    found: dict[int, NDArray[np.float32]] = {}
    for layers in dict.fromkeys(row.weights.layers for row in rows):
        group = [row for row in rows if row.weights.layers == layers]  # a native step has one list of layers
        logits = (one for chunk in _chunks(group, most) for one in _step(chunk).array)
        found |= zip((id(row.session) for row in group if row.wanted), logits, strict=True)
    return found


def _step(rows: Sequence[_Row]) -> _native.Logits:
    """Compute rows of sessions whose lock the caller holds. If this succeeds, the sessions hold the tokens."""
    position: dict[int, int] = {}
    native: list[_native.Row] = []
    for session, weights, token, wanted in rows:
        at = position.get(id(session), len(session._held.tokens))
        position[id(session)] = at + 1
        native.append((token, at, _kv(session), *weights.at(at), wanted))
    try:
        logits = rows[0].weights.decoder.step(native)
    except (_native.NativeError, MemoryError) as error:
        hint = "reset sessions to free their memory"
        raise RunError(f"the step cannot be computed: {error}", hint=hint) from error
    for _, own in groupby(rows, key=lambda row: id(row.session)):
        some = list(own)
        some[0].session._held.append(some[0].weights, [row.token for row in some])
    return logits


def _reserve(parts: Sequence[tuple[Session, int]]) -> None:
    """Take memory for so many more positions of each session. RunError: there is none."""
    wanted = [
        (_kv(session), len(session._held.tokens), len(session._held.tokens) + count)
        for session, count in parts
    ]
    parts[0][0]._host.reserve(wanted)


def _kv(session: Session) -> _native.Kv:
    kv = session._held.kv
    assert kv is not None, "Held.begin() comes first"
    return kv


def _chunks(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    return (items[at : at + size] for at in range(0, len(items), size))
