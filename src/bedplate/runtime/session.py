"""One conversation: its keys and values, the tokens that they stand for, and generation."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, overload

from bedplate import _native
from bedplate.errors import RunError
from bedplate.runtime import arguments
from bedplate.runtime.messages import Message
from bedplate.runtime.programs import LoadedProgram, native_errors
from bedplate.runtime.request import Request, Statistics, Wish
from bedplate.runtime.sampling import chooser
from bedplate.runtime.text import StopFilter, TextStream

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bedplate.runtime.engine import Engine


class Session:
    """A conversation with the base or with one adapter at a time. `Engine.session` makes it.

    last: statistics of the latest generation. None before the first. You can call `cancel` from any thread.
    """

    def __init__(self, engine: Engine, adapter: str | None) -> None:
        self._engine = engine
        self._adapter = adapter
        self._kv: _native.KvCache | None = None
        self._tokens: list[int] = []  # what the keys and values stand for
        self._computed_by: int | None = None  # serial of the program that computed them
        self._running: Request | None = None
        self._lock = threading.RLock()
        self.last: Statistics | None = None

    @property
    def adapter(self) -> str | None:
        return self._adapter

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens whose keys and values the session holds."""
        return tuple(self._tokens)

    @property
    def kv_bytes(self) -> int:
        """How many bytes its keys and values take now."""
        return 0 if self._kv is None else self._kv.resident

    def use(self, adapter: str | None) -> None:
        """Switch to another adapter, or to the base (None). The keys and values so far are dropped, because another
        program computed them. NotFoundError: the bundle has no such adapter.
        """
        self._engine.check_adapter(adapter)
        with self._lock:
            if adapter != self._adapter:
                self.reset()
                self._adapter = adapter

    def reset(self) -> None:
        """Forget the conversation and free its memory."""
        with self._lock:
            self._running = None
            self._tokens.clear()
            if self._kv is not None:
                self._kv.release()

    def cancel(self) -> None:
        """End the running generation after its current step."""
        self._running = None

    def step(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens. Returns the logits of the last one, float32 [vocab]. RunError: the context is full."""
        with self._lock:
            self._running = None
            held = list(self._tokens)
            program = self._program()
            ids = held[len(self._tokens) :] + self._checked(
                token_ids
            )  # what a reloaded program does not know
            _check_room(program, len(self._tokens) + len(ids))
            row: NDArray[np.float32] = self._append(program, "forward", ids)[-1].array[-1]
            return row

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits at every position of a new text, float32 [T, vocab]. The session then holds this text only.

        RunError: the text is longer than the context, or the program has no method `logits`.
        """
        import numpy as np

        with self._lock:
            self._running = None
            program = self._program()
            ids = self._checked(token_ids)
            _check_room(program, len(ids))
            self._tokens.clear()
            return np.concatenate([part.array for part in self._append(program, "logits", ids)])

    @overload
    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        max_tokens: int,
        temperature: float = ...,
        top_p: float = ...,
        top_k: int = ...,
        seed: int = ...,
        stop: Sequence[str] = ...,
        on_prefill: Callable[[int, int], None] | None = ...,
        allow_special: bool = ...,
        stream: Literal[False] = ...,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        max_tokens: int,
        temperature: float = ...,
        top_p: float = ...,
        top_k: int = ...,
        seed: int = ...,
        stop: Sequence[str] = ...,
        on_prefill: Callable[[int, int], None] | None = ...,
        allow_special: bool = ...,
        stream: Literal[True],
    ) -> Iterator[str]: ...

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        stop: Sequence[str] = (),
        on_prefill: Callable[[int, int], None] | None = None,
        allow_special: bool = False,
        stream: bool = False,
    ) -> str | Iterator[str]:
        """Continue a text (used as it is) or a conversation (with the adapter's chat template).

        At temperature 0, the most likely token is chosen. Otherwise tokens are drawn with `seed`, see Sampling. The
        text ends at an end token or before a string of `stop`, after max_tokens, at the end of the context, or after
        `cancel`. If there are several strings in `stop`, the one that is complete first counts.

        If the session already holds the beginning of the prompt, this part is not computed again. A generation that is
        still streaming ends when the session gets another request.

        A long prompt is read in chunks. After each chunk, `on_prefill` gets two numbers: the tokens that are done, and
        all tokens of the prompt. `cancel` also works between two chunks.

        allow_special: the text of a special token in a message becomes that token, see `Tokenizer.encode_chat`.

        Returns the text, or with `stream` an iterator over pieces of it. Statistics are in `last`.
        RunError: the prompt is empty or longer than the context, or an argument has a wrong type or value.
        """
        wish = Wish.of(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=stop,
            on_prefill=on_prefill,
        )
        arguments.flag("stream", stream)
        with self._lock:
            ids = self._encode(prompt, arguments.flag("allow_special", allow_special))
            program = self._program()
            _check_room(program, len(self._checked(ids)))
            stats = Statistics(prompt_tokens=len(ids))
            request = Request(prompt=ids, program=program, wish=wish, stats=stats)
            self._running, self.last = request, request.stats
        pieces = self._generate(request)
        return pieces if stream else "".join(pieces)

    def _encode(self, prompt: str | Sequence[Message], allow_special: bool) -> list[int]:
        hint = 'give text, or a list of messages: [{"role": "user", "content": "…"}]'
        arguments.instance("prompt", prompt, (str, Sequence), hint)
        tokenizer = self._engine.tokenizer_of(self._adapter)
        if isinstance(prompt, str):
            return tokenizer.encode(prompt)
        return tokenizer.encode_chat(prompt, allow_special=allow_special)

    def _generate(self, request: Request) -> Iterator[str]:
        text, stops = TextStream(self._engine.tokenizer.decode), StopFilter(request.wish.stop)
        stats = request.stats
        try:
            for token in self._choose_tokens(request):
                if piece := stops.push(text.push(token)):
                    yield piece
                if stops.stopped:
                    break
            if piece := stops.push(text.finish()) + stops.finish():
                yield piece
            if stops.stopped:
                stats.finish_reason = "stop"
        finally:
            if stats.finish_reason is None:
                stats.finish_reason = "cancelled"

    def _choose_tokens(self, request: Request) -> Iterator[int]:
        stats, wish = request.stats, request.wish
        choose = chooser(wish.sampling, wish.seed)
        end_tokens = self._engine.bundle.manifest.tokenizer.eos_ids
        # The keys and values of the last token are not needed: it may stand just beyond the context.
        room = request.program.limits.max_context - len(request.prompt) + 1
        logits = self._prefill(request)
        while logits is not None:
            token = choose(logits)
            if token in end_tokens:
                stats.finish_reason = "stop"
                return
            stats.generated_tokens += 1
            yield token
            if stats.generated_tokens == min(wish.max_tokens, room):
                stats.finish_reason = "length"
                return
            start = time.perf_counter()
            logits = self._continue(request, [token])
            stats.decode_seconds += time.perf_counter() - start

    def _prefill(self, request: Request) -> _native.Logits | None:
        """Logits of the prompt's last position; None: cancelled."""
        start = time.perf_counter()
        with self._lock:
            if self._running is not request:
                return None
            # The last token is computed in any case: its logits are what is asked for.
            shared = min(_common_prefix(self._tokens, request.prompt), len(request.prompt) - 1)
            del self._tokens[shared:]
        request.stats.reused_tokens = shared
        logits, done = None, shared
        for chunk in _chunks(request.prompt[shared:], request.program.limits.max_seq_len):
            logits = self._continue(request, chunk)
            if logits is None:
                return None
            done += len(chunk)
            if request.wish.on_prefill is not None:
                request.wish.on_prefill(done, len(request.prompt))
        request.stats.prefill_seconds = time.perf_counter() - start
        return logits

    def _continue(self, request: Request, ids: list[int]) -> _native.Logits | None:
        """Logits of the last of some more tokens; None: cancelled."""
        with self._lock:
            if self._running is not request:
                return None
            return self._append(request.program, "forward", ids)[-1]

    def _program(self) -> LoadedProgram:
        """The adapter's program, loaded. Keys and values that another one computed are dropped."""
        program = self._engine.load(self._adapter)
        if self._computed_by != program.serial:
            self._tokens.clear()
            self._computed_by = program.serial
            if self._kv is None or self._kv.nbytes != program.kv_bytes:
                self._kv = _native.KvCache(program.kv_bytes)
        return program

    def _append(self, program: LoadedProgram, method: str, ids: list[int]) -> list[_native.Logits]:
        """Run tokens after those that the session holds, in chunks. The session keeps those that succeeded."""
        assert self._kv is not None, "_program() comes first"
        limits, results = program.limits, []
        for chunk in _chunks(ids, limits.max_logits_len if method == "logits" else limits.max_seq_len):
            with native_errors(program.path):
                results.append(program.native.step(method, chunk, len(self._tokens), self._kv))
            self._tokens.extend(chunk)
        return results

    def _checked(self, token_ids: Sequence[int]) -> list[int]:
        ids = arguments.token_ids(token_ids)
        vocab = self._engine.bundle.manifest.model["vocab_size"]
        wrong = next((token for token in ids if not 0 <= token < vocab), None)
        if wrong is not None:
            raise RunError(f"token {wrong} is not in the vocabulary", hint=f"token ids are 0 … {vocab - 1}")
        if not ids:
            raise RunError("there are no tokens", hint="give at least one token: is the prompt empty?")
        return ids


def _check_room(program: LoadedProgram, count: int) -> None:
    limit = program.limits.max_context
    if count > limit:
        hint = "shorten the text, reset the session, or build the bundle with a larger --max-context"
        raise RunError(f"{count} tokens do not fit the context of {limit}", hint=hint)


def _chunks(ids: list[int], size: int) -> Iterator[list[int]]:
    return (ids[at : at + size] for at in range(0, len(ids), size))


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the beginning that both share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
